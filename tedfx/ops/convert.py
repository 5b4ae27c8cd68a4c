"""The conversions between types on a mesh axis: one op each, with the one adjoint its types call for.

A collective has no adjoint of its own; a conversion has. R and P are each other's cotangent types, I and S
their own:

    all_reduce      P -> I   all-reduce / identity        sum_gradient    I -> R   identity / all-reduce
    all_gather      S -> R   all-gather / reduce-scatter  all_gather      S -> I   all-gather / slice
    reduce_scatter  P -> S   reduce-scatter / all-gather
    shard           R -> S   slice / zero-pad             shard           I -> S   slice / all-gather
    partial         R -> P   keep on 0 / keep on 0        partial         I -> P   keep on 0 / identity

`axes` are mesh axis names, major first; the group is that of the current `RankContext`. Over one rank every
op is the identity and communicates nothing.

Pieces of a dim of tokens that the ranks do not divide are as equal as can be: piece i of n runs from
whole * i // n to whole * (i + 1) // n. Those of a dim of parameters are the ranks' `pieces`
(`cuts.intervals`), numbers that the graph has. Collectives then pad to the largest piece.

`outer` is the product of the factors before the sharded one inside `dim`: the dim is seen as (outer, rest)
and `rest` is what is cut in `size` pieces. For a plain dim outer is 1; a fused gate|up dim (2, F) sharded on
F has outer 2. `inner` is the product of the factors behind it. Equal pieces are cut alike whatever stands
behind; pieces that may be unequal are pieces of the sharded factor: of 13 tokens x 2 choices, 6 x 2 and 7 x
2, not 13 and 13.
"""

import torch
from torch import Tensor

from tedfx import _torch
from tedfx.ops import context
from tedfx.ops.context import Axes, Span
from tedfx.ops.properties import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Moves, op

Pieces = tuple[int, ...] | None  # how long the ranks' pieces are, where they are no `bounds` of tokens
Whole = int | tuple[int, ...]


@op(forward=Moves(ALL_REDUCE, "in"), saves=())
def all_reduce(x: Tensor, axes: Axes) -> Tensor:
    """P -> I. Sum over the ranks; the cotangent is already whole everywhere, so backward is the identity."""
    span = context.span(axes)
    if span.size == 1:
        return x
    if x.dtype == torch.bool:
        raise TypeError("all_reduce of a bool tensor: a sum of partial truth values means nothing")
    return _AllReduce.apply(x, span)


@op(backward=Moves(ALL_REDUCE, "in"), saves=(), alias=True)
def sum_gradient(x: Tensor, axes: Axes) -> Tensor:
    """I -> R. The identity; in backward every rank holds a part of the cotangent and they are summed."""
    span = context.span(axes)
    return x if span.size == 1 else _SumGradient.apply(x, span)


@op(forward=Moves(ALL_GATHER, "in"), backward=Moves(REDUCE_SCATTER, "out", {"to": ("R",)}), saves=())
def all_gather(
    x: Tensor,
    axes: Axes,
    dim: int,
    outer: int = 1,
    to: str = "R",
    whole: Whole | None = None,
    inner: int = 1,
) -> Tensor:
    """S -> R or S -> I. x[.., outer * local, ..] -> [.., outer * size * local, ..].

    to="R": the cotangent is partial on each rank, backward is a reduce-scatter. to="I": it is whole on each
    rank, backward keeps this rank's slice. `whole`: the sum of the pieces, or they, where they may be
    unequal: -> [.., outer * whole * inner, ..].
    """
    span = context.span(axes)
    _choice("all_gather", "to", to)
    if span.size == 1:
        return x
    return _along(x, dim, inner, lambda x, dim: _AllGather.apply(x, span, dim, outer, to, whole))


@op(forward=Moves(REDUCE_SCATTER, "in"), backward=Moves(ALL_GATHER, "out"), saves=())
def reduce_scatter(
    x: Tensor, axes: Axes, dim: int, outer: int = 1, inner: int = 1, pieces: Pieces = None
) -> Tensor:
    """P -> S. Sum over the ranks and keep this rank's piece.

    [.., outer * whole, ..] -> [.., outer * piece, ..].

    ValueError when the dim is no multiple of `outer`.
    """
    span = context.span(axes)
    if span.size == 1:
        return x
    _divides("reduce_scatter", x, dim, outer * inner, span)
    return _along(x, dim, inner, lambda x, dim: _ReduceScatter.apply(x, span, dim, outer, pieces))


