"""Values of some assignments, or of all in another order: `v[keep]`, `v[order]`.

| the model writes | what it is |
|---|---|
| `v[keep]`, `v[keep.nonzero().squeeze(-1)]`, `v[where(keep)]` | v, picked |
| `token, choice = where(keep)` | numbers of tokens and of choices, picked |
| `order = ids.flatten().argsort(stable=True)` | numbers of assignments, sorted by expert |
| `v[order]`, the values that a sort of ids gives | v, sorted |
| `v[number]` of picked or sorted numbers | v at the numbers, picked or sorted |
| `arange(N * K) - starts[sorted]`, `starts` of the experts' runs | places, sorted (sorted_places.py) |
| elementwise operators and trailing dims of size 1 of such values | the same of the values themselves |

So what is computed of picked and sorted values can be computed of all assignments in their own order instead,
and is right where the mask is 1. Sums and whatever else mixes rows have no such value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import fx

from tedfx.capture.indices import CASTS, index_of
from tedfx.capture.routing import argument, name_of, shape_of, whole_quotient
from tedfx.capture.sorted_places import Orders
from tedfx.graph import nodes
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import REGROUPS, is_tensor, operand, operand_or_none

__all__ = ["Pick", "Picks"]

aten = torch.ops.aten
_EACH = frozenset(
    "mul add sub lt le gt ge eq ne logical_and bitwise_and __and__ logical_not bitwise_not where masked_fill "
    "clamp clamp_max clamp_min".split()
)


@dataclass(frozen=True)
class Pick:
    """`value` in the order `order` of assignments (None: its own), of which those are left where `mask`, in
    its own order, is 1 (None: all). The leading dims of the value are those of the mask."""

    value: fx.Node
    mask: fx.Node | None = None
    order: fx.Node | None = None

    @property
    def by(self) -> tuple[fx.Node | None, fx.Node | None]:
        return self.mask, self.order


class Picks:
    def __init__(self, emit: Callable[..., fx.Node], orders: Orders):
        """`emit(target, *args, like=, **kwargs)` inserts a node before the one that is looked at."""
        self.emit, self.orders = emit, orders
        self.made: dict[fx.Node, Pick | None] = {}

    def of(self, node: fx.Node) -> Pick | None:
        if node not in self.made:
            self.made[node] = self._of(node)
        return self.made[node]

    def _of(self, node: fx.Node) -> Pick | None:
        if not is_tensor(node) or node.op != "call_function":
            return None
        name, found, search = name_of(node), index_of(node), _search(node)
        if node in self.orders.orders:
            return Pick(self._count(self.orders.orders[node], node), order=node)
        if (order := self.orders.sorted_ids(node)) is not None:
            return Pick(self.orders.orders[order], order=order)
        if search is not None:
            return self._numbers(node, *search)
        if found is not None:
            return self._taken(node, *found)
        if name == "masked_select":
            return self._masked(node, operand(node, 0), operand(node, 1))
        order = self.orders.places(node, self.of)
        if order is not None:
            ids = self.orders.orders[order]
            return Pick(self.orders.make_places(ids, self.emit, node), order=order)
        whole = whole_quotient(node) is not None and not VAL[node].is_floating_point()
        if name in CASTS or name in ("unsqueeze", *REGROUPS) or name in _EACH or whole:
            return self._computed(node, name)
        return None

    def _taken(self, node: fx.Node, source: fx.Node, indices: list) -> Pick | None:
        if len(indices) == 1 and VAL[indices[0]].dtype == torch.bool:
            return self._masked(node, source, indices[0])
        searches = [s for index in indices if (s := _search(index)) is not None]
        if len(indices) > 1 and len(searches) == len(indices):
            (mask, *others), dims = [s[0] for s in searches], [s[1] for s in searches]
            whole = dims == list(range(len(shape_of(mask))))
            return self._masked(node, source, mask) if whole and others == [mask] * len(others) else None
        number = self.of(indices[0]) if len(indices) == 1 else None
        if number is None or self.of(source) is not None:
            return None
        all_of_them = name_of(number.value) == "arange" and shape_of(number.value) == shape_of(source)[:1]
        made = (
            source
            if all_of_them
            else self.emit(aten.index.Tensor, source, [self._within(number, node)], like=node)
        )
        return replace(number, value=made)

    def _within(self, number: Pick, node: fx.Node) -> fx.Node:
        """The numbers; where they are not picked they may be out of range, if not of tokens or experts."""
        known, value = self.orders.known.get(number.value), number.value
        while name_of(value) in ("expand", "unsqueeze", "repeat_interleave", *REGROUPS) or whole_quotient(
            value
        ):
            value = operand(value, 0)
        if number.mask is None or name_of(value) == "arange" or (known is not None and known.kind == "ids"):
            return number.value
        return self.emit(aten.where.ScalarOther, number.mask, number.value, 0, like=node)

    def _masked(self, node: fx.Node, source: fx.Node, mask: fx.Node) -> Pick | None:
        """`source[mask]`, both in one order."""
        value, bits = self.of(source), self.of(mask)
        lead = shape_of(mask)
        if shape_of(source)[: len(lead)] != lead:
            return None
        if value is None and bits is None:
            return Pick(source, mask)
        if value is None or bits is None or value.by != bits.by or value.mask is not None:
            return None
        return Pick(value.value, bits.value, value.order)

    def _count(self, ids: fx.Node, like: fx.Node) -> fx.Node:
        size = self.emit(aten.sym_size.int, ids, 0, like=like)
        return self.emit(aten.arange.default, size, device=VAL[ids].device, like=like)

    def _numbers(self, node: fx.Node, mask: fx.Node, dim: int) -> Pick | None:
        """What a search found: numbers along a dim of the mask."""
        if self.of(mask) is not None or VAL[mask].dtype != torch.bool:
            return None
        rank = len(shape_of(mask))
        sizes = [self.emit(aten.sym_size.int, mask, d, like=node) for d in range(rank)]
        made = self.emit(aten.arange.default, sizes[dim], device=VAL[mask].device, like=node)
        for at in range(rank):
            if at != dim:
                made = self.emit(aten.unsqueeze.default, made, at, like=node)
        return Pick(self.emit(aten.expand.default, made, sizes, like=node) if rank > 1 else made, mask)

    def _computed(self, node: fx.Node, name: str) -> Pick | None:
        picks = {x: pick for x in node.all_input_nodes if is_tensor(x) and (pick := self.of(x)) is not None}
        if not picks or len({pick.by for pick in picks.values()}) != 1:
            return None
        if any(is_tensor(x) and x not in picks and shape_of(x) for x in node.all_input_nodes):
            return None
        pick, source = next(iter(picks.values())), operand(node, 0)
        if name in ("unsqueeze", *REGROUPS):
            before, after = shape_of(source), shape_of(node)
            if after[: len(before)] != before or any(size != 1 for size in after[len(before) :]):
                return None  # more than dims of size 1 behind all others
            value = picks[source].value
            for _ in after[len(before) :]:
                value = self.emit(aten.unsqueeze.default, value, -1, like=node)
            return replace(pick, value=value)
        if len({len(shape_of(x)) for x in picks}) > 1:
            return None  # rows of one broadcast against features of the other
        swap = lambda x: self._factor(picks[x], node, name) if x in picks else x
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), swap)
        return replace(pick, value=self.emit(node.target, *args, like=node, **kwargs))

    def _factor(self, pick: Pick, node: fx.Node, name: str) -> fx.Node:
        """The value of an operand. A factor of rows may be anything where it is not picked, infinite too."""
        value, rank = pick.value, len(shape_of(pick.value))
        if name != "mul" or pick.mask is None or not VAL[value].is_floating_point():
            return value
        if any(size != 1 for size in shape_of(value)[len(shape_of(pick.mask)) :]):
            return value
        mask = pick.mask
        while len(shape_of(mask)) < rank:
            mask = self.emit(aten.unsqueeze.default, mask, -1, like=node)
        return self.emit(aten.where.ScalarOther, mask, value, 0, like=node)


def _search(index: fx.Node) -> tuple[fx.Node, int] | None:
    """(the mask, along which of its dims) of numbers that a search found."""
    while name_of(index) in (*REGROUPS, "clone", "contiguous") and len(shape_of(index)) == 1:
        before = operand(index, 0)
        if len(shape_of(before)) == 2 and name_of(before) == "nonzero" and shape_of(before)[1] == 1:
            return operand(before, 0), 0
        index = before
    source = operand_or_none(index, 0)
    if source is None:
        return None
    if name_of(index) == "getitem" and name_of(source) in ("where", "nonzero_numpy"):
        return (operand(source, 0), nodes.argument(index, 1)) if len(source.args) == 1 else None
    if name_of(index) == "select" and name_of(source) == "nonzero" and argument(index, "dim") in (1, -1):
        return operand(source, 0), argument(index, "index") % shape_of(source)[1]
    return None
