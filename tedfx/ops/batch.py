"""Several small collectives of one kind by one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tedfx.ops import context
from tedfx.ops.context import Axes
from tedfx.ops.convert import all_reduce, gather_pieces, sum_over
from tedfx.ops.prefix import behind_totals, check_runs, cumsum, run_totals
from tedfx.ops.properties import ALL_GATHER, ALL_REDUCE, Moves, op


@op(forward=Moves(ALL_REDUCE, "other"), saves=())
def all_reduce_batched(values: list[Tensor], axes: Axes) -> list[Tensor]:
    """P -> I of each: the values, of any shapes and one dtype, laid end to end for one all-reduce. Backward
    is the identity.

    ValueError where the dtypes differ.
    """
    span = context.span(axes)
    for x in values:
        if x.dtype != values[0].dtype:
            raise ValueError(f"all_reduce_batched of different dtypes, {values[0].dtype} and {x.dtype}")
    if span.size == 1 or len(values) == 1:
        return [all_reduce(x, axes) for x in values]
    if not any(
        x.requires_grad for x in values
    ):  # the dynamo of torch 2.11 calls such a Function's forward without its ctx
        return _sum_batched(span, values)
    return list(_AllReduce.apply(span, *values))


@op(forward=Moves(ALL_GATHER, "other"), saves=())
def cumsum_batched(
    values: list[Tensor], axes: Axes, dims: list[int], outers: list[int], dtype: torch.dtype
) -> list[Tensor]:
    """S -> S of each: `cumsum(values[i], dims[i], axes, outers[i], dtype)` of values of any shapes, the
    totals of all laid end to end for one all-gather.

    Of integers only: positions are integers, and what carries gradients would need a batched backward, for
    which all cotangents have to wait. TypeError for another dtype; ValueError where a dim does not divide
    into its runs.
    """
    span = context.span(axes)
    if dtype.is_floating_point or dtype.is_complex:
        raise TypeError(f"cumsum_batched of {dtype}: only integers need no gradient")
    if span.size == 1:
        return [torch.cumsum(x, dim, dtype=dtype) for x, dim in zip(values, dims, strict=True)]
    for x, dim, outer in zip(values, dims, outers, strict=True):
        check_runs(x, dim, outer)
    dims = [dim % x.dim() for x, dim in zip(values, dims)]
    totals = [run_totals(x, dim, outer, dtype) for x, dim, outer in zip(values, dims, outers)]
    gathered = gather_pieces(_end_to_end(totals), span, 0, 1, "forward").view(span.size, -1)
    found = []
    for x, dim, total, own in zip(values, dims, totals, gathered.split([t.numel() for t in totals], 1)):
        by_rank = (
            own.reshape(span.size, *total.shape).movedim(0, dim + 2).squeeze(dim + 1)
        )  # [.., outer, size, ..]
        found.append(behind_totals(x, dim, by_rank, span, dtype))
    return found


# The op that does what several nodes of an op do: list of first operands, axes, .. -> list of results.
BATCHED: dict[Callable[..., Any], Callable[..., Any]] = {
    all_reduce: all_reduce_batched,
    cumsum: cumsum_batched,
}


def _end_to_end(values) -> Tensor:
    return torch.cat([x.reshape(-1) for x in values])


def _sum_batched(span: context.Span, values) -> list[Tensor]:
    total, start, pieces = sum_over(_end_to_end(values), span, "forward"), 0, []
    for x in values:  # copies: each is a tensor of its own, so that none keeps the others alive
        pieces.append(total.narrow(0, start, x.numel()).clone().view(x.shape))
        start += x.numel()
    return pieces


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, span, *values):
        ctx.set_materialize_grads(False)
        return tuple(_sum_batched(span, values))

    @staticmethod
    def backward(ctx, *grads):
        return None, *grads


__all__ = ["BATCHED", "all_reduce_batched", "cumsum_batched"]
