"""The canonical MoE ops become the rows that one rank handles and the exchanges between ranks."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tedfx import ops
from tedfx.analysis.sizes import Sizes
from tedfx.graph.emit import insert
from tedfx.graph.facts import (
    DIFFERENTIABLE,
    DIMS,
    DIMS_OF,
    RELATION,
    TYPE,
    TYPES_OF,
    VAL,
    copy_provenance,
    copy_value,
    set_value,
)
from tedfx.graph.nodes import argument, arguments, operand
from tedfx.passes.base import Pass, PassResult
from tedfx.passes.lower_slots import SlotLayer, in_slots
from tedfx.passes.row_numbers import RowNumbers
from tedfx.placement.factors import leaves
from tedfx.placement.types import I, P, R, Shard
from tedfx.stages.graphs import TypedGraph


@dataclass
class _Layer:
    """What the way back needs of the way there."""

    dispatch: fx.Node
    order: fx.Node
    exchange: tuple[str, ...] = ()
    lanes: tuple[str, ...] = ()
    stripes: tuple[str, ...] = ()
    totals: fx.Node | None = None
    send: fx.Node | None = None
    recv: fx.Node | None = None
    index: fx.Node | None = None


@dataclass(frozen=True)
class LowerExperts(Pass[TypedGraph]):
    """Each `dispatch` and its way back, by the type of its tokens on each axis that splits the experts.

    1. Tokens that differ there travel: `exchange_counts` (one all-gather, one host copy), `all_to_all_single`
       there and back, rows regrouped by expert.
    2. Tokens replicated there stay: each rank keeps the assignments of its own experts, and the combined
       output is a partial sum (PPMoE).
    3. Both (folding): the replicated tokens are cut into lanes, and rows travel over all expert axes
       together.
    4. Sliced tokens whose rows the type says are R on arrival (an axis that shards the experts' own factors):
       the lanes are gathered after the all-to-all, and scattered, which sums them, before the way back
       (`tedfx/ops/lanes.py`).
    5. DeepSpeed-TED's own order, where the collective algebra does not let slices and gathers pass dispatch
       and combine: rows are cut after the dispatch and gathered before the combine, and no type outside of
       the exchange shows it.

    Assignments that a capacity dropped, that an expert did not choose, or that are of experts of another
    structure, stand behind all others (the tail of the dispatch). It is cut off, so that no expert meets it.
    Where rows travel, or a rank keeps those of its experts, how many rows are left is known on the host
    anyway; where neither is the case it costs a host copy.

    Where a dropout draws for each row, the rows' numbers travel beside them (`passes/row_numbers.py`).

    Where a capacity counts among the tokens of one rank, rows stand in slots and none of this is needed:
    `passes/lower_slots.py`.

    The expert body between dispatch and combine is not touched: its weights are already split by their types.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"local_experts"})

    def __call__(self, program: TypedGraph) -> PassResult:
        graph, result = program.graph_module.graph, PassResult()
        layers: dict[fx.Node, _Layer | SlotLayer] = {}
        sizes = Sizes(program)
        for node in list(graph.nodes):
            if node.op != "call_function" or node not in RELATION:
                continue
            kind, sizes.current = RELATION[node].kind, node
            if kind == "dispatch" and (slotted := in_slots(program, node, sizes)) is not None:
                layers[slotted.order] = slotted
                result.matches += 1
                result.changes += slotted.travel
            elif kind == "dispatch":
                layer = self._dispatch(program, graph, node)
                layers[layer.order] = layer
                result.matches += 1
                result.changes += bool(layer.exchange)
            elif kind == "combine":
                there = layers[operand(node, 1)]
                if isinstance(there, SlotLayer):
                    there.combine(node)
                else:
                    self._combine(graph, node, there)
        numbers = {
            made[0] for made in program.row_numbers.values()
        }  # `passes/localize.py` gives them to the dropouts
        graph.eliminate_dead_code(lambda node: node in numbers or node.is_impure())
        return result

    def _dispatch(self, program: TypedGraph, graph: fx.Graph, node: fx.Node) -> _Layer:
        x, ids, num_experts, *tail = arguments(node)
        experts = leaves(DIMS_OF[node][1][0])[0]
        split = program.plan.axes_of(experts)
        travel = tuple(a for a in split if isinstance(TYPE[x][a], Shard))
        stay = tuple(a for a in split if a not in travel)
        rows_type, counts_type, order_type = TYPES_OF[node]
        rows_dims, counts_dims, order_dims = DIMS_OF[node]
        lanes = tuple(
            a
            for a in program.plan.axes
            if a not in split and isinstance(order_type[a], Shard) and not isinstance(rows_type[a], Shard)
        )
        stripes = tuple(
            a
            for a in program.plan.dedup
            if travel
            and not any(tail)
            and a not in split
            and a not in lanes
            and not isinstance(rows_type[a], Shard)
        )
        rows_factor = leaves(rows_dims[0])[0]
        striped = {a: Shard(rows_factor) for a in stripes}
        lanes, unsliced = (
            tuple(a for a in program.plan.axes if a in lanes or a in stripes),
            {**rows_type, **{a: order_type[a] for a in lanes}},
        )
        lane_type = {**unsliced, **striped}

        def make(target, *args, dims=None, type_=None, **kwargs):
            new = insert(graph, target, *args, like=node, **kwargs)
            if dims is not None:
                assert type_ is not None, target  # of a value both are said
                set_value(new, dims, type_, dims is rows_dims and DIFFERENTIABLE[node])
            return new

        with graph.inserting_before(node):
            routed = make(
                ops.route,
                ids,
                num_experts,
                owned=stay if not travel else (),
                lanes=stay if travel else (),
                **({"stripes": stripes} if stripes else {}),
                **({"tail": True} if any(tail) and not split else {}),
            )
            order = make(operator.getitem, routed, 0, dims=order_dims, type_=order_type)
            counts = make(operator.getitem, routed, 1)

            def permuted():
                made = make(ops.permute_rows, x, order, VAL[ids].shape[1], dims=rows_dims, type_=unsliced)
                return (
                    make(
                        ops.shard,
                        made,
                        stripes,
                        0,
                        1,
                        *{str(rows_type[a]) for a in stripes},
                        dims=rows_dims,
                        type_=lane_type,
                    )
                    if stripes
                    else made
                )

            rows = permuted()
            layer = _Layer(node, order, stripes=stripes)
            if travel:
                layer.exchange, layer.lanes = split, lanes
                exchanged = (
                    make(ops.exchange_lanes, counts, (*lanes, *split), split)
                    if lanes
                    else make(ops.exchange_counts, counts, split)
                )
                items = [make(operator.getitem, exchanged, i) for i in range(4 if lanes else 3)]
                layer.send, layer.recv, received = items[0], items[1], items[-1]
                counts = make(operator.getitem, exchanged, len(items), dims=counts_dims, type_=counts_type)
                if any(tail):
                    layer.order = order = make(
                        ops.cut_tail, order, layer.send, dims=order_dims, type_=order_type
                    )
                    rows = permuted()
            numbers = RowNumbers.of(program, node, order, make)
            moved = numbers.move if numbers is not None else lambda *args, type_: None
            if travel:
                if stripes:
                    moved(ops.shard, stripes, 0, 1, "I", type_=lane_type)
                moved(ops.all_to_all_single, layer.recv, layer.send, split, type_=lane_type)
                rows = make(
                    ops.all_to_all_single,
                    rows,
                    layer.recv,
                    layer.send,
                    split,
                    dims=rows_dims,
                    type_=lane_type,
                )
                if lanes:
                    layer.totals = items[2]
                    (arrived,) = {str(rows_type[a]) for a in lanes}
                    rows = make(
                        ops.gather_lanes, rows, lanes, layer.totals, arrived, dims=rows_dims, type_=rows_type
                    )
                    layer.index = make(ops.lane_index, received, layer.totals)
                    rows = make(ops.pick_rows, rows, layer.index, dims=rows_dims, type_=rows_type)
                    moved(ops.gather_lanes, lanes, layer.totals, "I", type_=rows_type)
                    moved(ops.pick_rows, layer.index, type_=rows_type)
                else:
                    layer.index = make(ops.expert_major, received, layer.recv)
                    rows = make(ops.index_rows, rows, layer.index, dims=rows_dims, type_=rows_type)
                    moved(ops.index_rows, layer.index, type_=rows_type)
            elif stay:
                counts = make(ops.local_counts, counts, stay, dims=counts_dims, type_=counts_type)
            if numbers is not None:
                numbers.arrive()
            for new in (rows, counts, order):
                VAL.setdefault(new, None)
        if any(tail):
            _without_tail(node)
        for user in list(node.users):
            new = (rows, counts, order)[argument(user, 1)]
            user.replace_all_uses_with(new)
            VAL[new] = VAL[user]
            graph.erase_node(user)
        graph.erase_node(node)
        return layer

    def _combine(self, graph: fx.Graph, node: fx.Node, layer: _Layer) -> None:
        rows = operand(node, 0)
        if layer.exchange:

            def make(target, *args, type_=TYPE[rows]):
                new = graph.call_function(target, args)
                copy_value(rows, new)
                TYPE[new] = type_
                return new

            with graph.inserting_before(node):
                if layer.lanes:
                    (came,) = {TYPE[rows][a] for a in layer.lanes}
                    assert came in (P, R, I), (node, came)
                    row_factor = leaves(DIMS[rows][0])[0]
                    own = {**TYPE[rows], **{a: Shard(row_factor) for a in layer.lanes}}
                    back = make(ops.spread_lanes, rows, layer.index, layer.totals)
                    back = make(ops.scatter_lanes, back, layer.lanes, layer.totals, str(came), type_=own)
                else:
                    own, back = TYPE[rows], make(ops.unindex_rows, rows, layer.index)
                back = make(ops.all_to_all_single, back, layer.send, layer.recv, layer.exchange, type_=own)
                if layer.stripes:
                    whole = graph.call_function(torch.ops.aten.sym_size.int, (layer.order, 0))
                    back = make(
                        ops.all_gather,
                        back,
                        layer.stripes,
                        0,
                        1,
                        str(came),
                        whole,
                        type_={**own, **{a: TYPE[rows][a] for a in layer.stripes}},
                    )
            copy_provenance(node, back)
            node.replace_input_with(rows, back)


def _without_tail(dispatch: fx.Node) -> None:
    """What reads the counts of a dispatch whose tail is cut off has no tail to pass over."""
    for counts in [u for u in dispatch.users if u.args[1:] == (1,)]:
        for user in list(counts.users):
            kind = RELATION[user].kind
            if kind in ("grouped", "expert_rows"):
                user.args = user.args[: 4 if kind == "grouped" else 3]
