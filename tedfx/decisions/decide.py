"""The typing rules: from the types of a node's operands to conversions and the type of its output, one mesh
axis at a time.

`decide` is the whole theory. It is used twice: ``passes/place.py`` inserts the conversions it asks for,
``passes/check_types.py`` runs it again on the finished graph and demands that it asks for none. Axes are
independent, so a mesh of any number of axes needs nothing more.

The general rule, for one axis (`general`):

1. A sharded factor that the op passes, contracts or absorbs is chosen; all operands that carry it are sharded
   by it, the other differentiable operands are R (not I: their cotangent is a partial sum). Output: S where
   the factor survives, P where it is contracted, I where absorbed.
2. Else, partial sums pass where the op is linear in them, as far as the collective algebra says so: jointly
   (``add``: all P; a bias goes to P), or in one operand (the others are R), as long as that does not enlarge
   what is reduced.
3. Else everything is replicated: I where no differentiable operand is R, otherwise R.

On a tensor axis the **token factor** may be sharded beside the plan's factors (sequence parallelism): it
gives way to any other sharded factor, and a partial sum that would be reduced is scattered along it instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from tedfx.decisions import experts as placing_experts
from tedfx.decisions.general import general, nothing_reduced
from tedfx.decisions.own_gradient import own_gradient
from tedfx.graph.nodes import argument, op_name, operand, operands
from tedfx.placement.factors import Factor, leaves
from tedfx.placement.plan import Decision, Plan, differentiable, roots
from tedfx.placement.types import I, Placement, R, Shard
from tedfx.rules import Relation


def decide(
    node: fx.Node,
    axis: str,
    types: Sequence[Placement],
    plan: Plan,
    reduced: Callable[[int], bool] = nothing_reduced,
) -> Decision:
    """The decision for one node and axis. ``types``: operand placements; ``reduced(position)``: whether the
    operand's sum is available already."""
    relation: Relation = node.meta["relation"]
    special = _KINDS.get(relation.kind)
    if special is not None:
        return special(node, axis, types, plan, relation)
    if relation.complete or relation.constant:
        return own_gradient(node, axis, types, plan, relation, reduced)
    return general(node, axis, types, plan, relation, reduced)


# Special rules ----------------------------------------------------------------------------------------------
def _getitem(
    node: fx.Node, axis: str, types: Sequence[Placement], plan: Plan, relation: Relation
) -> Decision:
    return Decision([], [operand(node, 0).meta["types_of"][argument(node, 1)][axis]])


def _create(node: fx.Node, axis: str, types: Sequence[Placement], plan: Plan, relation: Relation) -> Decision:
    factor = plan.chosen(axis, relation.out)
    if factor is not None and _read_whole(node, factor):
        factor = None
    if (
        factor is not None
        and op_name(node) == "aten.arange"
        and leaves(relation.out[0])[0].root() is not factor.root()
    ):
        factor = None  # the numbers of a strided shard are not one run: made whole, sliced where it is used
    return Decision([None for _ in types], [I if factor is None else Shard(factor)])


def _running(
    node: fx.Node, axis: str, types: Sequence[Placement], plan: Plan, relation: Relation
) -> Decision:
    """A running sum has a parallel form over the batch's shards; tokens cut besides are put together for
    it."""
    cut = plan.cuts(axis)
    if cut is not None and types[0] == Shard(cut):
        want = R if differentiable(operands(node)[0]) else I
        return Decision([want], [want if differentiable(node) else I])
    return general(node, axis, types, plan, relation)


def _like(node: fx.Node, axis: str, types: Sequence[Placement], plan: Plan, relation: Relation) -> Decision:
    came = types[0]
    if isinstance(came, Shard) and _read_whole(node, came.factor):
        return Decision([I, *[None for _ in types[1:]]], [I])  # its sizes are those of its operand
    return Decision([None for _ in types], [came if isinstance(came, Shard) else I])


def _read_whole(node: fx.Node, factor: Factor) -> bool:
    """Whether all that reads a new value needs it whole along a factor: then it is made so."""
    uses = [
        factor.root() in roots(user.meta["relation"].whole.get(i, ()))
        for user in node.users
        if "relation" in user.meta
        for i, x in enumerate(operands(user))
        if x is node
    ]
    return bool(uses) and all(uses)


_KINDS: dict[str, Callable[[fx.Node, str, Sequence[Placement], Plan, Relation], Decision]] = {
    "getitem": _getitem,
    "create": _create,
    "like": _like,
    "running": _running,
    "dispatch": placing_experts.dispatch,
    "grouped": placing_experts.grouped,
    "expert_rows": placing_experts.expert_rows,
    "combine": placing_experts.combine,
}
