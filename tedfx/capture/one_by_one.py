"""Choices that are handled one by one, in a value that holds all of them, become values of one choice each.

    mask = F.one_hot(ids, E)                                        ids [K, N]
    for k in range(K):
        place = (mask.cumsum(1)[k] + earlier) * mask[k]
        mask[k] *= place < capacity                                  written into the dim of choices
    weights = (gates * mask.sum(-1)).sum(0)                        .. and summed over it

A value that was put together along a dim (`stack`, writes of one entry) and is taken apart along it again (by
entry, or the sum over all) is followed back, through what treats the entries of that dim alike and apart, to
where it was put together, and to the choices themselves: `one_hot(ids[k])` for `one_hot(ids)[k]`. The values
are the same; each is now about one choice, which is how slots.py knows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from tedfx.capture.masks import facts
from tedfx.capture.routing import TRANSPOSES, Fact, argument, dim_of, name_of, shape_of, swapped
from tedfx.graph import nodes
from tedfx.graph.emit import emit
from tedfx.graph.nodes import function, is_elementwise, is_tensor, operand

__all__ = ["apart"]

aten = torch.ops.aten
_MOST = 64  # entries of a dim of choices
_CASTS = ("to", "_to_copy", "type_as", "float", "long", "int", "clone", "contiguous", "detach", "alias")
_PUT = ("stack", "select_scatter")


def apart(graph: fx.Graph) -> None:
    """Rewrite what takes such values of a routing apart; what only they used is dead then."""
    if not any(name_of(node) in _PUT for node in graph.nodes):
        return
    parts = _Parts(graph, facts(graph))
    for node in list(graph.nodes):
        name = name_of(node)
        if name not in ("select", "sum") or not is_tensor(node) or not is_tensor(node.args[0]):
            continue
        source = operand(node, 0)
        rank = len(shape_of(source))
        given = argument(node, "dim")
        given = given[0] if isinstance(given, (list, tuple)) and len(given) == 1 else given
        if not isinstance(given, int) or not all(parts.found_in(source, given % rank)):
            continue
        dim, count = given % rank, shape_of(source)[given % rank]
        if name == "select":
            new = parts.part(source, dim, argument(node, "index") % count)
        elif argument(node, "keepdim") or argument(node, "dtype") is not None:
            continue
        else:
            each = [parts.part(source, dim, i) for i in range(int(count))]
            with graph.inserting_before(node):
                new = each[0]
                for other in each[1:]:
                    new = emit(graph, aten.add.Tensor, (new, other), like=node)
        node.replace_all_uses_with(new)


class _Parts:
    """Entries of values along a dim. `parts`: by (value, dim, number)."""

    def __init__(self, graph: fx.Graph, known: Mapping[fx.Node, Fact]):
        self.graph, self.known = graph, known
        self.parts: dict[tuple[fx.Node, int, int], fx.Node] = {}
        self.found: dict[tuple[fx.Node, int], tuple[bool, bool]] = {}

    def found_in(self, node: fx.Node, dim: int) -> tuple[bool, bool]:
        """Whether a value comes from one that was put together along this dim, and from choices along it."""
        key = node, dim
        if key not in self.found:
            size, fact = shape_of(node)[dim], self.known.get(node)
            put = name_of(node) in _PUT and self._dim(node) == dim
            choice = fact is not None and len(fact.dims) > dim and fact.dims[dim] == ("k",)
            if isinstance(size, int) and 1 < size <= _MOST:
                for source, at in self._sources(node, dim):
                    more = self.found_in(source, at)
                    put, choice = put or more[0], choice or more[1]
            self.found[key] = put, choice
        return self.found[key]

    def part(self, node: fx.Node, dim: int, number: int) -> fx.Node:
        """`node.select(dim, number)`."""
        key = node, dim, number
        if key not in self.parts:
            self.parts[key] = self._part(node, dim, number)
        return self.parts[key]

    @staticmethod
    def _dim(node: fx.Node) -> int | None:
        return dim_of(node, len(shape_of(node)), default=0)

    def _sources(self, node: fx.Node, dim: int) -> list[tuple[fx.Node, int]]:
        """The operands of which an entry of `node` along `dim` reads the same entry alone, each with its dim;
        none where it may read others."""
        name, rank = name_of(node), len(shape_of(node))
        source = nodes.operand_or_none(node, 0)
        if node.op != "call_function" or source is None:
            return []
        if name == "select_scatter":
            if self._dim(node) == dim:
                return [(source, dim)]
            return []
        own = shape_of(source) if is_tensor(source) else []
        if name in _CASTS:
            return [(source, dim)] if len(own) == rank else []
        if is_elementwise(node) and not _draws(node):
            return [
                (x, d)
                for x in nodes.operands(node)
                if (d := dim - rank + len(shape_of(x))) >= 0 and shape_of(x)[d] == shape_of(node)[dim]
            ]
        if name in TRANSPOSES:
            return [(source, swapped(node, name, rank)[dim])]
        if name == "unsqueeze":
            at = argument(node, "dim") % rank
            return [] if at == dim else [(source, dim - (dim > at))]
        if name in ("view", "reshape", "_unsafe_view"):
            same = own[: dim + 1] == shape_of(node)[: dim + 1]
            return [(source, dim)] if same else []
        if name == "one_hot":
            return [(source, dim)] if dim < rank - 1 else []
        if name in ("cumsum", "slice") and len(node.args) > 1:
            return [(source, dim)] if dim_of(node, rank, default=0) not in (None, dim) else []
        if name == "pad":
            pairs = argument(node, "pad")
            at = 2 * (rank - 1 - dim)
            return [(source, dim)] if tuple(pairs[at : at + 2]) in ((), (0, 0)) else []
        if name in ("sum", "any", "amax") and (over := _over(node, len(own))) is not None:
            kept = [d for d in range(len(own)) if d not in over or argument(node, "keepdim")]
            return [(source, kept[dim])] if kept[dim] not in over else []
        if name == "select":
            at = argument(node, "dim") % len(own)
            return [(source, dim + (dim >= at))]
        return []

    def _part(self, node: fx.Node, dim: int, number: int) -> fx.Node:
        name, rank = name_of(node), len(shape_of(node))
        if name == "stack" and self._dim(node) == dim:
            return nodes.argument(node, 0)[number]
        if name == "select_scatter" and self._dim(node) == dim:
            if argument(node, "index") % shape_of(node)[dim] == number:
                return operand(node, 1)
            return self.part(operand(node, 0), dim, number)
        sources = dict(self._sources(node, dim))
        if not sources:
            return self._emit(node, aten.select.int, (node, dim, number))
        if is_elementwise(node) and name not in _CASTS:
            return self._emit(node, function(node), *self._pointwise(node, dim, number))
        (source, at), args = next(iter(sources.items())), list(nodes.arguments(node))
        args[0] = self.part(source, at, number)
        target = function(node)
        without = lambda d, many: d % many - (d % many > at)
        if name in TRANSPOSES:
            order = swapped(node, name, rank)
            target, args = aten.permute.default, [args[0], [d - (d > at) for d in order if d != at]]
        elif name == "unsqueeze":
            args[1] = args[1] % rank - (args[1] % rank > dim)
        elif name in ("view", "reshape", "_unsafe_view"):
            sizes = list(args[1])
            args[1] = [*sizes[:dim], *sizes[dim + 1 :]]
        elif name in ("cumsum", "slice", "select"):
            kept = rank + (name == "select")
            args[1] = without(args[1] if len(args) > 1 else 0, kept)
        elif name == "pad":
            pairs = list(args[1])
            where = 2 * (rank - 1 - dim)
            args[1] = pairs[:where] + pairs[where + 2 :]
        elif name in ("sum", "any", "amax"):
            many = len(shape_of(source))
            over = sorted(without(d, many) for d in _over(node, many) or ())
            args[1] = over[0] if isinstance(args[1], int) else over
        return self._emit(node, target, tuple(args), dict(node.kwargs))

    def _pointwise(self, node: fx.Node, dim: int, number: int) -> tuple[tuple, dict]:
        rank, size = len(shape_of(node)), shape_of(node)[dim]

        def own(x: fx.Node) -> fx.Node:
            d = dim - rank + len(shape_of(x)) if is_tensor(x) else -1
            if d < 0:
                return x
            return self.part(x, d, number if shape_of(x)[d] == size else 0)

        return fx.map_arg(node.args, own), fx.map_arg(dict(node.kwargs), own)

    def _emit(self, node: fx.Node, target: Any, args: tuple, kwargs: dict | None = None) -> fx.Node:
        """Made where `node` is: whatever reads `node` may read it."""
        first = next(n for n in self.graph.nodes if n.op != "placeholder")
        given = node.op == "placeholder"
        with self.graph.inserting_before(first) if given else self.graph.inserting_after(node):
            return emit(self.graph, target, args, kwargs, like=node)


def _over(node: fx.Node, rank: int) -> Sequence[int] | None:
    given = argument(node, "dim")
    if given is None:
        return None
    return [d % rank for d in (given if isinstance(given, (list, tuple)) else [given])]


def _draws(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
