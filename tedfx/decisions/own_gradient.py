"""The typing rule of an op with a gradient of the user's own: what `Relation.complete` and
`Relation.constant` add to the general rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from tedfx.decisions.general import general, nothing_reduced
from tedfx.placement.plan import Decision, Plan
from tedfx.placement.types import I, P, Placement, R
from tedfx.rules import Relation


def own_gradient(
    node: fx.Node,
    axis: str,
    types: Sequence[Placement],
    plan: Plan,
    relation: Relation,
    reduced: Callable[[int], bool] = nothing_reduced,
) -> Decision:
    """The general rule, but

    complete  R counts as I: where everything is replicated the op gets whole cotangents. (Of an op that
    shards a factor, operands without it are R as ever: their gradients are
              partial sums over what was sharded, which the op computes from whole cotangents.)
    constant  such an operand has no part in the decision. Its gradient is one number, replicated, which
    fits I and P but not R; it is P where it is one already, or is R, and nobody reads it,
              so that no sum of it is ever made.
    """
    apart = relation.constant
    shown = [I if i in apart or (relation.complete and t == R) else t for i, t in enumerate(types)]
    decision = general(node, axis, shown, plan, relation, reduced)
    targets = list(decision.targets)
    for i in apart:
        targets[i] = P if i in relation.unread and types[i] in (P, R) else I
    return Decision(targets, decision.out)
