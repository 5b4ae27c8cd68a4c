"""How many slots the experts of a mixture with a capacity have: what is known of its dispatch before any
token is routed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import fx

from tedfx.graph.nodes import operand
from tedfx.placement.factors import Dim, Factor, leaves
from tedfx.placement.plan import Plan
from tedfx.placement.sizes import Size, as_size, divides, product
from tedfx.placement.types import Placement, Shard, Type


@dataclass(frozen=True)
class Slots:
    """Of one dispatch (`meta["slots"]`): tokens come in **groups**, and of each group an expert takes
    `capacity` tokens at most.

    tokens   for each dim of the tokens, major first: (its size, whether a group runs along it); the other
             dims count the groups
    local    a group runs along the batch of one batch coordinate only, and `capacity` is a function of that
             coordinate's batch (`passes/local_capacity.py`)
    """

    capacity: Size
    tokens: tuple[tuple[Size, bool], ...]
    local: bool = False


class LocalSizes(Protocol):
    """What is asked of the sizes of a local graph (`tedfx/analysis/sizes.py`)."""

    plan: Plan

    def whole(self, expr: Size) -> Size: ...

    def factor(self, factor: Factor, type_: Type) -> Size: ...


def in_slots(dispatch: fx.Node, plan: Plan) -> bool:
    """Whether the groups of a dispatch are whole on a rank once tokens that tensor axes cut are put together:
    then its rows can stand in slots."""
    slots = _slots(dispatch, plan)
    tokens, type_ = _tokens(dispatch)
    own = {a: p for a, p in type_.items() if not (isinstance(p, Shard) and p.factor.root() is plan.cuts(a))}
    return slots is not None and _counted(slots, tokens, own, plan) is not None


def rows_per_expert(dispatch: fx.Node, sizes: LocalSizes) -> Size | None:
    """How many rows of a rank's tokens an expert gets at most, in the rank's own sizes; None where some group
    is not whole on a rank."""
    slots = _slots(dispatch, sizes.plan)
    tokens, type_ = _tokens(dispatch)
    counted = None if slots is None else _counted(slots, tokens, type_, sizes.plan)
    if slots is None or counted is None:
        return None
    rows = slots.capacity if slots.local else sizes.whole(slots.capacity)
    return product([as_size(rows), *(sizes.factor(factor, type_) for factor in counted)])


def _slots(dispatch: fx.Node, plan: Plan) -> Slots | None:
    """The slots of a dispatch; none where some ranks have fewer experts than others, so that what they are
    sent is of no equal size."""
    experts = leaves(dispatch.meta["dims_of"][1][0])[0]
    even = divides(plan.roles.mesh.size(plan.axes_of(experts)), experts.size)
    return dispatch.meta.get("slots") if even else None


def _tokens(dispatch: fx.Node) -> tuple[Dim, Type]:
    """The factors of the tokens that a dispatch is given, and their type."""
    x = operand(dispatch, 0)
    return leaves(x.meta["dims"][0]), x.meta["type"]


def _counted(
    slots: Slots, tokens: Sequence[Factor], type_: Mapping[str, Placement], plan: Plan
) -> list[Factor] | None:
    """The factors of the tokens that count groups; None where an axis shards one along which a group runs,
    and the shard is not a group by itself."""
    split: list[tuple[Factor, bool]] = []
    left = list(tokens)
    for size, inside in slots.tokens:
        taken: Size = 1
        while taken != size and left:
            split.append((left.pop(0), inside))
            taken = product((taken, split[-1][0].size))
        if taken != size:
            return None  # a dim of the model's tokens is no product of factors
    sharded = {
        axis: placement.factor.root() for axis, placement in type_.items() if isinstance(placement, Shard)
    }
    batch = plan.roles.mesh.wide(plan.roles.batch)
    if slots.local and any(axis not in sharded for axis in batch):
        return None
    for factor, inside in split:
        if inside and any(
            found is factor.root() and not (slots.local and axis in batch) for axis, found in sharded.items()
        ):
            return None
    return [factor for factor, inside in split if not inside]
