"""The conversions between types on a mesh axis: one op each, with the one adjoint its types call for.

A collective has no adjoint of its own; a conversion has. R and P are each other's cotangent types, I and S their own:

    all_reduce      P -> I   all-reduce / identity        sum_gradient    I -> R   identity / all-reduce
    all_gather      S -> R   all-gather / reduce-scatter  all_gather      S -> I   all-gather / slice
    reduce_scatter  P -> S   reduce-scatter / all-gather
    shard           R -> S   slice / zero-pad             shard           I -> S   slice / all-gather
    partial         R -> P   keep on 0 / keep on 0        partial         I -> P   keep on 0 / identity

`axes` are mesh axis names, major first; the group is that of the current `RankContext`. Over one rank every op is the
identity and communicates nothing. Local sizes are equal on all ranks of a group.

`outer` is the product of the factors before the sharded one inside `dim`: the dim is seen as (outer, rest) and `rest`
is what is cut in `size` pieces. For a plain dim outer is 1; a fused gate|up dim (2, F) sharded on F has outer 2.
"""

import torch
from torch import Tensor

from tedfx import _torch
from tedfx.ops import context
from tedfx.ops.context import Axes, Span


def all_reduce(x: Tensor, axes: Axes) -> Tensor:
    """P -> I. Sum over the ranks; the cotangent is already whole everywhere, so backward is the identity."""
    span = context.span(axes)
    if span.size == 1:
        return x
    if x.dtype == torch.bool:
        raise TypeError("all_reduce of a bool tensor: a sum of partial truth values means nothing")
    return _AllReduce.apply(x, span)


def sum_gradient(x: Tensor, axes: Axes) -> Tensor:
    """I -> R. The identity; in backward every rank holds a part of the cotangent and they are summed."""
    span = context.span(axes)
    return x if span.size == 1 else _SumGradient.apply(x, span)


def all_gather(x: Tensor, axes: Axes, dim: int, outer: int = 1, to: str = "R") -> Tensor:
    """S -> R or S -> I. x[.., outer * local, ..] -> [.., outer * size * local, ..].

    to="R": the cotangent is partial on each rank, backward is a reduce-scatter. to="I": it is whole on each rank,
    backward keeps this rank's slice.
    """
    span = context.span(axes)
    _choice("all_gather", "to", to)
    if span.size == 1:
        return x
    return _AllGather.apply(x, span, _dim(x, dim), outer, to)


def reduce_scatter(x: Tensor, axes: Axes, dim: int, outer: int = 1) -> Tensor:
    """P -> S. Sum over the ranks and keep this rank's piece: [.., outer * whole, ..] -> [.., outer * whole / size, ..].

    ValueError when the dim does not divide.
    """
    span = context.span(axes)
    if span.size == 1:
        return x
    dim = _dim(x, dim)
    _divides("reduce_scatter", x, dim, outer, span)
    return _ReduceScatter.apply(x, span, dim, outer)


def shard(x: Tensor, axes: Axes, dim: int, outer: int = 1, source: str = "R") -> Tensor:
    """R -> S or I -> S. This rank's piece, a copy: [.., outer * whole, ..] -> [.., outer * whole / size, ..].

    source="R": the cotangent of the whole is partial, zeros around this rank's piece. source="I": it is replicated,
    the pieces are gathered. ValueError when the dim does not divide.
    """
    span = context.span(axes)
    _choice("shard", "source", source)
    if span.size == 1:
        return x
    dim = _dim(x, dim)
    _divides("shard", x, dim, outer, span)
    return _Shard.apply(x, span, dim, outer, source)


def partial(x: Tensor, axes: Axes, source: str = "R") -> Tensor:
    """R -> P or I -> P. x on coordinate 0, zeros elsewhere, so that the sum over the ranks is x.

    source="R": the cotangent R -> P is kept on coordinate 0 as well. source="I": it is the identity.
    """
    span = context.span(axes)
    _choice("partial", "source", source)
    return x if span.size == 1 else _Partial.apply(x, span, source)


# ---- the collectives on plain tensors, no autograd ---------------------------------------------------------------


def sum_over(x: Tensor, span: Span, phase: str, op: str = "sum") -> Tensor:
    """The sum (or, op="max", the maximum) of x over the ranks of `span`."""
    context.record("all_reduce", span.axes, phase, x)
    return _torch.raw_wait(_torch.raw_all_reduce(x.contiguous(), op, span.name))


def gather_pieces(x: Tensor, span: Span, dim: int, outer: int, phase: str) -> Tensor:
    """Every rank's piece x, put together along the rest of `dim`."""
    context.record("all_gather", span.axes, phase, x)
    if x.dtype == torch.bool:  # no backend is asked to know bool
        return _gather(x.view(torch.uint8), span, dim, outer).view(torch.bool)
    return _gather(x, span, dim, outer)


