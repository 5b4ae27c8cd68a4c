"""ZeRO-3's gather: whole parameters from the ranks' shares, several by one collective.

The shares of a bucket lie side by side in one row per rank (`tedfx.ops.cuts.Cut`). The adjoint is a
reduce-scatter of the gradients of all of them: S -> R.

In eager mode a call of a `ParallelModule` has a **store** (`tedfx/runtime/gathers.py`) that launches gathers
ahead and takes the gradients; then autograd only passes through here. In a compiled graph both collectives
are in the graph.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tedfx import _torch
from tedfx.ops import context
from tedfx.ops.context import Axes, Span
from tedfx.ops.cuts import Cut
from tedfx.ops.properties import GATHER_PARAMETERS, SCATTER_GRADIENTS, Moves, op

GATHER, SCATTER = "gather_parameters", "scatter_gradients"  # as they are counted


@op(forward=Moves(GATHER_PARAMETERS, "other"), backward=Moves(SCATTER_GRADIENTS, "other"), saves=())
def gather_parameters(
    shares: list[Tensor],
    axes: Axes,
    cuts: tuple[tuple, ...],
    number: int = 0,
    summed_in: torch.dtype | None = None,
) -> list[Tensor]:
    """S -> R of each: this rank's shares, of any shapes and one dtype -> the whole local tensors.

    `cuts`: a `Cut` each, as tuples. `number`: of this gather in its graph.

    Backward sums the gradients over `axes`, in the dtype `summed_in` (by default their own), and keeps this
    rank's share of each, in the share's dtype.
    """
    span, each = context.span(axes), [Cut(*cut).at(context.current().coordinate) for cut in cuts]
    if not torch.compiler.is_compiling() and (store := context.current().store) is not None:
        return store.gather(number, shares)
    if not any(
        x.requires_grad for x in shares
    ):  # the dynamo of torch 2.11 calls such a Function's forward without its ctx
        return wholes(gathered(pack(shares, each), span), each)
    return list(_Gather.apply(span, each, summed_in, *shares))


def pack(shares, cuts: Sequence[Cut]) -> Tensor:
    """The shares as one row."""
    return torch.cat([cut.padded(x) for cut, x in zip(cuts, shares)])


def gathered(row: Tensor, span: Span) -> Tensor:
    """[ranks, width of all]"""
    context.record(GATHER, span.axes, "forward", row)
    return _torch.all_gather(row, span.size, span.name).view(span.size, row.shape[0])


def wholes(rows: Tensor, cuts: Sequence[Cut]) -> list[Tensor]:
    """The whole tensors, each with a storage of its own."""
    return [_own(cut.collect(part)) for cut, part in zip(cuts, rows.split([cut.width for cut in cuts], 1))]


def _own(x: Tensor) -> Tensor:
    return (
        x
        if torch.compiler.is_compiling() or x.untyped_storage().nbytes() == x.numel() * x.element_size()
        else x.clone()
    )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, span, cuts, summed_in, *shares):
        ctx.span, ctx.cuts, ctx.summed_in, ctx.shapes = span, cuts, summed_in, [x.shape for x in shares]
        ctx.needed = [x.requires_grad for x in shares]
        return tuple(wholes(gathered(pack(shares, cuts), span), cuts))

    @staticmethod
    def backward(ctx, *grads):
        rows = torch.cat([cut.spread(g) for cut, g in zip(ctx.cuts, grads)], 1)
        dtype = rows.dtype
        rows = rows if ctx.summed_in is None else rows.to(ctx.summed_in)
        context.record(SCATTER, ctx.span.axes, "backward", rows)
        mine = _torch.reduce_scatter(rows.view(-1), ctx.span.size, ctx.span.name)
        parts = mine.to(dtype).split([cut.width for cut in ctx.cuts])
        found = [
            part[: shape.numel()].view(shape) if needed else None
            for part, shape, needed in zip(parts, ctx.shapes, ctx.needed)
        ]
        return None, None, None, *found


__all__ = ["gather_parameters"]
