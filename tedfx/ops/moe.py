"""The MoE's local form: which rows this rank computes, and how they get there and back.

A rank routes its tokens, sends each row to the rank that owns the row's expert, computes, and sends it back:

    order, counts = route(ids, num_experts)
    send, recv, recv_counts, counts = exchange_counts(counts, axes)
    rows = permute_rows(x, order, top_k)                    sorted by expert, so by destination
    rows = all_to_all_single(rows, recv, send, axes)        sorted by source, then expert
    index = expert_major(recv_counts, recv)
    rows = index_rows(rows, index)                    sorted by expert, then source: ready for grouped_linear
    ...
    rows = all_to_all_single(unindex_rows(rows, index), send, recv, axes)
    out = combine(rows, order, weights)

Assignments that a capacity dropped (the tail) come last in `order`, and `permute_rows` makes no row of them:
`cut_tail(order, send)` leaves them out, and where nothing travels `route(.., tail=True)`.

Where tokens are replicated over the axes that split the experts, no row travels: `route(.., owned=axes)`
keeps the assignments of this rank's experts, `local_counts` cuts the counts, and the combined output is a
partial sum.

Row counts differ from rank to rank and step to step; they are python ints here (one host copy in
`exchange_counts`, one in a `route` that is owned or cuts a tail), symbolic under torch.compile, where new
counts do not recompile (`torch._dynamo.config.capture_scalar_outputs = True`).
"""

import torch
from torch import Tensor

from tedfx import _torch
from tedfx.dtypes import has_gradient
from tedfx.ops import context
from tedfx.ops.context import Axes
from tedfx.ops.convert import bounds, gather_pieces
from tedfx.ops.cuts import intervals
from tedfx.ops.experts import (
    combine,
    dispatch,
    expert_rows,
    grouped_linear,
    sort_by_expert,
    sum_choices,
)
from tedfx.ops.properties import ALL_GATHER, ALL_TO_ALL, Moves, op

__all__ = [
    "all_to_all_single",
    "combine",
    "cut_tail",
    "dispatch",
    "exchange_counts",
    "expert_major",
    "expert_rows",
    "grouped_linear",
    "index_rows",
    "local_counts",
    "permute_rows",
    "route",
    "unindex_rows",
]


