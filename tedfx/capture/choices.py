"""The choices of a mixture as ids [N, K] and weights [N, K], from the terms of its combine weights (terms:
slots.py).

The choices of all terms stand side by side: K is their sum. A weight is the product of a term's values, each
read at the token, its choice, and the expert that was chosen (a matrix over the experts is gathered by the
ids); bits among them are the keep flags: a dropped assignment has weight zero.

It is not sent either. A term is 0 where one of its guards is, so an assignment is kept if all of them are 1,
and the id of any other is E, no expert's: the rows of those stand behind all others in what `dispatch` gives
(its tail). Weights are read at the model's own ids.
"""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import torch
from torch import fx

from tedfx.capture.batched import refuse
from tedfx.capture.routing import Dims, Routing, product, shape_of
from tedfx.capture.rows import Dispatched
from tedfx.capture.slots import Bit, Slot, Term, Value
from tedfx.graph.emit import emit
from tedfx.graph.facts import SLOTS, VAL
from tedfx.placement.sizes import as_size
from tedfx.placement.slots import Slots

__all__ = ["Choices"]

aten = torch.ops.aten


class Choices:
    """`over`: labels of token dims that have experts of their own (labelled.py)."""

    def __init__(self, graph: fx.Graph, terms: tuple[Term, ...], like: fx.Node, over: tuple[str, ...] = ()):
        self.graph, self.terms, self.like, self.over = graph, terms, like, over
        self.ids = [self._flat(term.routing.node, term.routing.dims, term.routing) for term in terms]

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return emit(self.graph, target, args, kwargs, like=self.like)

    @property
    def count(self) -> int:
        """K."""
        return sum(term.routing.choices for term in self.terms)

    @property
    def _experts(self) -> int:
        sizes = self.terms[0].routing.sizes
        return int(product(sizes[label] for label in (*self.over, "e")))

    def dispatch(self, x: fx.Node, slots: Slots) -> tuple[Dispatched, bool]:
        """What it made of tokens [N, H], and whether there may be a tail."""
        sent, tail = self._sent()
        return self._dispatched(x, sent, slots, tail), tail

    def dispatch_each(self, x: fx.Node, slots: Slots | None) -> tuple[Dispatched, fx.Node, bool]:
        """The same of values of assignments [N * K, H]; and which are kept, [N * K, 1]. Slots that nobody is
        too late for are no limit: an expert gets the rows that it has."""
        sent, tail = self._sent()
        sent = self.emit(aten.reshape.default, sent, [-1, 1])
        kept = self.emit(aten.lt.Scalar, sent, self._experts)
        return self._dispatched(x, sent, slots if tail else None, tail), kept, tail

    def _sent(self) -> tuple[fx.Node, bool]:
        """The expert of each assignment [N, K], no expert's of those that are dropped; whether any may be."""
        experts = self._experts
        kept = [self._kept(term, ids) for term, ids in zip(self.terms, self.ids)]
        sent = [
            ids if keep is None else self.emit(aten.where.ScalarOther, keep, ids, experts)
            for keep, ids in zip(kept, map(self._numbered, self.terms))
        ]
        return self._side_by_side(sent), any(keep is not None for keep in kept)

    def _dispatched(self, x: fx.Node, sent: fx.Node, slots: Slots | None, tail: bool) -> Dispatched:
        out = self.emit(torch.ops.tedfx.dispatch.default, x, sent, self._experts, *(True,) * tail)
        if slots is not None:
            SLOTS[out] = slots
        return Dispatched(*(self.emit(operator.getitem, out, i) for i in range(3)))

    def _numbered(self, term: Term) -> fx.Node:
        """The ids [N, K] of a term among all experts."""
        routing, ids = term.routing, term.routing.node
        stride = routing.experts
        for label in reversed(self.over):
            if (label,) not in routing.dims:
                raise refuse("experts of groups of tokens that were flattened", self.like, "keep their dim")
            behind = len(routing.dims) - routing.dims.index((label,)) - 1
            first = self.emit(aten.arange.default, routing.sizes[label], device=VAL[ids].device)
            first = self.emit(aten.mul.Tensor, first, stride)
            first = self.emit(aten.reshape.default, first, [routing.sizes[label], *[1] * behind])
            ids, stride = self.emit(aten.add.Tensor, ids, first), stride * int(routing.sizes[label])
        return self._flat(ids, routing.dims, routing)

    def _kept(self, term: Term, ids: fx.Node) -> fx.Node | None:
        """Where all guards of a term are 1: truth values that broadcast to [N, K]; None for a term without
        any."""
        bits = [bit.value for bit in term.guards]
        bits.sort(key=lambda value: (value.node, value.inverted))  # in the order of the graph: a set has none
        bits += self._within(term)
        read = [self._read(value, term.routing, ids, torch.bool) for value in bits]
        return reduce(lambda a, b: self.emit(aten.logical_and.default, a, b), read) if read else None

    def weights(self, end: fx.Node) -> fx.Node:
        dtype = VAL[end].dtype
        return self._side_by_side([self._weight(term, ids, dtype) for term, ids in zip(self.terms, self.ids)])

    def _side_by_side(self, nodes: list[fx.Node]) -> fx.Node:
        return nodes[0] if len(nodes) == 1 else self.emit(aten.cat.default, nodes, 1)

    def _weight(self, term: Term, ids: fx.Node, dtype: torch.dtype) -> fx.Node:
        """[N, K] of one term."""
        total = None
        for value in (*term.values, *self._within(term)):
            read = self._read(value, term.routing, ids, dtype)
            total = read if total is None else self.emit(aten.mul.Tensor, total, read)
        if (
            total is None
            or not isinstance(VAL[total], torch.Tensor)
            or as_size(shape_of(total)[-1]) != as_size(shape_of(ids)[-1])
            or shape_of(total)[0] == 1
        ):
            ones = self.emit(aten.ones_like.default, ids, dtype=dtype)
            total = ones if total is None else self.emit(aten.mul.Tensor, ones, total)
        return total if VAL[total].dtype == dtype else self.emit(aten.to.dtype, total, dtype)

    def _within(self, term: Term) -> list[Value]:
        """A place beyond the last slot has none: the bit that says so, unless the term has it already."""
        slot = term.own_slot
        if not slot.open:
            return []
        limit, at = as_size(slot.size - slot.first), slot.place.node
        known = any(
            bit.queue == slot.queue and bit.limit is not None and as_size(bit.limit) == limit
            for bit in term.guards
            if isinstance(bit, Bit)
        )
        found: list[fx.Node] = []
        if not known:
            found.append(self.emit(aten.lt.Scalar, at, self._end(slot)))
        if slot.first < 0:
            found.append(self.emit(aten.ge.Scalar, at, slot.start))
        return [Value(node, slot.place.dims) for node in found]

    def _end(self, slot: Slot) -> fx.Node | int:
        """`start` + how many slots there are."""
        if isinstance(slot.size, int):
            return slot.start + slot.size
        count, plus = slot.count
        if count is None:
            raise refuse("how many slots an expert has is no number of the graph", self.like, "compute it")
        return self.emit(operator.add, count, plus + slot.start) if plus + slot.start else count

    def _read(self, value: Value, routing: Routing, ids: fx.Node, dtype: torch.dtype) -> fx.Node:
        """A value at (token, choice): [N, K], [N, 1] or [1, 1]."""
        node = value.node
        if not isinstance(node, fx.Node):
            return self.emit(aten.full.default, [1, 1], node, dtype=dtype, device=VAL[ids].device)
        if not VAL[node].dtype.is_floating_point:
            node = self.emit(aten.logical_not.default, node) if value.inverted else node
        if not VAL[node].dtype.is_floating_point or dtype == torch.bool:  # bits, as any of these
            node = node if VAL[node].dtype == dtype else self.emit(aten.to.dtype, node, dtype)
        labels = {x for dim in value.dims for x in dim}
        if not labels:
            return self.emit(aten.reshape.default, node, [1, 1])
        if labels == {"e"}:
            return self.emit(aten.index.Tensor, self.emit(aten.reshape.default, node, [-1]), [ids])
        flat = self._flat(node, value.dims, routing)
        if "e" not in labels:
            return flat
        if "k" not in labels:
            return self.emit(aten.gather.default, flat, 1, ids)
        picked = self.emit(aten.gather.default, flat, 1, self.emit(aten.reshape.default, ids, [-1, 1]))
        return self.emit(aten.reshape.default, picked, [-1, routing.choices])

    def _flat(self, node: fx.Node, dims: Dims, routing: Routing) -> fx.Node:
        """[N, K]; with a dim of experts [N, E], or [N * K, E] where there are choices too."""
        split: list[tuple[str, ...]] = []
        for dim in dims:
            rest = tuple(x for x in dim if x != "k")
            split += (
                [dim]
                if not rest or "k" not in dim
                else [("k",), rest]
                if dim[0] == "k"
                else [rest, ("k",)]
                if dim[-1] == "k"
                else [dim]
            )
        if split != list(dims):
            sizes = [product(routing.sizes[x] for x in dim) for dim in split]
            node = self.emit(aten.reshape.default, node, [s if isinstance(s, int) else -1 for s in sizes])
        order = sorted(
            range(len(split)),
            key=lambda d: (
                (
                    {"k": 1, "e": 2}.get(split[d][0], 0),
                    routing.tokens.index(split[d][0]) if split[d][0] in routing.tokens else 0,
                )
                if split[d]
                else (0, -1)
            ),
        )
        if tuple(x for d in order for x in split[d] if x in routing.tokens) != routing.tokens:
            raise refuse(
                "a weight that is not one number per token",
                self.like,
                "let a weight have all the tokens' dims, in their order",
            )
        if order != list(range(len(order))):
            node = self.emit(aten.permute.default, node, order)
        labels = [x for dim in split for x in dim]
        width = routing.experts if "e" in labels else routing.choices if "k" in labels else 1
        return (
            node
            if len(shape_of(node)) == 2 and shape_of(node)[1] == width
            else self.emit(aten.reshape.default, node, [-1, width])
        )
