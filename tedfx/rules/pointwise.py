"""Elementwise ops: dims unify with broadcasting. Linearity (where a partial sum may pass) is listed; all
others are not linear."""

from __future__ import annotations

from torch import fx

from tedfx.dtypes import has_gradient
from tedfx.graph.nodes import argument, is_tensor, op_name, operand_or_none, operands
from tedfx.placement.factors import Dim
from tedfx.rules.base import Annotator, Relation, flat, rule


def broadcast(ctx: Annotator, nodes: list[fx.Node]) -> list[Dim]:
    """The dims of what these values are broadcast to."""
    rank = max((len(ctx.dims(n)) for n in nodes), default=0)
    out: list[Dim] = []
    for d in range(rank):
        places = [(n, d - rank + len(ctx.dims(n))) for n in nodes if d - rank + len(ctx.dims(n)) >= 0]
        out.append(ctx.match(*places))
    return out


def linear_groups(node: fx.Node) -> tuple[frozenset[int], ...]:
    name, tensors = op_name(node), operands(node)
    first = frozenset({0})
    floats = has_gradient(node.meta["val"].dtype)
    if name in ("aten.add", "aten.sub"):
        return (frozenset({0, 1}),) if len(tensors) == 2 else ()
    if name == "aten.mul":
        return (first, frozenset({1})) if len(tensors) == 2 else (first,)
    if name == "aten.div":
        plain = argument(node, 2, "rounding_mode") is None and is_tensor(node.args[0])
        return (first,) if plain else ()
    if name in ("aten.neg", "aten.clone", "aten.contiguous", "aten.detach", "aten.alias", "aten.positive"):
        return (first,)
    if name in ("aten.to", "aten._to_copy", "aten.type_as"):
        return (first,) if floats else ()
    if name == "aten.where" and len(node.args) == 3:
        if is_tensor(node.args[1]) and is_tensor(node.args[2]):
            return (frozenset({1, 2}),)
        if is_tensor(node.args[1]) and node.args[2] == 0:
            return (frozenset({1}),)
        return (frozenset({1}),) if is_tensor(node.args[2]) and node.args[1] == 0 else ()
    if name == "aten.masked_fill":
        return (first,) if not is_tensor(node.args[2]) and node.args[2] == 0 else ()
    if name == "aten.dropout":
        return (first,)
    return ()


@rule(
    "aten.to",
    "aten._to_copy",
    "aten.type_as",
    "aten.clone",
    "aten.contiguous",
    "aten.detach",
    "aten.alias",
    "aten.dropout",
    "aten.masked_fill",
    "aten.where",
    "aten.silu",
    "aten.gelu",
    "aten.relu",
    "aten.sigmoid",
    "aten.tanh",
    "aten.clamp",
    "aten.lerp",
    "aten.addcmul",
    "aten.addcdiv",
    "aten.rsub",
    "aten.true_divide",
    "aten.square",
    "aten.float_power",
    "aten.isin",
    "aten.positive",
    "aten.hardtanh",
    "aten.relu6",
    "aten.mish",
    "aten.softplus",
    "aten.elu",
    "aten.leaky_relu",
    "aten.logical_and",
    "aten.logical_or",
    "aten.logical_not",
    "aten.logical_xor",
    "aten.floor_divide",
    "aten.remainder",
    "aten.nan_to_num",
    "aten.__and__",
    "aten.__or__",
    "aten.bitwise_not",
    "aten.log_sigmoid",
)
def pointwise(node: fx.Node, ctx: Annotator) -> Relation:
    """Any elementwise op (also every op that torch tags as pointwise)."""
    if op_name(node) == "aten.isin":
        return isin(node, ctx)
    if op_name(node) == "aten.type_as" or (op_name(node) == "aten.to" and len(operands(node)) == 2):
        out = broadcast(ctx, operands(node)[:1])
        extra = {1: flat(ctx.dims(operands(node)[1]))} if len(operands(node)) > 1 else dict[int, Dim]()
        return Relation(out=out, whole=extra, linear=linear_groups(node))
    return Relation(out=broadcast(ctx, operands(node)), linear=linear_groups(node))


def isin(node: fx.Node, ctx: Annotator) -> Relation:
    """Each element against all the test elements: those are whole."""
    elements, tested = operand_or_none(node, 0), operand_or_none(node, 1)
    if not is_tensor(elements):
        return Relation()
    return Relation(ctx.dims(elements), whole={1: flat(ctx.dims(tested))} if is_tensor(tested) else {})
