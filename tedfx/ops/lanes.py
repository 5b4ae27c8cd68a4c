"""Routed rows without duplicates: ranks that hold the same tokens send a slice of them each, and share the
rows where they arrive.

Tensor-parallel experts need every row on every rank of the tensor group, yet the rows need to cross the
expert axes only once. So each rank of the group (a *lane*) dispatches its own slice of the tokens; after the
all-to-all the lanes are gathered, and the experts' partial sums are scattered to the lanes again before the
way back (DeepSpeed-TED's duplicate token dropping, arXiv 2303.06318):

    order, counts = route(ids, num_experts)                                 of this lane's tokens
    send, recv, totals, received, counts = exchange_lanes(counts, (*lanes, *split), split)
    rows = all_to_all_single(permute_rows(x, order, top_k), recv, send, split)
    index = lane_index(received, totals)
    rows = pick_rows(gather_lanes(rows, lanes, totals), index)              all lanes' rows, sorted by expert
    ...
    rows = scatter_lanes(spread_lanes(rows, index, totals), lanes, totals)  this lane's rows, summed
    rows = all_to_all_single(rows, send, recv, split)

Lanes hold different numbers of rows. The gathered tensor has the room of the largest for each, so that its
collectives are even ones; `pick_rows` leaves the gaps out.
"""

import torch
from torch import Tensor

from tedfx import _torch
from tedfx.ops import context
from tedfx.ops.context import Axes
from tedfx.ops.convert import gather_pieces, scatter_sum
from tedfx.ops.moe import experts_of, sums_of
from tedfx.ops.properties import ALL_GATHER, REDUCE_SCATTER, Moves, op

__all__ = ["exchange_lanes", "gather_lanes", "lane_index", "pick_rows", "scatter_lanes", "spread_lanes"]


@op(forward=Moves(ALL_GATHER, "other"), saves=(), waits=True)
def exchange_lanes(
    counts: Tensor, axes: Axes, split: Axes
) -> tuple[list[int], list[int], list[int], Tensor, Tensor]:
    """counts[E] of this lane's assignments -> (send_splits, recv_splits, totals, received[T*G,L], counts[L]),
    L the experts of this coordinate.

    `axes`: the lanes' axes, then `split`. One all-gather over all of them, one host copy. The splits are this
    lane's, over `split`; `totals[t]` are the rows that lane t holds after the all-to-all; received[t*G + g,
    e] of them came from coordinate g for local expert e.
    """
    lane, over, everyone = (
        context.span(axes[: len(axes) - len(split)]),
        context.span(split),
        context.span(axes),
    )
    experts = experts_of(counts.shape[0], over)
    by_source = gather_pieces(counts.view(1, -1), everyone, 0, 1, "forward")  # [T*G, E]
    received = by_source.narrow(1, *experts[over.index])
    by_lane = received.reshape(lane.size, over.size, received.shape[1])
    splits = torch.cat(
        [sums_of(counts, experts), by_lane.select(0, lane.index).sum(1), by_lane.sum((1, 2))]
    ).tolist()
    context.note("host copy")
    for rows in splits:
        _torch.check(rows >= 0, "a negative number of rows")
    send, recv, totals = splits[: over.size], splits[over.size : 2 * over.size], splits[2 * over.size :]
    room = _room(totals)
    for rows in totals:
        _torch.check(rows <= room, "a lane with more rows than the largest")
    return send, recv, totals, received, received.sum(0)


@op(saves=())
def lane_index(received: Tensor, totals: list[int]) -> Tensor:
    """index[M]: where in the gathered lanes stands the m-th row in the order (expert, lane, source); M =
    sum(totals)."""
    lanes = len(totals)
    counts = received.mT.reshape(-1)  # by (expert, lane, source)
    stops = counts.cumsum(0)
    by_lane = received.reshape(lanes, -1)
    starts = (
        by_lane.cumsum(1) - by_lane + torch.arange(lanes, device=counts.device).unsqueeze(1) * _room(totals)
    )
    starts = starts.view(received.shape).mT.reshape(-1)
    position = torch.arange(sum(totals), device=counts.device)
    run = torch.searchsorted(stops, position, right=True)
    return position + (starts - (stops - counts)).index_select(0, run)