@op(backward=Moves(ALL_GATHER, "out", {"source": ("I",)}), saves=())
def shard(
    x: Tensor,
    axes: Axes,
    dim: int,
    outer: int = 1,
    source: str = "R",
    inner: int = 1,
    pieces: Pieces = None,
) -> Tensor:
    """R -> S or I -> S. This rank's piece, a copy: [.., outer * whole, ..] -> [.., outer * piece, ..].

    source="R": the cotangent of the whole is partial, zeros around this rank's piece. source="I": it is
    replicated, the pieces are gathered. ValueError when the dim is no multiple of `outer`.
    """
    span = context.span(axes)
    _choice("shard", "source", source)
    if span.size == 1:
        return x
    _divides("shard", x, dim, outer * inner, span)
    return _along(x, dim, inner, lambda x, dim: _Shard.apply(x, span, dim, outer, source, pieces))


def _along(x: Tensor, dim: int, inner: int, convert) -> Tensor:
    """The conversion on the dim without what stands behind the sharded factor in it."""
    dim = _dim(x, dim)
    if isinstance(inner, int) and inner == 1:
        return convert(x, dim)
    return convert(x.reshape(*x.shape[:dim], x.shape[dim] // inner, inner, *x.shape[dim + 1 :]), dim).flatten(
        dim, dim + 1
    )


@op(saves=())
def partial(x: Tensor, axes: Axes, source: str = "R") -> Tensor:
    """R -> P or I -> P. x on coordinate 0, zeros elsewhere, so that the sum over the ranks is x.

    source="R": the cotangent R -> P is kept on coordinate 0 as well. source="I": it is the identity.
    """
    span = context.span(axes)
    _choice("partial", "source", source)
    return x if span.size == 1 else _Partial.apply(x, span, source)


# ---- the collectives on plain tensors, no autograd ---------------------------------------------------------


def sum_over(x: Tensor, span: Span, phase: str, op: str = "sum") -> Tensor:
    """The sum (or, op="max", the maximum) of x over the ranks of `span`."""
    context.record("all_reduce", span.axes, phase, x)
    return _torch.all_reduce(x, op, span.name)


def bounds(whole: Whole, span: Span) -> list[int]:
    """Where the pieces of a dim of `whole` begin; the last entry is its end."""
    if isinstance(whole, tuple):
        return [sum(whole[:i]) for i in range(span.size + 1)]
    return [whole * i // span.size for i in range(span.size + 1)]


def gather_pieces(
    x: Tensor, span: Span, dim: int, outer: int, phase: str, whole: Whole | None = None, ragged: bool = False
) -> Tensor:
    """Every rank's piece x, put together along the rest of `dim`; `whole`: their sum, or they, where they may
    be unequal."""
    if isinstance(whole, tuple) or (whole is not None and not _torch.known(whole % span.size == 0)):
        return _gather_unequal(x, span, dim, outer, phase, whole)
    context.record("all_gather", span.axes, phase, x, ragged)
    if x.dtype == torch.bool:  # no backend is asked to know bool
        return _gather(x.view(torch.uint8), span, dim, outer).view(torch.bool)
    return _gather(x, span, dim, outer)


def _gather_unequal(x: Tensor, span: Span, dim: int, outer: int, phase: str, whole: Whole) -> Tensor:
    starts, room = bounds(whole, span), _room(whole, span)
    padded = _pad_to(
        x.reshape(*x.shape[:dim], outer, x.shape[dim] // outer, *x.shape[dim + 1 :]), dim + 1, room
    )
    padded = padded.reshape(*x.shape[:dim], outer * room, *x.shape[dim + 1 :])
    gathered = gather_pieces(padded, span, dim, outer, phase)
    gathered = gathered.view(*x.shape[:dim], outer, span.size, room, *x.shape[dim + 1 :])
    pieces = [
        gathered.select(dim + 1, i).narrow(dim + 1, 0, starts[i + 1] - starts[i]) for i in range(span.size)
    ]
    return torch.cat(pieces, dim + 1).reshape(*x.shape[:dim], outer * starts[-1], *x.shape[dim + 1 :])


def _room(whole: Whole, span: Span) -> int:
    """The length of the largest piece."""
    return max(whole) if isinstance(whole, tuple) else -(-whole // span.size)


def _pad_to(x: Tensor, dim: int, size: int) -> Tensor:
    padded = x.new_zeros(*x.shape[:dim], size, *x.shape[dim + 1 :])
    padded.narrow(dim, 0, x.shape[dim]).copy_(x)
    return padded


def _gather(x: Tensor, span: Span, dim: int, outer: int) -> Tensor:
    shape = x.shape
    if x.dim() == 0 or dim >= x.dim():
        raise ValueError(f"all_gather along dim {dim} of a tensor of shape {tuple(shape)}")
    gathered = _torch.all_gather(x, span.size, span.name)
    pieces = gathered.view(span.size, *shape[:dim], outer, shape[dim] // outer, *shape[dim + 1 :])
    if span.order is not None:
        pieces = torch.stack([pieces[rank] for rank in span.order])
    whole = shape[dim] * span.size
    return pieces.movedim(0, dim + 1).reshape(*shape[:dim], whole, *shape[dim + 1 :])


def scatter_sum(
    x: Tensor,
    span: Span,
    dim: int,
    outer: int,
    phase: str,
    ragged: bool = False,
    pieces: Pieces = None,
) -> Tensor:
    """The sum of x over the ranks of `span`, of which this rank gets its piece of `dim`."""
    whole = x.shape[dim] // outer
    if pieces is not None or not _torch.known(whole % span.size == 0):
        return _scatter_unequal(x, span, dim, outer, phase, whole, pieces or whole)
    context.record("reduce_scatter", span.axes, phase, x, ragged)
    shape = x.shape
    local = shape[dim] // span.size
    parts = _pieces(x, span, dim, outer).movedim(dim + 1, 0)
    if span.order is not None:
        holder = {rank: index for index, rank in enumerate(span.order)}
        parts = torch.stack([parts[holder[rank]] for rank in range(span.size)])
    # One leading dim of size * n rows: the collective cuts dim 0 and knows no other.
    flat = parts.reshape(-1).contiguous()  # of an expanded tensor even reshape(-1) is a view
    summed = _torch.reduce_scatter(flat, span.size, span.name)
    return summed.view(*shape[:dim], local, *shape[dim + 1 :])


def _scatter_unequal(
    x: Tensor, span: Span, dim: int, outer: int, phase: str, whole: int, cut: Whole
) -> Tensor:
    room, starts = _room(cut, span), bounds(cut, span)
    seen = x.reshape(*x.shape[:dim], outer, whole, *x.shape[dim + 1 :])
    pieces = [
        _pad_to(seen.narrow(dim + 1, starts[i], starts[i + 1] - starts[i]), dim + 1, room)
        for i in range(span.size)
    ]
    padded = torch.stack(pieces, dim + 1).reshape(
        *x.shape[:dim], outer * span.size * room, *x.shape[dim + 1 :]
    )
    mine = scatter_sum(padded, span, dim, outer, phase).view(*x.shape[:dim], outer, room, *x.shape[dim + 1 :])
    local = starts[span.index + 1] - starts[span.index]
    return mine.narrow(dim + 1, 0, local).reshape(*x.shape[:dim], outer * local, *x.shape[dim + 1 :])


def keep_piece(x: Tensor, span: Span, dim: int, outer: int, pieces: Pieces = None) -> Tensor:
    """This rank's piece of `dim`, copied: a view would keep the whole tensor alive for backward."""
    whole = x.shape[dim] // outer
    start, stop = bounds(pieces or whole, span)[span.index : span.index + 2]
    piece = x.reshape(*x.shape[:dim], outer, whole, *x.shape[dim + 1 :]).narrow(dim + 1, start, stop - start)
    return piece.reshape(*x.shape[:dim], outer * (stop - start), *x.shape[dim + 1 :]).clone(
        memory_format=torch.contiguous_format
    )


def pad_piece(x: Tensor, span: Span, dim: int, outer: int, whole: int, pieces: Pieces = None) -> Tensor:
    """The transpose of `keep_piece`: x in this rank's piece of a dim of outer * whole, zeros in the
    others."""
    start, stop = bounds(pieces or whole, span)[span.index : span.index + 2]
    padded = x.new_zeros(*x.shape[:dim], outer, whole, *x.shape[dim + 1 :])
    padded.narrow(dim + 1, start, stop - start).copy_(
        x.reshape(*x.shape[:dim], outer, stop - start, *x.shape[dim + 1 :])
    )
    return padded.view(*x.shape[:dim], outer * whole, *x.shape[dim + 1 :])


def keep_on_first(x: Tensor, span: Span) -> Tensor:
    """x on coordinate 0, zeros elsewhere."""
    return x.clone() if span.index == 0 else torch.zeros_like(x)


def _pieces(x: Tensor, span: Span, dim: int, outer: int) -> Tensor:
    """x with `dim` seen as (outer, size, local)."""
    return x.reshape(
        *x.shape[:dim], outer, span.size, x.shape[dim] // (outer * span.size), *x.shape[dim + 1 :]
    )


def _dim(x: Tensor, dim: int) -> int:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim {dim} of a tensor of shape {tuple(x.shape)}")
    return dim % x.dim()


def _divides(name: str, x: Tensor, dim: int, outer: int, span: Span) -> None:
    if x.shape[_dim(x, dim)] % outer != 0:
        raise ValueError(
            f"{name}: dim {dim} of shape {tuple(x.shape)} does not divide into {outer} runs to cut over "
            f"axes {span.axes}"
        )


def _choice(name: str, argument: str, value: str) -> None:
    if value != "R" and value != "I":
        raise ValueError(f"{name}: {argument} must be 'R' or 'I', not {value!r}")


# ---- the adjoints. Backward runs on another thread and after the context was left: all it needs is in ctx --


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
    def forward(ctx, x, span, dim, outer, to, whole):
        ctx.span, ctx.dim, ctx.outer, ctx.to = span, dim, outer, to
        ctx.pieces = whole if isinstance(whole, tuple) else None
        return _torch.result(gather_pieces(x, span, dim, outer, "forward", whole))

    @staticmethod
    def backward(ctx, grad):
        if ctx.to == "I":
            piece = keep_piece(grad, ctx.span, ctx.dim, ctx.outer, ctx.pieces)
        else:
            piece = scatter_sum(grad, ctx.span, ctx.dim, ctx.outer, "backward", pieces=ctx.pieces)
        return piece, None, None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, span, dim, outer, pieces):
        ctx.span, ctx.dim, ctx.outer, ctx.whole = span, dim, outer, pieces or x.shape[dim] // outer
        return _torch.result(scatter_sum(x, span, dim, outer, "forward", pieces=pieces))

    @staticmethod
    def backward(ctx, grad):
        whole = gather_pieces(grad, ctx.span, ctx.dim, ctx.outer, "backward", ctx.whole)
        return whole, None, None, None, None


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, span, dim, outer, source, pieces):
        ctx.span, ctx.dim, ctx.outer, ctx.source = span, dim, outer, source
        ctx.pieces, ctx.whole = pieces, x.shape[dim] // outer
        return _torch.result(keep_piece(x, span, dim, outer, pieces))

    @staticmethod
    def backward(ctx, grad):
        if ctx.source == "I":
            whole = gather_pieces(grad, ctx.span, ctx.dim, ctx.outer, "backward", ctx.pieces or ctx.whole)
        else:
            whole = pad_piece(grad, ctx.span, ctx.dim, ctx.outer, ctx.whole, ctx.pieces)
        return whole, None, None, None, None, None


class _Partial(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, span, source):
        ctx.span, ctx.source = span, source
        return _torch.result(keep_on_first(x, span))

    @staticmethod
    def backward(ctx, grad):
        return (grad if ctx.source == "I" else keep_on_first(grad, ctx.span)), None, None
