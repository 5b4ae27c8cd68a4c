"""Whether what is read for assignments that were not kept is left out of all results.

    y = done[address] * (weight * keep).unsqueeze(-1)

Followed from the read through what keeps an assignment's row to itself, until it meets a factor that is zero
there.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from tedfx.capture.letters import contraction_of
from tedfx.capture.picks import Picks
from tedfx.capture.routing import Dims, moved, name_of, shape_of
from tedfx.capture.scattered import by_bits, zero_where
from tedfx.capture.slot_addresses import unmet
from tedfx.capture.slots import Bit, SlotFact, sizes_of
from tedfx.graph.nodes import is_tensor

__all__ = ["SHAPES", "masked"]

SHAPES = (
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "new_empty",
    "new_zeros",
    "new_ones",
    "new_full",
)

_SAME = ("to", "_to_copy", "clone", "contiguous")


def masked(
    node: fx.Node, dims: Dims, needed: frozenset[Bit], known: Mapping[fx.Node, SlotFact], picks: Picks
) -> fx.Node | None:
    """The first use of a value by assignment (`dims` are the labels of all its dims but the last) that may
    see what it is where one of the needed bits is 0; None if there is none."""
    if not needed:
        return None
    for user in node.users:
        if not is_tensor(user) or name_of(user) in SHAPES:
            continue
        wrong = _used(user, node, dims, needed, known, picks)
        if wrong is not None:
            return wrong
    return None


def _used(
    user: fx.Node,
    node: fx.Node,
    dims: Dims,
    needed: frozenset[Bit],
    known: Mapping[fx.Node, SlotFact],
    picks: Picks,
) -> fx.Node | None:
    name = name_of(user)
    if name in _SAME:
        return masked(user, dims, needed, known, picks)
    if name in ("mul", "where", "masked_fill") and shape_of(user) == shape_of(node):
        left = unmet(needed, zero_where(user, dims, known))
        return masked(user, dims, left, known, picks) if name == "mul" or left != needed else user
    pick = picks.of(user)
    if pick is not None and pick.value is node:
        if pick.mask is None:
            return masked(user, dims, needed, known, picks) if pick.order is None else user
        return user if unmet(needed, by_bits(pick.mask, dims, known)) else None
    parsed = contraction_of(user)
    if parsed is not None:
        (left, mine), (right, theirs), _ = parsed
        if right is node:
            (left, mine), (right, theirs) = (right, theirs), (left, mine)
        if left is not node or right is node:
            return user
        labels = dict(zip(mine, dims))
        own = tuple(labels.get(letter, ()) for letter in theirs)
        fact = known.get(right)
        if fact is None or getattr(fact, "dims", None) != own:
            return user
        return user if unmet(needed, by_bits(right, own, known)) else None
    if dims and (routing := _sizes(needed, known)) is not None:
        width = shape_of(node)[-1]
        laid = moved(user, name, (*dims, ("h",)), {**routing, "h": width})
        if laid is not None and laid[-1:] == (("h",),):
            return masked(user, laid[:-1], needed, known, picks)
    return user


def _sizes(needed: frozenset[Bit], known: Mapping[fx.Node, SlotFact]) -> Mapping | None:
    """The sizes of the labels of the routing that the bits are about."""
    for bit in needed:
        if bit.queue is not None:
            return bit.queue.routing.sizes
        fact = known.get(bit.value.node)
        if fact is not None:
            return sizes_of(fact)
    return None