@op(saves=(), decides=True)
def route(
    ids: Tensor,
    num_experts: int,
    owned: Axes = (),
    lanes: Axes = (),
    owned_outer: int = 1,
    stripes: Axes = (),
    tail: bool = False,
) -> tuple[Tensor, Tensor]:
    """ids[N,K] -> (order[M], counts[E]): the assignments this rank handles, stably sorted by expert.

    Ids of num_experts are those of assignments that a capacity dropped: `order` ends with them (with `owned`
    or `tail` it has none of them), and no count has them.

    `owned`: axes over which tokens are replicated and experts split; keeps the assignments of this
    coordinate's experts, the expert dim seen as (owned_outer, size, rest). `lanes`: axes over which tokens
    are replicated and that share the sending; keeps tokens n with n * size // N == coordinate. counts has
    entries for all experts. `stripes`: the same for assignments, but order lists all of them, those of
    coordinate 0 first, so that the pieces of a row dim (`shard`) are the coordinates' own; counts are of this
    coordinate's. `owned` and `tail` cost a host copy.

    ValueError when the experts do not divide over `owned_outer`.
    """
    context.note("route")
    tokens, top_k = ids.shape
    lane, split = context.span(lanes), context.span(owned)
    # Tokens of a lane are a run, so nothing has to be searched for: it is a slice.
    first, last = -(-lane.index * tokens // lane.size), -(-(lane.index + 1) * tokens // lane.size)
    flat = ids[first:last].reshape(-1)
    if len(stripes) > 0:
        return _striped(flat, num_experts, context.span(stripes))
    if split.size == 1:
        order, counts = sort_by_expert(flat, num_experts)
        return (_listed(order, counts) if tail else order) + first * top_k, counts
    start, length = experts_of(num_experts // owned_outer, split)[split.index]
    if num_experts % owned_outer != 0:
        raise ValueError(f"{num_experts} experts do not divide into {owned_outer} runs")
    place = flat % (num_experts // owned_outer)
    mine = (place >= start) & (place < start + length) & (flat < num_experts)
    # The others sort to the end, under a number that is no expert's.
    order, counts = sort_by_expert(torch.where(mine, flat, num_experts), num_experts)
    return _listed(order, counts) + first * top_k, counts


def _listed(order: Tensor, counts: Tensor) -> Tensor:
    """The part of `order` that the counts count, which stands first."""
    context.note("host copy")
    rows = _torch.count_of(counts.sum())
    _torch.check(rows >= 0, "a negative number of rows")
    _torch.check(rows <= order.shape[0], "more rows than assignments")
    return order.narrow(0, 0, rows)


def _striped(flat: Tensor, num_experts: int, span: context.Span) -> tuple[Tensor, Tensor]:
    starts = bounds(flat.shape[0], span)
    piece = torch.cat([torch.full_like(flat[starts[i] : starts[i + 1]], i) for i in range(span.size)])
    order, counts = sort_by_expert(piece * num_experts + flat, span.size * num_experts)
    return order, counts.narrow(0, span.index * num_experts, num_experts)


@op(saves=())
def local_counts(counts: Tensor, axes: Axes, outer: int = 1) -> Tensor:
    """counts[E] -> those of this coordinate's experts, the expert dim seen as (outer, experts)."""
    span = context.span(axes)
    if counts.shape[0] % outer != 0:
        raise ValueError(f"{counts.shape[0]} experts do not divide into {outer} runs")
    start, length = experts_of(counts.shape[0] // outer, span)[span.index]
    return counts.view(outer, -1).narrow(1, start, length).reshape(-1)


def experts_of(experts: int, span: context.Span) -> tuple[tuple[int, int], ...]:
    """(first, how many) of the experts of each coordinate, major axis first: the pieces of their weights."""
    return intervals(experts, tuple(context.current().sizes[axis] for axis in span.axes))


def sums_of(counts: Tensor, experts: tuple[tuple[int, int], ...]) -> Tensor:
    """counts[E] -> [G]: the sum over each coordinate's experts."""
    if len({length for _, length in experts}) == 1:
        return counts.view(len(experts), -1).sum(1)
    return torch.stack([counts.narrow(0, start, length).sum() for start, length in experts])


@op(forward=Moves(ALL_GATHER, "other"), saves=(), waits=True)
def exchange_counts(counts: Tensor, axes: Axes) -> tuple[list[int], list[int], Tensor, Tensor]:
    """counts[E] -> (send_splits, recv_splits, recv_counts[G,L], counts[L]), L the experts of this coordinate;
    one all-gather, one host copy.

    send_splits[g] rows go to coordinate g, recv_splits[g] come from it, of which recv_counts[g,e] for local
    expert e; the last result sums them over g.
    """
    span = context.span(axes)
    experts = experts_of(counts.shape[0], span)
    by_source = counts.view(1, -1)
    if span.size > 1:
        by_source = gather_pieces(by_source, span, 0, 1, "forward")
    recv_counts = by_source.narrow(1, *experts[span.index])
    context.note("host copy")
    splits = torch.stack([sums_of(counts, experts), recv_counts.sum(1)]).flatten().tolist()
    for rows in splits:
        _torch.check(rows >= 0, "a negative number of rows")
    return splits[: span.size], splits[span.size :], recv_counts, recv_counts.sum(0)


@op(saves=())
def cut_tail(order: Tensor, send_splits: list[int]) -> Tensor:
    """order[M] -> [sum(send_splits)]: the assignments that travel, without those that a capacity dropped,
    which stand last. No host copy of its own."""
    rows = sum(send_splits)
    _torch.check(rows <= order.shape[0], "more rows than assignments")
    return order.narrow(0, 0, rows)


@op(saves=(1,))
def permute_rows(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """x[N,H], order[M] -> rows[M,H]: the row of assignment order[m] is x[order[m] // top_k]."""
    return _Permute.apply(x, order, top_k)


@op(forward=Moves(ALL_TO_ALL, "other"), backward=Moves(ALL_TO_ALL, "other"), saves=())
def all_to_all_single(rows: Tensor, recv_splits: list[int], send_splits: list[int], axes: Axes) -> Tensor:
    """rows[sum(send_splits),..] -> [sum(recv_splits),..]: the g-th run of rows goes to coordinate g. The
    adjoint swaps the splits. ValueError when the splits do not sum to the rows."""
    span = context.span(axes)
    if span.size == 1:
        return rows
    _torch.check(sum(send_splits) == rows.shape[0], "send_splits do not sum to the rows")
    if not has_gradient(
        rows.dtype
    ):  # the dynamo of torch 2.11 calls such a Function's forward without its ctx
        return _exchange(rows, span, recv_splits, send_splits, "forward")
    return _AllToAll.apply(rows, span, *recv_splits, *send_splits)


@op(saves=())
def expert_major(recv_counts: Tensor, recv_splits: list[int]) -> Tensor:
    """recv_counts[G,E] -> index[M]: where in rows sorted by (source, expert) stands the m-th by (expert,
    source).

    `recv_splits` are the host's sums over the experts, as `exchange_counts` gave them: M without another
    copy.
    """
    total = sum(recv_splits)
    counts = recv_counts.mT.reshape(-1)  # by (expert, source)
    stops = counts.cumsum(0)
    flat = recv_counts.reshape(-1)
    starts_received = (flat.cumsum(0) - flat).view(recv_counts.shape).mT.reshape(-1)
    position = torch.arange(total, device=counts.device)
    # The run each position falls in; a run without rows has stop == start and is never found.
    run = torch.searchsorted(stops, position, right=True)
    return position + (starts_received - (stops - counts)).index_select(0, run)


@op(saves=(1,))
def index_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows[M,..], index[M] a permutation -> rows[index]."""
    return _Index.apply(rows, index)


@op(saves=(1,))
def unindex_rows(rows: Tensor, index: Tensor) -> Tensor:
    """The inverse of `index_rows`: out[index] = rows."""
    return _Unindex.apply(rows, index)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order, top_k):
        ctx.save_for_backward(order)
        ctx.tokens, ctx.top_k = x.shape[0], top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx, grad):
        (order,) = ctx.saved_tensors
        return sum_choices(grad, order, ctx.tokens, ctx.top_k), None, None


def _exchange(rows, span, recv, send, phase, ragged=True):
    context.record("all_to_all", span.axes, phase, rows, ragged)
    if span.order is None:
        return _torch.all_to_all(rows, recv, send, span.name)
    # The group counts its ranks in another order than the coordinates run: the runs are put in its order and
    # back.
    holder = [span.order.index(rank) for rank in range(span.size)]
    runs = torch.split(rows, send)
    rows = torch.cat([runs[index] for index in holder])
    recv, send = [recv[index] for index in holder], [send[index] for index in holder]
    runs = torch.split(_torch.all_to_all(rows, recv, send, span.name), recv)
    return torch.cat([runs[rank] for rank in span.order])


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, span, *splits):
        ctx.span, ctx.recv, ctx.send = span, list(splits[: span.size]), list(splits[span.size :])
        return _torch.result(_exchange(rows, span, ctx.recv, ctx.send, "forward"))

    @staticmethod
    def backward(ctx, grad):
        grad_rows = _exchange(grad, ctx.span, ctx.send, ctx.recv, "backward")
        return (grad_rows, None, *(None for _ in range(2 * ctx.span.size)))


class _Index(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, index):
        ctx.save_for_backward(index)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return torch.empty_like(grad).index_copy_(0, index, grad), None


class _Unindex(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, index):
        ctx.save_for_backward(index)
        return _torch.result(torch.empty_like(rows).index_copy_(0, index, rows))

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None