def _gather(x: Tensor, span: Span, dim: int, outer: int) -> Tensor:
    shape = x.shape
    if x.dim() == 0 or dim >= x.dim():
        raise ValueError(f"all_gather along dim {dim} of a tensor of shape {tuple(shape)}")
    gathered = _torch.raw_wait(_torch.raw_all_gather(x.contiguous(), span.size, span.name))
    pieces = gathered.view(span.size, *shape[:dim], outer, shape[dim] // outer, *shape[dim + 1 :])
    if span.order is not None:
        pieces = torch.stack([pieces[rank] for rank in span.order])
    whole = shape[dim] * span.size
    return pieces.movedim(0, dim + 1).reshape(*shape[:dim], whole, *shape[dim + 1 :])


def scatter_sum(x: Tensor, span: Span, dim: int, outer: int, phase: str) -> Tensor:
    """The sum of x over the ranks of `span`, of which this rank gets its piece of `dim`."""
    context.record("reduce_scatter", span.axes, phase, x)
    shape = x.shape
    local = shape[dim] // span.size
    pieces = _pieces(x, span, dim, outer).movedim(dim + 1, 0)
    if span.order is not None:
        holder = {rank: index for index, rank in enumerate(span.order)}
        pieces = torch.stack([pieces[holder[rank]] for rank in range(span.size)])
    # One leading dim of size * n rows: the collective cuts dim 0 and knows no other.
    flat = pieces.reshape(-1).contiguous()  # of an expanded tensor even reshape(-1) is a view
    summed = _torch.raw_wait(_torch.raw_reduce_scatter(flat, "sum", span.size, span.name))
    return summed.view(*shape[:dim], local, *shape[dim + 1 :])


def keep_piece(x: Tensor, span: Span, dim: int, outer: int) -> Tensor:
    """This rank's piece of `dim`, copied: a view would keep the whole tensor alive for backward."""
    local = x.shape[dim] // span.size
    piece = _pieces(x, span, dim, outer).select(dim + 1, span.index)
    return piece.reshape(*x.shape[:dim], local, *x.shape[dim + 1 :]).clone(memory_format=torch.contiguous_format)


def pad_piece(x: Tensor, span: Span, dim: int, outer: int) -> Tensor:
    """The transpose of `keep_piece`: x in this rank's piece, zeros in the others."""
    local = x.shape[dim] // outer
    padded = x.new_zeros(*x.shape[:dim], outer, span.size, local, *x.shape[dim + 1 :])
    padded.select(dim + 1, span.index).copy_(x.reshape(*x.shape[:dim], outer, local, *x.shape[dim + 1 :]))
    return padded.view(*x.shape[:dim], x.shape[dim] * span.size, *x.shape[dim + 1 :])


def keep_on_first(x: Tensor, span: Span) -> Tensor:
    """x on coordinate 0, zeros elsewhere."""
    return x.clone() if span.index == 0 else torch.zeros_like(x)


def _pieces(x: Tensor, span: Span, dim: int, outer: int) -> Tensor:
    """x with `dim` seen as (outer, size, local)."""
    return x.reshape(*x.shape[:dim], outer, span.size, x.shape[dim] // (outer * span.size), *x.shape[dim + 1 :])


def _dim(x: Tensor, dim: int) -> int:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim {dim} of a tensor of shape {tuple(x.shape)}")
    return dim % x.dim()


def _divides(name: str, x: Tensor, dim: int, outer: int, span: Span) -> None:
    if x.shape[dim] % (outer * span.size) != 0:
        raise ValueError(
            f"{name}: dim {dim} of shape {tuple(x.shape)} does not divide into {outer} x {span.size} pieces "
            f"over axes {span.axes}"
        )


def _choice(name: str, argument: str, value: str) -> None:
    if value != "R" and value != "I":
        raise ValueError(f"{name}: {argument} must be 'R' or 'I', not {value!r}")


# ---- the adjoints. Backward runs on another thread and after the context was left: all it needs is in ctx --------


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, span):
        return _torch.result(sum_over(x, span, "forward"))

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, span):
        ctx.span = span
        return _torch.result(x)

    @staticmethod
    def backward(ctx, grad):
        return sum_over(grad, ctx.span, "backward"), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, span, dim, outer, to):
        ctx.span, ctx.dim, ctx.outer, ctx.to = span, dim, outer, to
        return _torch.result(gather_pieces(x, span, dim, outer, "forward"))

    @staticmethod
    def backward(ctx, grad):
        if ctx.to == "I":
            return keep_piece(grad, ctx.span, ctx.dim, ctx.outer), None, None, None, None
        return scatter_sum(grad, ctx.span, ctx.dim, ctx.outer, "backward"), None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, span, dim, outer):
        ctx.span, ctx.dim, ctx.outer = span, dim, outer
        return _torch.result(scatter_sum(x, span, dim, outer, "forward"))

    @staticmethod
    def backward(ctx, grad):
        return gather_pieces(grad, ctx.span, ctx.dim, ctx.outer, "backward"), None, None, None


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, span, dim, outer, source):
        ctx.span, ctx.dim, ctx.outer, ctx.source = span, dim, outer, source
        return _torch.result(keep_piece(x, span, dim, outer))

    @staticmethod
    def backward(ctx, grad):
        if ctx.source == "I":
            return gather_pieces(grad, ctx.span, ctx.dim, ctx.outer, "backward"), None, None, None, None
        return pad_piece(grad, ctx.span, ctx.dim, ctx.outer), None, None, None, None


class _Partial(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, span, source):
        ctx.span, ctx.source = span, source
        return _torch.result(keep_on_first(x, span))

    @staticmethod
    def backward(ctx, grad):
        return (grad if ctx.source == "I" else keep_on_first(grad, ctx.span)), None, None