@op(forward=Moves(ALL_GATHER, "in"), backward=Moves(REDUCE_SCATTER, "out", {"to": ("R",)}), saves=())
def gather_lanes(rows: Tensor, axes: Axes, totals: list[int], to: str = "R") -> Tensor:
    """rows[totals[lane],..] -> [T * max(totals),..]: all lanes' rows, each from a multiple of the largest on;
    the gaps are zero.

    to="R": the cotangent is partial on each rank, backward is a reduce-scatter. to="I": it is whole on each
    rank, backward keeps this lane's.
    """
    if to not in ("R", "I"):
        raise ValueError(f"gather_lanes: to must be 'R' or 'I', not {to!r}")
    return _Gather.apply(rows, context.span(axes), _room(totals), to)


@op(
    forward=Moves(REDUCE_SCATTER, "in", {"source": ("P",)}),
    backward=Moves(ALL_GATHER, "out", {"source": ("P", "I")}),
    saves=(),
)
def scatter_lanes(rows: Tensor, axes: Axes, totals: list[int], source: str = "P") -> Tensor:
    """rows[T * max(totals),..] -> [totals[lane],..]. source="P": summed over the ranks (reduce-scatter /
    all-gather); "R": this lane's (slice / zero-pad); "I": the same, gathered in backward."""
    span = context.span(axes)
    if source not in ("P", "R", "I"):
        raise ValueError(f"scatter_lanes: source must be 'P', 'R' or 'I', not {source!r}")
    return _Scatter.apply(rows, span, _room(totals), totals[span.index], source)


@op(saves=(1,))
def pick_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows[L,..], index[M] without repetitions -> rows[index]."""
    return _Pick.apply(rows, index)


@op(saves=(1,))
def spread_lanes(rows: Tensor, index: Tensor, totals: list[int]) -> Tensor:
    """The transpose of `pick_rows` on gathered lanes: rows[M,..] -> [T * max(totals),..], out[index] = rows,
    zeros elsewhere."""
    return _Spread.apply(rows, index, len(totals) * _room(totals))


def _room(totals: list[int]) -> int:
    room = totals[0]
    for rows in totals[1:]:
        room = _torch.size_max(room, rows)
    return room


def _padded(rows: Tensor, room: int) -> Tensor:
    out = rows.new_zeros(room, *rows.shape[1:])
    out.narrow(0, 0, rows.shape[0]).copy_(rows)
    return out


def _placed(rows: Tensor, span, room: int) -> Tensor:
    """This lane's rows where they stand among all lanes'; zeros elsewhere."""
    out = rows.new_zeros(span.size, room, *rows.shape[1:])
    out.select(0, span.index).narrow(0, 0, rows.shape[0]).copy_(rows)
    return out.view(span.size * room, *rows.shape[1:])


def _spread(rows: Tensor, index: Tensor, size: int) -> Tensor:
    return rows.new_zeros(size, *rows.shape[1:]).index_copy_(0, index, rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, span, room, to):
        ctx.span, ctx.rows, ctx.to, ctx.room = span, rows.shape[0], to, room
        return _torch.result(gather_pieces(_padded(rows, room), span, 0, 1, "forward", ragged=True))

    @staticmethod
    def backward(ctx, grad):
        if ctx.to == "I":
            lane = grad.view(ctx.span.size, ctx.room, *grad.shape[1:]).select(0, ctx.span.index)
        else:
            lane = scatter_sum(grad, ctx.span, 0, 1, "backward", ragged=True)
        return lane.narrow(0, 0, ctx.rows).clone(), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, span, room, mine, source):
        ctx.span, ctx.room, ctx.source = span, room, source
        if source == "P":
            lane = scatter_sum(rows, span, 0, 1, "forward", ragged=True)
        else:
            lane = rows.view(span.size, room, *rows.shape[1:]).select(0, span.index)
        return _torch.result(lane.narrow(0, 0, mine).clone())

    @staticmethod
    def backward(ctx, grad):
        if ctx.source == "R":
            return _placed(grad, ctx.span, ctx.room), None, None, None, None
        return (
            gather_pieces(_padded(grad, ctx.room), ctx.span, 0, 1, "backward", ragged=True),
            None,
            None,
            None,
            None,
        )


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, index):
        ctx.save_for_backward(index)
        ctx.size = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return _spread(grad, index, ctx.size), None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, index, size):
        ctx.save_for_backward(index)
        return _torch.result(_spread(rows, index, size))

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None, None
