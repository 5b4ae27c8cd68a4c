"""Values of those assignments alone that a mask lets through: `v[keep]`.

| the model writes | what it is |
|---|---|
| `v[keep]`, `v[keep.nonzero().squeeze(-1)]`, `v[token, slot]` of `token, slot = where(keep)` | v, picked |
| `token, choice = where(keep)` | numbers of tokens and of choices, picked |
| `x[token[keep]]` of numbers of tokens | x at its tokens, picked |
| casts, products, trailing dims of size 1 of picked values | the same of the values themselves, picked |

So what is computed of picked values can be computed of all assignments instead, and is right where the mask
is 1. Sums and whatever else mixes rows have no such value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tedfx.capture.routing import Dims, Routing, argument, name_of, relabel, shape_of, whole_quotient
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import REGROUPS, is_tensor, operand, operand_or_none

__all__ = ["Numbers", "Pick", "Picks", "index_of"]

aten = torch.ops.aten
_CASTS = ("to", "_to_copy", "clone", "contiguous", "type_as")


@dataclass(frozen=True)
class Pick:
    """`value` at the entries where `mask` is 1; its leading dims are those of the mask."""

    value: fx.Node
    mask: fx.Node


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


class Picks:
    def __init__(self, emit: Callable[..., fx.Node]):
        """`emit(target, *args, like=, **kwargs)` inserts a node before the one that is looked at."""
        self.emit = emit
        self.made: dict[fx.Node, Pick | None] = {}

    def mask(self, index: object) -> tuple[fx.Node, int | None] | None:
        """(the mask, which of its dims) of what indexes by it; a mask itself has all dims."""
        if not isinstance(index, fx.Node) or not is_tensor(index):
            return None
        if VAL[index].dtype == torch.bool:
            return index, None
        while name_of(index) in (*REGROUPS, "clone", "contiguous") and len(shape_of(index)) == 1:
            before = operand(index, 0)
            if len(shape_of(before)) == 2 and name_of(before) == "nonzero" and shape_of(before)[1] == 1:
                return operand(before, 0), 0
            index = before
        source = operand_or_none(index, 0)
        if source is None:
            return None
        if name_of(index) == "getitem" and name_of(source) in ("where", "nonzero_numpy"):
            return (operand(source, 0), index.args[1]) if len(source.args) == 1 else None
        if name_of(index) == "select" and name_of(source) == "nonzero" and argument(index, "dim") in (1, -1):
            return operand(source, 0), argument(index, "index") % shape_of(source)[1]
        return None

    def by(self, indices: list) -> fx.Node | None:
        """The mask by which all of its dims are indexed."""
        found = [self.mask(index) for index in indices]
        if any(f is None for f in found):
            return None
        mask, rank = found[0][0], len(shape_of(found[0][0]))
        dims = [dim for _, dim in found]
        same = all(f[0] is mask for f in found) and (dims == [None] or dims == list(range(rank)))
        return mask if same and VAL[mask].dtype == torch.bool else None

    def of(self, node: fx.Node) -> Pick | None:
        if node not in self.made:
            self.made[node] = self._of(node)
        return self.made[node]

    def _of(self, node: fx.Node) -> Pick | None:
        if not is_tensor(node) or node.op != "call_function":
            return None
        name, found, search = name_of(node), index_of(node), self.mask(node)
        if search is not None and search[1] is not None:
            return self._numbers(node, *search)
        if found is not None:
            source, indices = found
            mask = self.by(indices)
            if mask is not None:
                lead = shape_of(mask)
                return Pick(source, mask) if shape_of(source)[: len(lead)] == lead else None
            if len(indices) == 1 and (number := self.of(indices[0])) is not None:
                made = self.emit(aten.index.Tensor, source, [number.value], like=node)
                return Pick(made, number.mask)
            return None
        if name == "masked_select":
            value, mask = node.args
            return Pick(value, mask) if shape_of(value) == shape_of(mask) else None
        if name in _CASTS or name in ("mul", "add", "sub", "unsqueeze", *REGROUPS):
            return self._computed(node, name)
        if whole_quotient(node) is not None and not VAL[node].is_floating_point():
            return self._computed(node, name)
        return None

    def _numbers(self, node: fx.Node, mask: fx.Node, dim: int) -> Pick:
        """What a search found: numbers along a dim of the mask."""
        rank = len(shape_of(mask))
        sizes = [self.emit(aten.sym_size.int, mask, d, like=node) for d in range(rank)]
        made = self.emit(aten.arange.default, sizes[dim], device=VAL[mask].device, like=node)
        for at in range(rank):
            if at != dim:
                made = self.emit(aten.unsqueeze.default, made, at, like=node)
        return Pick(self.emit(aten.expand.default, made, sizes, like=node) if rank > 1 else made, mask)

    def _computed(self, node: fx.Node, name: str) -> Pick | None:
        picks = {x: pick for x in node.all_input_nodes if is_tensor(x) and (pick := self.of(x)) is not None}
        if not picks or len({pick.mask for pick in picks.values()}) != 1:
            return None
        if any(is_tensor(x) and x not in picks and shape_of(x) for x in node.all_input_nodes):
            return None
        (mask, *_) = (pick.mask for pick in picks.values())
        rank, source = len(shape_of(mask)), operand(node, 0)
        if name in ("unsqueeze", *REGROUPS):
            before, after = shape_of(source), shape_of(node)
            if after[: len(before)] != before or any(size != 1 for size in after[len(before) :]):
                return None  # more than dims of size 1 behind all others
            value = picks[source].value
            for _ in after[len(before) :]:
                value = self.emit(aten.unsqueeze.default, value, -1, like=node)
            return Pick(value, mask)
        ranks = {len(shape_of(x)) for x in picks}
        if len(ranks) > 1:
            return None  # rows of one broadcast against features of the other
        swap = lambda x: picks[x].value if x in picks else x
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), swap)
        made = self.emit(node.target, *args, like=node, **kwargs)
        return Pick(made, mask) if len(shape_of(made)) >= rank else None


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
        if name in _CASTS:
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
