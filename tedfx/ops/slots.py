"""Rows in slots: where a capacity bounds how many rows an expert gets, the layout is known before any token
is routed.

Where the tokens among which a capacity counts are all on one rank, an expert gets `slots` rows of them at
most. Each expert then has that many rows, some token in the empty ones; the all-to-all has equal splits,
every expert computes on the same number of rows, no counts are exchanged and the host copies nothing:

    order = route_slots(ids, num_experts, slots)              which assignment stands in each slot
    rows = send_slots(fill_slots(x, order, top_k), axes, experts)   to their ranks, by expert, source
    rows = slot_linear(rows, weight)                          one batched matmul
    ...
    out = combine_slots(return_slots(rows, axes, experts), order, weights)

Ranks that hold the same tokens (lanes) send a share of every expert's slots each (DeepSpeed-TED slices the
capacity as well, arXiv 2303.06318): slots have no order that matters, so a share is a run of them.
`gather_slots` puts the lanes together where tensor-parallel experts need all rows, `scatter_slots` takes them
apart again; both are conversions of `tedfx/ops/convert.py` on the dim of slots. A share is rounded up, so
that lanes are equal.

An empty slot is one whose assignment is number N * K. A token that was dispatched stands in it, and not
zeros: an expert may divide by what it makes of those. What it gives reaches no token, and nothing flows back
from it. `experts` is the number of experts whose rows a rank
computes.
"""

import torch
from torch import Tensor

from tedfx import _torch
from tedfx.ops import context, convert
from tedfx.ops.context import Axes
from tedfx.ops.experts import combine, sort_by_expert, sum_choices
from tedfx.ops.moe import _exchange
from tedfx.ops.properties import ALL_GATHER, ALL_TO_ALL, REDUCE_SCATTER, Moves, op

__all__ = [
    "combine_slots",
    "fill_slots",
    "gather_slots",
    "return_slots",
    "route_slots",
    "scatter_slots",
    "send_slots",
    "slot_linear",
    "slot_rows",
]


@op(saves=(), decides=True)
def route_slots(ids: Tensor, num_experts: int, slots: int, owned: Axes = (), lanes: Axes = ()) -> Tensor:
    """ids[N,K] -> order[E * share]: for each expert the assignments in its slots, in the order of the tokens;
    N * K in an empty one.

    Ids of num_experts are of assignments that were dropped. `owned`: only the experts of this coordinate.
    `lanes`: only this coordinate's share of each expert's slots. An expert with more assignments than slots
    trips a device-side assertion.
    """
    context.note("route")
    lane, split = context.span(lanes), context.span(owned)
    if num_experts % split.size != 0:
        raise ValueError(f"{num_experts} experts do not divide over {split.size} ranks of axes {split.axes}")
    order, counts = sort_by_expert(ids.reshape(-1), num_experts)
    _torch.assert_async((counts <= slots).all(), "route_slots: an expert has more tokens than slots")
    share = (slots + lane.size - 1) // lane.size
    place = torch.arange(share, device=ids.device) + share * lane.index
    stood = (counts.cumsum(0) - counts).unsqueeze(1) + place
    stood = torch.where(place < counts.unsqueeze(1), stood, order.shape[0])
    local = num_experts // split.size
    stood = stood.narrow(0, split.index * local, local).reshape(-1)
    return torch.cat([order, order.new_full((1,), order.shape[0])]).index_select(0, stood)


