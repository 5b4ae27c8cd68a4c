"""Rows that were read for some assignments, or for all in another order, on their way back to the tokens.

    out.index_add_(0, token[keep], done[address[keep]] * weight[keep].unsqueeze(-1))

What is made of them on the way is made of the rows of all assignments (picks.py), zero where they were not
picked; where they are put back, those take their place.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tedfx.capture.by_assignment import natural
from tedfx.capture.chains import is_zero
from tedfx.capture.indices import CASTS, Numbers, rows_of
from tedfx.capture.picks import Pick, Picks
from tedfx.capture.read_back import SHAPES
from tedfx.capture.routing import argument, name_of, shape_of
from tedfx.capture.scattered import Read, refuse
from tedfx.graph import nodes
from tedfx.graph.emit import emit
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import REGROUPS, is_tensor, operand

__all__ = ["PutBack"]

aten = torch.ops.aten


class PutBack:
    """What is made of rows that were read for picked assignments, and where it is put back."""

    def __init__(self, graph: fx.Graph, picks: Picks, read: Read, reads: Collection[fx.Node]):
        """`reads`: all nodes that read picked rows, which are zero where they were not picked."""
        self.graph, self.picks, self.read, self.reads = graph, picks, read, reads
        self.like = read.node

    def make(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return emit(self.graph, target, args, kwargs, like=self.like)

    def run(self) -> None:
        todo, seen = [self.read.node], set()
        while todo:
            node = todo.pop()
            for user in list(node.users):
                if user in seen or not is_tensor(user) or name_of(user) in SHAPES:
                    continue
                seen.add(user)
                self.like = user
                with self.graph.inserting_before(user):
                    made = self._placed(user, node)
                    if made is not None:
                        user.replace_all_uses_with(made)
                    elif self.picks.of(user) is not None:
                        todo.append(user)
                    else:
                        raise refuse(
                            f"rows that a mask picked are read by {user.target}",
                            user,
                            "weigh them, and add them at their tokens: out.index_add_(0, token[keep], rows)",
                        )

    def _placed(self, node: fx.Node, value: fx.Node) -> fx.Node | None:
        name, make, adds = name_of(node), self.make, True
        if name == "index_put" and operand(node, 2) is value:
            indices, adds = list(nodes.argument(node, 1)), bool(argument(node, "accumulate"))
        elif name in ("index_copy", "index_add") and operand(node, 3) is value and argument(node, "dim") == 0:
            indices, adds = [operand(node, 2)], name == "index_add"
            if name == "index_add" and argument(node, "alpha") != 1:
                return None
        elif name == "scatter_add" and operand(node, 3) is value and argument(node, "dim") == 0:
            if shape_of(operand(node, 2)) != shape_of(value):
                return None
            column = rows_of(operand(node, 2))
            if column is None:
                return None
            indices = [column]
        else:
            return None
        pick, base = self.picks.of(value), operand(node, 0)
        if pick is None or any(not is_tensor(x) for x in indices):
            return None
        if pick.mask is not None and not self._vanishes(value):
            mask = make(aten.unsqueeze.default, pick.mask, -1)
            pick = replace(pick, value=make(aten.where.ScalarOther, mask, pick.value, 0))
        dims, routing = self.read.spot.dims, self.read.spot.routing
        if self._at_assignments(indices, pick):
            if shape_of(pick.value) != shape_of(base):
                return None
            if is_zero(base) or (pick.mask is None and not adds):
                return pick.value
            if adds:
                return make(aten.add.Tensor, base, pick.value)
            mask = make(aten.unsqueeze.default, pick.mask, -1)
            return make(aten.where.self, mask, pick.value, base)
        numbers = self.picks.of(indices[0]) if len(indices) == 1 else None
        if numbers is None or numbers.by != pick.by:
            return None
        if Numbers(routing).dims(numbers.value) != dims or not (adds or routing.choices == 1):
            return None
        wrong = refuse("rows that are added are no rows of features", node, "add rows of features")
        rows = make(aten.sum.dim_IntList, natural(pick.value, dims, routing, make, wrong), [1])
        if is_zero(base):
            return rows
        return make(aten.add.Tensor, base, rows) if adds else None

    def _vanishes(self, node: fx.Node) -> bool:
        """Whether the rows of all assignments are zero where they were not picked."""
        name, sources = name_of(node), [x for x in node.all_input_nodes if is_tensor(x)]
        if node in self.reads:
            return True
        if name in ("mul", *CASTS, "unsqueeze", *REGROUPS):
            return any(self._vanishes(x) for x in sources)
        return name in ("add", "sub") and len(sources) == 2 and all(self._vanishes(x) for x in sources)

    def _at_assignments(self, indices: list, pick: Pick) -> bool:
        """Whether rows are put at their own assignments: `out[keep] = rows`, `out[order[keep]] = rows`."""
        if [VAL[x].dtype for x in indices] == [torch.bool]:
            (mask,) = indices
            return pick.order is None and mask is pick.mask
        number = self.picks.of(indices[0]) if len(indices) == len(self.read.spot.dims) == 1 else None
        if number is None or number.by != pick.by:
            return False
        return name_of(number.value) == "arange" and shape_of(number.value) == shape_of(pick.value)[:1]
