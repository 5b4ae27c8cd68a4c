"""Ops that make a value from sizes. A created dim takes the shard that the plan gives its factor; `arange`
keeps global numbers."""

from __future__ import annotations

from torch import fx

from tedfx.graph.nodes import op_name, operands
from tedfx.rules.base import Annotator, Relation, flat, rule


@rule(
    "aten.zeros",
    "aten.ones",
    "aten.full",
    "aten.empty",
    "aten.arange",
    "aten.scalar_tensor",
    "aten.new_zeros",
    "aten.new_ones",
    "aten.new_full",
    "aten.new_empty",
    "aten.eye",
    "aten.linspace",
    "aten.lift_fresh_copy",
)
def create(node: fx.Node, ctx: Annotator) -> Relation:
    """From sizes alone; an operand (``new_*``) gives only dtype and device. Ranges and identities are created
    whole unless their size is an input dim."""
    out = [ctx.dim_of(s) for s in node.meta["val"].shape]
    if op_name(node) in ("aten.eye", "aten.linspace"):  # numbers that depend on the whole size
        out = [ctx.fresh(d) for d in out]
        return Relation(out=out, created=flat(out))
    if op_name(node) == "aten.lift_fresh_copy":
        return Relation(out=ctx.dims(operands(node)[0]))
    return Relation(out=out, created=flat(out), kind="create")


@rule(
    "aten.zeros_like",
    "aten.ones_like",
    "aten.full_like",
    "aten.empty_like",
)
def like(node: fx.Node, ctx: Annotator) -> Relation:
    return Relation(out=ctx.dims(operands(node)[0]), kind="like")