@op(saves=(1,))
def fill_slots(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """x[N,H], order[M] -> rows[M,H]: the token of the assignment in each slot; in an empty one the first
    token that has a slot (any where none has one, zeros where there is no token)."""
    return _Fill.apply(x, order, top_k)


@op(forward=Moves(ALL_TO_ALL, "in"), backward=Moves(ALL_TO_ALL, "in"), saves=())
def send_slots(rows: Tensor, axes: Axes, experts: int) -> Tensor:
    """rows[E * share,..] of all experts -> [experts * G * share,..] of this coordinate's, from all: sorted by
    expert, then source."""
    span = context.span(axes)
    return rows if span.size == 1 else _Slots.apply(rows, span, experts, True)


@op(forward=Moves(ALL_TO_ALL, "in"), backward=Moves(ALL_TO_ALL, "in"), saves=())
def return_slots(rows: Tensor, axes: Axes, experts: int) -> Tensor:
    """The inverse of `send_slots`, and its adjoint."""
    span = context.span(axes)
    return rows if span.size == 1 else _Slots.apply(rows, span, experts, False)


@op(forward=Moves(ALL_GATHER, "in"), backward=Moves(REDUCE_SCATTER, "out"), saves=())
def gather_slots(rows: Tensor, axes: Axes, experts: int) -> Tensor:
    """S -> R on the slots: rows[experts * share,..] of each lane -> [experts * T * share,..]."""
    return convert.all_gather(_by_expert(rows, experts), axes, 1).flatten(0, 1)


@op(
    forward=Moves(REDUCE_SCATTER, "in", {"source": ("P",)}),
    backward=Moves(ALL_GATHER, "out", {"source": ("P", "I")}),
    saves=(),
)
def scatter_slots(rows: Tensor, axes: Axes, experts: int, source: str = "P") -> Tensor:
    """To this lane's share of the slots. source="P": summed over the ranks (reduce-scatter); "R", "I": a
    slice."""
    whole = _by_expert(rows, experts)
    return (
        convert.reduce_scatter(whole, axes, 1)
        if source == "P"
        else convert.shard(whole, axes, 1, source=source)
    ).flatten(0, 1)


@op(saves="operands")
def slot_linear(rows: Tensor, weight: Tensor, transposed: bool = False) -> Tensor:
    """`grouped_linear` where all experts have equally many rows: one batched matmul."""
    right = weight if transposed else weight.mT
    return torch.bmm(_by_expert(rows, weight.shape[0]), right).flatten(0, 1)


@op(saves=())
def slot_rows(param: Tensor, rows: Tensor) -> Tensor:
    """`expert_rows` where all experts have equally many rows."""
    experts = param.shape[0]
    return param.unsqueeze(1).expand(experts, rows.shape[0] // experts, *param.shape[1:]).flatten(0, 1)


@op(saves="operands")
def combine_slots(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """rows[M,H], order[M], weights[N,K] -> [N,H]: `combine`, which leaves empty slots out."""
    return combine(rows, order, weights)


def _by_expert(rows: Tensor, experts: int) -> Tensor:
    """[experts, rows of each, ..]; there may be none."""
    return rows.view(experts, rows.shape[0] // experts, *rows.shape[1:])


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """x[index], zeros where the index is one past the end."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])]).index_select(0, index)


class _Fill(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order, top_k):
        ctx.save_for_backward(order)
        ctx.tokens, ctx.top_k = x.shape[0], top_k
        index, none = order // top_k, order.new_full((1,), x.shape[0])
        first = torch.cat([index, none]).amin().clamp(max=x.shape[0] - 1).clamp(min=0)
        return _torch.result(_pick(x, torch.where(index < x.shape[0], index, first)))

    @staticmethod
    def backward(ctx, grad):
        (order,) = ctx.saved_tensors
        return sum_choices(grad, order, ctx.tokens, ctx.top_k), None, None


class _Slots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, span, experts, there):
        ctx.span, ctx.experts, ctx.there = span, experts, there
        return _torch.result(_moved(rows, span, experts, there, "forward"))

    @staticmethod
    def backward(ctx, grad):
        return _moved(grad, ctx.span, ctx.experts, not ctx.there, "backward"), None, None, None


def _moved(rows: Tensor, span, experts: int, there: bool, phase: str) -> Tensor:
    """There: (coordinate, expert, slot) by destination -> (expert, coordinate, slot) by source; or back."""
    first = (span.size, experts) if there else (experts, span.size)
    turned = lambda x: (
        x.view(*first, x.shape[0] // (span.size * experts), *x.shape[1:]).transpose(0, 1).flatten(0, 2)
    )
    rows = rows if there else turned(rows)
    splits = [rows.shape[0] // span.size] * span.size
    rows = _exchange(rows, span, splits, splits, phase, ragged=False)
    return turned(rows) if there else rows
