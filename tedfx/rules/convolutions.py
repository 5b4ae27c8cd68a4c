"""Convolutions: of pictures into pieces, and along a sequence."""

from __future__ import annotations

from torch import fx

from tedfx.graph.nodes import argument, op_name, operand, operand_or_none, operands
from tedfx.placement.factors import Dim, Factor
from tedfx.rules.base import Annotator, Relation, flat, rule, shape_of

_SHARED = "aten.conv1d", "aten.conv2d", "aten.conv3d"
_TRANSPOSED = "aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d"


@rule(*_SHARED, *_TRANSPOSED)
def convolution(node: fx.Node, ctx: Annotator) -> Relation:
    """``(n, i, ..), (o, i, ..) -> (n, o, ..)``, of transposed ones ``(n, i, ..), (i, o, ..)``: the batch
    passes, input channels are contracted, output channels are those of the weight, and what a kernel slides
    along is whole. So are the input channels where there is a bias, which must be added once; and in groups
    all channels, since which of them belong together depends on their places."""
    x, w, bias = operand(node, 0), operand(node, 1), operand_or_none(node, 2, "bias")
    transposed = op_name(node) in _TRANSPOSED
    inside, outside = (0, 1) if transposed else (1, 0)
    batched = len(ctx.dims(x)) == len(ctx.dims(w))
    channel = int(batched)
    groups = argument(node, 6, "groups", 1)
    contracted: Dim = ()
    if groups == 1:
        contracted = ctx.match((x, channel), (w, inside))
        if bias is not None:
            ctx.match((w, outside), (bias, 0))
    xs, ws = ctx.dims(x), ctx.dims(w)
    sizes = shape_of(node)
    made: list[Dim] = [() if size == 1 else (Factor(size),) for size in sizes[channel:]]
    whole = {0: flat(xs[channel + 1 :]), 1: flat(ws[2:])}
    created = flat(made[1:])
    if groups == 1:
        made[0] = ws[outside]
        if bias is not None:
            whole, contracted = {0: whole[0] + contracted, 1: whole[1] + contracted}, ()
    else:
        whole = {
            i: flat(ctx.dims(n)[channel:] if i == 0 else ctx.dims(n)) for i, n in enumerate(operands(node))
        }
        created = flat(made)
    each = (frozenset({0}), frozenset({1}))
    return Relation(
        out=xs[:channel] + made,
        whole=whole,
        contracted=contracted,
        created=created,
        linear=each if bias is None else (),
        filled=True,
    )
