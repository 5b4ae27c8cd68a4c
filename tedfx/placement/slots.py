"""How many slots the experts of a mixture with a capacity have: what is known of its dispatch before any
token is routed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
from torch import fx

from tedfx.placement.factors import Factor, as_size, leaves
from tedfx.placement.plan import Plan
from tedfx.placement.types import Shard


@dataclass(frozen=True)
class Slots:
    """Of one dispatch (`meta["slots"]`): tokens come in **groups**, and of each group an expert takes
    `capacity` tokens at most.

    tokens   for each dim of the tokens, major first: (its size, whether a group runs along it); the other
             dims count the groups
    local    a group runs along the batch of one batch coordinate only, and `capacity` is a function of that
             coordinate's batch (`passes/local_capacity.py`)
    """

    capacity: "int | sympy.Expr"
    tokens: tuple[tuple["int | sympy.Expr", bool], ...]
    local: bool = False


def in_slots(dispatch: fx.Node, plan: Plan) -> bool:
    """Whether the groups of a dispatch are whole on a rank once tokens that tensor axes cut are put together:
    then its rows can stand in slots."""
    x = dispatch.args[0]
    own = {
        a: p
        for a, p in x.meta["type"].items()
        if not (isinstance(p, Shard) and p.factor.root() is plan.cuts(a))
    }
    return (
        "slots" in dispatch.meta
        and _counted(dispatch.meta["slots"], leaves(x.meta["dims"][0]), own, plan) is not None
    )


def rows_per_expert(dispatch: fx.Node, sizes) -> "int | sympy.Expr | None":
    """How many rows of a rank's tokens an expert gets at most, in the rank's own sizes (`Sizes`); None where
    some group is not whole on a rank."""
    x, slots = dispatch.args[0], dispatch.meta.get("slots")
    counted = (
        None if slots is None else _counted(slots, leaves(x.meta["dims"][0]), x.meta["type"], sizes.plan)
    )
    if counted is None:
        return None
    rows = slots.capacity if slots.local else sizes.whole(slots.capacity)
    for factor in counted:
        rows = rows * sizes.factor(factor, x.meta["type"])
    return as_size(rows)


def _counted(slots: Slots, tokens: Sequence[Factor], type_: Mapping, plan: Plan) -> list[Factor] | None:
    """The factors of the tokens that count groups; None where an axis shards one along which a group runs,
    and the shard is not a group by itself."""
    split, left = [], list(tokens)
    for size, inside in slots.tokens:
        product = 1
        while product != size and left:
            split.append((left.pop(0), inside))
            product = as_size(product * split[-1][0].size)
        if product != size:
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
