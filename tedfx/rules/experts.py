"""The canonical MoE ops. ``rows`` is a ragged factor; ``experts`` ties the counts to the stacked weights.

Their types have rules of their own (`tedfx/decisions/decide.py`): rows that vary on an expert axis meet
weights that are split over it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

from torch import fx

from tedfx.errors import TraceError, user_line
from tedfx.graph.nodes import argument, op_name, operand, operands
from tedfx.placement.factors import Dim, Factor, unify
from tedfx.placement.sizes import as_size
from tedfx.rules.base import Annotator, Relation, Rule
from tedfx.rules.base import rule as any_rule

ONE = (frozenset({0}),)


def rule(name: str) -> Callable[[Rule], Rule]:
    """A rule of an op whose adjoint (`tedfx/ops/experts.py`) is that of real values."""

    def register(fn: Rule) -> Rule:
        def checked(node: fx.Node, ctx: Annotator) -> Relation:
            if any(n.meta["val"].is_complex() for n in operands(node)):
                raise TraceError(
                    "complex values in experts or their weights have no parallel form | at "
                    f"{user_line(node)} | give experts real values, torch.view_as_real(..).flatten(-2)"
                )
            return fn(node, ctx)

        return any_rule(name)(checked)

    return register


@rule("tedfx.dispatch")
def dispatch(node: fx.Node, ctx: Annotator) -> Relation:
    """``(n, h), (n, k) -> rows (r, h), counts (E), order (r)``."""
    x, ids = operand(node, 0), operand(node, 1)
    ctx.match((x, 0), (ids, 0))
    rows = Factor(as_size(node.meta["val"][0].shape[0]), "rows", ragged=True)
    experts = Factor(int(argument(node, 2)), "experts")
    hidden = ctx.dims(x)[1]
    outs: list[list[Dim]] = [[(rows,), hidden], [(experts,)], [(rows,)]]
    return Relation(
        outs=outs,
        whole={1: ctx.dims(ids)[1]},
        linear=ONE,
        created=(rows, experts),
        kind="dispatch",
    )


@rule("tedfx.grouped_linear")
def grouped_linear(node: fx.Node, ctx: Annotator) -> Relation:
    """``(r, i), (E, o, i), (E) -> (r, o)``."""
    rows, weight, counts = operand(node, 0), operand(node, 1), operand(node, 2)
    transposed = argument(node, 3, "transposed", False)
    o, i = (2, 1) if transposed else (1, 2)
    ctx.match((counts, 0), (weight, 0))
    contracted = ctx.match((rows, 1), (weight, i))
    return Relation(
        out=[ctx.dims(rows)[0], ctx.dims(weight)[o]],
        contracted=contracted,
        linear=(frozenset({0}), frozenset({1})),
        kind="grouped",
    )


@rule("tedfx.expert_rows")
def expert_rows(node: fx.Node, ctx: Annotator) -> Relation:
    """``(E, ..), (E), (r, ..) -> (r, ..)``; the third operand gives the number of rows only."""
    param, counts, rows = operand(node, 0), operand(node, 1), operand(node, 2)
    ctx.match((counts, 0), (param, 0))
    return Relation(out=[ctx.dims(rows)[0]] + ctx.dims(param)[1:], linear=ONE, kind="expert_rows")


@rule("tedfx.combine")
def combine(node: fx.Node, ctx: Annotator) -> Relation:
    """``(r, h), (r), (n, k) -> (n, h)``. The weights are those of the tokens that were dispatched, whatever
    they were made of: an op that needs all of its operands gives its result a dim of its own."""
    rows, order, weights = operand(node, 0), operand(node, 1), operand(node, 2)
    if order.target is operator.getitem and op_name(operand(order, 0)) == "tedfx.dispatch":
        tokens = ctx.dims(operand(operand(order, 0), 0))[0]
        if not unify(tokens, ctx.dims(weights)[0], ctx.may_refine):
            ctx.barrier(weights, 0, tokens)
    out = [ctx.dims(weights)[0], ctx.dims(rows)[1]]
    return Relation(
        out=out, whole={2: ctx.dims(weights)[1]}, linear=(frozenset({0}), frozenset({2})), kind="combine"
    )
