"""Several small sums by one collective."""

import torch
from torch import Tensor

from tedfx import _torch
from tedfx.ops import context
from tedfx.ops.context import Axes
from tedfx.ops.convert import all_reduce, sum_over


def all_reduce_batched(values: list[Tensor], axes: Axes) -> list[Tensor]:
    """P -> I of each: the values, of any shapes and one dtype, laid end to end for one all-reduce. Backward is the identity.

    ValueError where the dtypes differ.
    """
    span = context.span(axes)
    for x in values:
        if x.dtype != values[0].dtype:
            raise ValueError(f"all_reduce_batched of different dtypes, {values[0].dtype} and {x.dtype}")
    if span.size == 1 or len(values) == 1:
        return [all_reduce(x, axes) for x in values]
    if not any(x.requires_grad for x in values):  # the dynamo of torch 2.11 calls such a Function's forward without its ctx
        return _sum_batched(span, values)
    return list(_AllReduce.apply(span, *values))


def _sum_batched(span: context.Span, values) -> list[Tensor]:
    total, start, pieces = sum_over(torch.cat([x.reshape(-1) for x in values]), span, "forward"), 0, []
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


__all__ = ["all_reduce_batched"]
