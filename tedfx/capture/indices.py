"""Indices of rows: what is read by which, and numbers of tokens."""

from __future__ import annotations

from typing import Any

from torch import fx

from tedfx.capture.routing import Dims, Routing, argument, name_of, relabel, shape_of, whole_quotient
from tedfx.graph.nodes import REGROUPS, is_tensor, operand, operand_or_none

__all__ = ["CASTS", "Numbers", "index_of", "rows_of"]

CASTS = ("to", "_to_copy", "clone", "contiguous", "type_as")


def index_of(node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """(what is read, the indices of its leading dims) of `v[i]`, `v[i, j]`, `v.index_select(0, i)`,
    `v.gather(0, i)` of whole rows."""
    name = name_of(node)
    if name == "index":
        indices = list(argument(node, "indices"))
        while indices and indices[-1] is None:
            indices.pop()
        return (operand(node, 0), indices) if indices and None not in indices else None
    if name == "index_select" and argument(node, "dim") == 0:
        return operand(node, 0), [argument(node, "index")]
    if name == "gather" and argument(node, "dim") == 0:
        column = rows_of(operand(node, 2))
        whole = shape_of(node)[1:] == shape_of(operand(node, 0))[1:]
        return (operand(node, 0), [column]) if column is not None and whole else None
    return None


def rows_of(index: fx.Node) -> fx.Node | None:
    """The column of an index [M, ..] that is the same for all features: its node [M]."""
    while len(shape_of(index)) > 1:
        before = operand_or_none(index, 0)
        shape = [] if before is None or not is_tensor(before) else shape_of(before)
        if name_of(index) not in ("expand", "repeat", "unsqueeze", *REGROUPS):
            return None
        if not shape or shape[0] != shape_of(index)[0] or any(size != 1 for size in shape[1:]):
            return None
        index = operand(index, 0)
    return index


class Numbers:
    """Numbers of tokens: a node whose entry at (token n, choice k) is n has these labels."""

    def __init__(self, routing: Routing):
        self.routing = routing
        tokens = 1
        for label in routing.tokens:
            tokens = tokens * routing.sizes[label]
        self.count: Any = tokens

    def dims(self, node: fx.Node) -> Dims | None:
        name, source = name_of(node), operand_or_none(node, 0)
        if name == "arange" and len(node.args) == 1:
            return (self.routing.tokens,) if shape_of(node)[0] == self.count else None
        if source is None or not is_tensor(node):
            return None
        if name in CASTS:
            return self.dims(source)
        many = self.routing.choices
        if whole_quotient(node) == many and name_of(source) == "arange" and len(source.args) == 1:
            return ((*self.routing.tokens, "k"),) if shape_of(source)[0] == self.count * many else None
        dims = self.dims(source) if is_tensor(source) else None
        if dims is None:
            return None
        return self._spread(node, name, dims)

    def _spread(self, node: fx.Node, name: str, dims: Dims) -> Dims | None:
        many, taken = self.routing.choices, any("k" in dim for dim in dims)
        if name == "repeat_interleave" and not taken and node.args[1:] == (many,) and len(dims) == 1:
            return ((*dims[0], "k"),)
        if name == "repeat_interleave" and not taken and node.args[1:] == (many, 0) and len(dims) == 1:
            return ((*dims[0], "k"),)
        if name == "unsqueeze":
            at = argument(node, "dim") % (len(dims) + 1)
            return (*dims[:at], (), *dims[at:])
        if name in ("expand", "repeat") and len(shape_of(node)) == len(dims):
            before, after = shape_of(operand(node, 0)), shape_of(node)
            grown = [d for d in range(len(dims)) if before[d] != after[d]]
            if not grown:
                return dims
            if taken or len(grown) > 1 or after[grown[0]] != before[grown[0]] * many:
                return None
            (d,) = grown
            if dims[d] and name == "expand":
                return None
            return (*dims[:d], ("k", *dims[d]), *dims[d + 1 :])
        if name in REGROUPS:
            return relabel(dims, self.routing.sizes, shape_of(node))
        return None
