"""A dispatch whose groups of tokens are whole on a rank: its rows stand in slots, and nothing about them is
data (`tedfx/ops/slots.py`)."""

from __future__ import annotations

from math import prod

from torch import fx

from tedfx import ops
from tedfx._torch import FloorDiv
from tedfx.analysis.sizes import Sizes
from tedfx.graph.emit import emit_typed
from tedfx.graph.facts import (
    DIFFERENTIABLE,
    DIMS_OF,
    RELATION,
    TYPE,
    TYPES_OF,
    VAL,
    copy_provenance,
    copy_value,
)
from tedfx.graph.nodes import argument, arguments, operand
from tedfx.passes.row_numbers import RowNumbers
from tedfx.placement.factors import leaves
from tedfx.placement.sizes import as_size
from tedfx.placement.slots import rows_per_expert
from tedfx.placement.types import Shard
from tedfx.stages.graphs import TypedGraph

_BODY = {
    "grouped": (ops.slot_linear, (0, 1, 3)),
    "expert_rows": (ops.slot_rows, (0, 2)),
}  # the operands that are left without counts


class SlotLayer:
    """One layer, from `dispatch` to `combine`.

    There: `route_slots`, `fill_slots`, `send_slots` over the axes that split the experts and tokens differ
    on. Where tokens are replicated on other axes and rows travel, ranks there are lanes, which send a share
    of every expert's slots each; `gather_slots` on those that shard the experts' own factors. The body's ops
    that tell experts apart take equally many rows of each. Back: the same in reverse, and `combine_slots`.
    """

    def __init__(self, program: TypedGraph, node: fx.Node, slots, sizes: Sizes):
        self.graph, self.node, mesh = program.graph_module.graph, node, program.roles.mesh
        x, ids, num_experts, *_ = arguments(node)
        rows_type, _, order_type = TYPES_OF[node]
        rows_dims, _, order_dims = DIMS_OF[node]
        experts = leaves(DIMS_OF[node][1][0])[0]
        split = program.plan.axes_of(experts)
        self.travel = any(isinstance(TYPE[x][a], Shard) for a in split)
        alike = tuple(
            a
            for a in program.plan.axes
            if isinstance(order_type[a], Shard) and not isinstance(TYPE[x][a], Shard)
        )
        owned, lanes = ((), alike) if self.travel else (alike, ())
        self.split = split if self.travel else ()
        self.gathered = tuple(a for a in lanes if not isinstance(rows_type[a], Shard))
        self.experts = num_experts // mesh.size(split)
        self.lane_type = {**rows_type, **{a: order_type[a] for a in self.gathered}}
        self._count(leaves(rows_dims[0])[0].root(), num_experts, slots, order_type, owned, lanes, mesh)

        with self.graph.inserting_before(node):
            self.order = self._make(
                ops.route_slots,
                ids,
                num_experts,
                sizes.node(slots),
                owned,
                lanes,
                dims=order_dims,
                type_=order_type,
                differentiable=False,
            )
            rows = self._make(
                ops.fill_slots, x, self.order, VAL[ids].shape[1], dims=rows_dims, type_=self.lane_type
            )
            numbers = RowNumbers.of(program, node, self.order, self._make)
            moved = numbers.move if numbers is not None else lambda *args, type_: None
            if self.travel:
                rows = self._make(
                    ops.send_slots, rows, self.split, self.experts, dims=rows_dims, type_=self.lane_type
                )
                moved(ops.send_slots, self.split, self.experts, type_=self.lane_type)
            if self.gathered:
                rows = self._make(
                    ops.gather_slots, rows, self.gathered, self.experts, dims=rows_dims, type_=rows_type
                )
                moved(ops.gather_slots, self.gathered, self.experts, type_=rows_type)
            if numbers is not None:
                numbers.arrive()
        self._body()
        for user in list(node.users):
            if argument(user, 1) != 1:
                new = {0: rows, 2: self.order}[argument(user, 1)]
                VAL[new] = VAL[user]
                user.replace_all_uses_with(new)
            self.graph.erase_node(user)
        self.graph.erase_node(node)

    @staticmethod
    def _count(rows, num_experts: int, slots, order_type, owned, lanes, mesh) -> None:
        """From here on the rows' factor has the size of the slots, and is ragged no more."""
        many = mesh.size(lanes)
        share = as_size(slots if many == 1 else FloorDiv(slots + many - 1, many))
        over = prod(mesh.size((a,)) for a, p in order_type.items() if isinstance(p, Shard))
        rows.ragged, rows.everywhere = False, as_size(share * (num_experts // mesh.size(owned)) * over)

    def _make(self, target, *args, dims, type_, differentiable=None) -> fx.Node:
        new = emit_typed(
            self.graph,
            target,
            *args,
            like=self.node,
            dims=dims,
            type_=type_,
            differentiable=DIFFERENTIABLE[self.node] if differentiable is None else differentiable,
        )
        VAL[new] = None
        return new

    def _body(self) -> None:
        for counts in [u for u in self.node.users if u.args[1:] == (1,)]:
            for user in list(counts.users):
                target, kept = _BODY[RELATION[user].kind]
                user.target, user.args = target, tuple(user.args[i] for i in kept if i < len(user.args))

    def combine(self, node: fx.Node) -> None:
        rows = operand(node, 0)

        def make(target, *args, type_):
            new = self.graph.call_function(target, args)
            copy_value(rows, new)
            copy_provenance(node, new)
            TYPE[new] = type_
            return new

        with self.graph.inserting_before(node):
            back = rows
            if self.gathered:
                (came,) = {TYPE[rows][a] for a in self.gathered}
                back = make(
                    ops.scatter_slots,
                    back,
                    self.gathered,
                    self.experts,
                    str(came),
                    type_={**TYPE[rows], **{a: self.lane_type[a] for a in self.gathered}},
                )
            if self.travel:
                back = make(ops.return_slots, back, self.split, self.experts, type_=TYPE[back])
        node.target, node.args = ops.combine_slots, (back, *node.args[1:])


def in_slots(program: TypedGraph, node: fx.Node, sizes: Sizes) -> SlotLayer | None:
    """The layer of a dispatch, lowered; None where its groups are not whole on a rank."""
    slots = rows_per_expert(node, sizes)
    return None if slots is None else SlotLayer(program, node, slots, sizes)
