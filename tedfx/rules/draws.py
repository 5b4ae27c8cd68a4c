"""Ops that draw at random, element by element (`tedfx/graph/draws.py`). An element's draw is a function of
its global index, so each rank draws its own part of any dim."""

from __future__ import annotations

from torch import fx

from tedfx.graph.draws import NAMES, drawn
from tedfx.graph.nodes import argument, operand, operands
from tedfx.rules.base import Annotator, Relation, flat, rule, whole_everywhere
from tedfx.rules.pointwise import broadcast


@rule(*NAMES)
def draw(node: fx.Node, ctx: Annotator) -> Relation:
    """As large as the operands are, or as the sizes say."""
    made = drawn(node)
    if made is None:  # which `passes/localize.py` refuses
        return whole_everywhere(node, ctx)
    if made.shape == "values":
        return Relation(out=broadcast(ctx, operands(node)))
    if made.shape == "like":
        return Relation(out=ctx.dims(operands(node)[0]), kind="like")
    out = [ctx.dim_of(s) for s in node.meta["val"].shape]
    return Relation(out=out, created=flat(out), kind="create")


@rule("aten.multinomial")
def multinomial(node: fx.Node, ctx: Annotator) -> Relation:
    """weights[.., E] -> [.., k]: a row's choices depend on the whole row."""
    *rows, entries = ctx.dims(operand(node, 0))
    choices = ctx.dim_of(argument(node, 1, "num_samples"))
    return Relation(out=[*rows, choices], whole={0: entries}, created=choices)
