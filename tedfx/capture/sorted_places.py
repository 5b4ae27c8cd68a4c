"""Places of assignments in runs that the model itself sorted by expert.

    sorted, order = ids.flatten().sort(stable=True)
    starts = counts.cumsum(0) - counts                 where each expert's run begins
    place = arange(N * K) - starts[sorted]

A stable sort keeps assignments in their order, so the place in a run is the number of those before it that
chose the same expert: `cumsum(one_hot(ids)) - 1` at the ids, in the order of the sort. A sort that is not
stable gives them other places: as good where nobody is dropped, and refused where somebody is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from tedfx.capture.routing import Fact, Routing, argument, name_of, shape_of
from tedfx.capture.slot_facts import slot_facts
from tedfx.capture.slot_runs import begins
from tedfx.capture.slots import Counts
from tedfx.capture.sorted_rows import sorted_facts
from tedfx.graph import nodes
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import is_tensor, operand, operand_or_none

__all__ = ["Orders"]

aten = torch.ops.aten


class Orders:
    """`orders`: of each order of assignments by expert the ids that were sorted; `stable`: those that keep
    them in their order."""

    def __init__(self, graph: fx.Graph, known: Mapping[fx.Node, Fact]):
        self.known, self.counts = known, slot_facts(graph, known)
        self.orders: dict[fx.Node, fx.Node] = {}
        self.stable: set[fx.Node] = set()
        for node, fact in sorted_facts(graph, known).items():
            sort = operand(node, 0) if name_of(node) == "getitem" else node
            if fact.kind == "order" and name_of(sort) in ("sort", "argsort"):
                self.orders[node] = operand(sort, 0)
                self.stable |= {node} if argument(sort, "stable") else set()

    def sorted_ids(self, node: fx.Node) -> fx.Node | None:
        """The order of the ids that a sort gives beside it."""
        sort = operand_or_none(node, 0)
        if name_of(node) != "getitem" or name_of(sort) != "sort" or nodes.argument(node, 1) != 0:
            return None
        return next((order for order in self.orders if order.args[:1] == (sort,)), None)

    def places(self, node: fx.Node, pick: Callable[[fx.Node], Any]) -> fx.Node | None:
        """The order in which `node` has the places of all assignments."""
        if name_of(node) != "sub" or argument(node, "alpha") != 1 or not all(map(is_tensor, node.args[:2])):
            return None
        numbers, taken = operand(node, 0), pick(operand(node, 1))
        if name_of(numbers) != "arange" or len(numbers.args) != 1 or taken is None or taken.mask is not None:
            return None
        ids = self.orders.get(taken.order)
        starts = taken.value if name_of(taken.value) == "index" else None
        if ids is None or starts is None or list(nodes.argument(starts, 1)) != [ids]:
            return None
        run = self._starts(operand(starts, 0))
        routing = self.known[ids].routing
        return taken.order if run is routing and shape_of(numbers) == shape_of(ids) else None

    def _starts(self, node: fx.Node) -> Routing | None:
        """The routing of whose experts' runs these are the starts."""
        counts = self.counts.get(node)
        if isinstance(counts, Counts):
            return counts.routing if begins(counts) == ("own",) else None
        if name_of(node) != "searchsorted" or argument(node, "right") or argument(node, "side") == "right":
            return None
        order, numbers = self.sorted_ids(operand(node, 0)), operand(node, 1)  # the first of each expert
        routing = None if order is None else self.known[self.orders[order]].routing
        all_of_them = name_of(numbers) == "arange" and len(numbers.args) == 1
        return routing if routing and all_of_them and shape_of(numbers) == [routing.experts] else None

    def make_places(self, ids: fx.Node, make: Callable[..., fx.Node], like: fx.Node) -> fx.Node:
        """The places of the assignments in their own order."""
        hits = make(aten.one_hot.default, ids, self.known[ids].routing.experts, like=like)
        place = make(aten.sub.Tensor, make(aten.cumsum.default, hits, 0, like=like), 1, like=like)
        column = make(aten.unsqueeze.default, ids, 1, like=like)
        place = make(aten.squeeze.dim, make(aten.gather.default, place, 1, column, like=like), 1, like=like)
        dtype = VAL[like].dtype
        return place if VAL[place].dtype == dtype else make(aten.to.dtype, place, dtype, like=like)
