"""The typing rule of an op with a gradient of the user's own: what `Relation.complete` and
`Relation.constant` add to the general rule.
"""

from __future__ import annotations

from tedfx.decisions.general import general
from tedfx.placement.plan import Decision
from tedfx.placement.types import I, P, R


def own_gradient(node, axis, types, plan, relation, reduced=lambda position: False) -> Decision:
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
