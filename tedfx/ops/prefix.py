"""A running sum along a dim that is sharded.

A rank sums its own piece; what comes before the piece is the sum of the totals of the ranks before it. Those
totals are all that is exchanged: one all-gather of x without its dim. Along a dim (outer, rest) of which
`rest` is cut, a rank holds `outer` runs, and the runs of all ranks follow one another by (outer, rank).

A capacity counts tokens in the order of the global batch, so the position of a token in its expert is such a
sum over the batch axes.

A capacity of each batch coordinate counts in groups instead, one per coordinate (`passes/local_capacity.py`):
`group_cumsum` and `group_total` are functions of a single device, and where a shard is a whole number of
groups nothing is exchanged.
"""

import torch
from torch import Tensor

from tedfx import _torch
from tedfx.ops import context
from tedfx.ops.context import Axes, Span
from tedfx.ops.convert import gather_pieces
from tedfx.ops.properties import ALL_GATHER, Moves, op


@op(forward=Moves(ALL_GATHER, "other"), backward=Moves(ALL_GATHER, "other"), saves=())
def cumsum(x: Tensor, dim: int, axes: Axes, outer: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    """S -> S: the cumsum along `dim` of the whole.

    x[.., outer * local, ..], a piece of the whole by `axes` (major first) -> the piece of the whole's cumsum.

    Integers (summed as int64 unless `dtype` says otherwise, as torch does) and floats; the cotangent is S,
    and backward is the sum from the other end. ValueError where the dim does not divide into `outer` runs.
    """
    span = context.span(axes)
    if span.size == 1:
        return torch.cumsum(x, dim, dtype=dtype)
    if dtype is not None:
        x = x.to(dtype)
    elif not x.is_floating_point() and not x.is_complex():
        dtype = torch.int64  # as torch sums integers
    check_runs(x, dim, outer)
    return _Cumsum.apply(x, dim % x.dim(), span, outer, dtype)


def check_runs(x: Tensor, dim: int, outer: int) -> None:
    """ValueError where the dim does not divide into `outer` runs."""
    if x.dim() == 0 or x.shape[dim] % outer != 0:
        raise ValueError(f"cumsum along dim {dim} of a tensor of shape {tuple(x.shape)} in {outer} runs")


@op(saves=())
def group_cumsum(
    x: Tensor, dim: int, groups: int, outer: int = 1, dtype: torch.dtype | None = None
) -> Tensor:
    """The cumsum of each group along a dim seen as (outer, groups, rest); a group runs over (outer, rest)."""
    grouped = _by_group(x, dim, groups, outer)
    return _ungrouped(torch.cumsum(grouped, dim + 1, dtype=dtype), x, dim, groups, outer)


@op(saves=())
def group_total(
    x: Tensor, dims: list[int], dim: int, groups: int, outer: int = 1, dtype: torch.dtype | None = None
) -> Tensor:
    """At each element the sum over its group: along `dim`, seen as (outer, groups, rest), over (outer, rest);
    along the others of `dims` over all."""
    grouped = _by_group(x, dim, groups, outer)
    over = [dim + 1, *(d + (d > dim) for d in dims if d != dim)]
    return _ungrouped(
        grouped.sum(over, keepdim=True, dtype=dtype).expand(grouped.shape), x, dim, groups, outer
    )


def _by_group(x: Tensor, dim: int, groups: int, outer: int) -> Tensor:
    """[.., groups, outer * rest, ..]"""
    before, after, rest = x.shape[:dim], x.shape[dim + 1 :], x.shape[dim] // (outer * groups)
    return (
        x.reshape(*before, outer, groups, rest, *after)
        .transpose(dim, dim + 1)
        .reshape(*before, groups, outer * rest, *after)
    )


def _ungrouped(grouped: Tensor, x: Tensor, dim: int, groups: int, outer: int) -> Tensor:
    before, after, rest = x.shape[:dim], x.shape[dim + 1 :], x.shape[dim] // (outer * groups)
    return grouped.reshape(*before, groups, outer, rest, *after).transpose(dim, dim + 1).reshape(x.shape)


def run_totals(x: Tensor, dim: int, outer: int, dtype: torch.dtype | None) -> Tensor:
    """[.., outer * local, ..] -> [.., outer, 1, ..]: what the ranks exchange."""
    return _runs(x, dim, outer).sum(dim + 1, keepdim=True, dtype=dtype)


def behind_totals(
    x: Tensor, dim: int, by_rank: Tensor, span: Span, dtype: torch.dtype | None, back: bool = False
) -> Tensor:
    """The sum of all elements of the whole up to each one of x, from the end where `back`; `by_rank[..,
    outer, size, ..]` are the totals of all ranks."""
    outer = by_rank.shape[dim]
    inside = _sum(_runs(x, dim, outer), dim + 1, dtype, back)
    flat = by_rank.reshape(*x.shape[:dim], outer * span.size, *x.shape[dim + 1 :])
    before = (_sum(flat, dim, dtype, back) - flat).view(by_rank.shape)
    return (inside + before.narrow(dim + 1, span.index, 1)).reshape(x.shape)


def _running(
    x: Tensor, dim: int, span: Span, outer: int, dtype: torch.dtype | None, phase: str, back: bool
) -> Tensor:
    totals = run_totals(x, dim, outer, dtype)
    by_rank = gather_pieces(totals.contiguous(), span, dim + 1, 1, phase)
    return behind_totals(x, dim, by_rank, span, dtype, back)


def _runs(x: Tensor, dim: int, outer: int) -> Tensor:
    return x.reshape(*x.shape[:dim], outer, x.shape[dim] // outer, *x.shape[dim + 1 :])


def _sum(x: Tensor, dim: int, dtype: torch.dtype | None, back: bool) -> Tensor:
    return x.flip(dim).cumsum(dim, dtype=dtype).flip(dim) if back else x.cumsum(dim, dtype=dtype)


class _Cumsum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, span, outer, dtype):
        ctx.dim, ctx.span, ctx.outer = dim, span, outer
        return _torch.result(_running(x, dim, span, outer, dtype, "forward", False))

    @staticmethod
    def backward(ctx, grad):
        return _running(grad, ctx.dim, ctx.span, ctx.outer, None, "backward", True), None, None, None, None
