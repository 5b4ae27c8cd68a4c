"""What casts and comparisons make of masks and places (the table of slot_facts.py): the bits of a capacity,
masks of slots by `==`, masks by `!= 0` and `>= 0`."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

import sympy
import torch
from torch import fx

from tedfx.capture.products import scaled
from tedfx.capture.routing import Fact, Routing, argument, known_of, name_of, number_of, shape_of
from tedfx.capture.slots import (
    Address,
    Bit,
    Counts,
    Drop,
    Mask,
    Numbers,
    Place,
    Scaled,
    Slot,
    SlotFact,
    Straight,
    Term,
    Value,
)
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import operand
from tedfx.placement.sizes import Size, as_size

Known: TypeAlias = Mapping[fx.Node, SlotFact]
Hits: TypeAlias = Mapping[fx.Node, Fact]

COUNTS = (torch.float32, torch.float64, torch.int32, torch.int64)
CASTS = ("to", "_to_copy", "type_as", "float", "long", "int", "bool", "double")
SAME = ("clone", "contiguous", "alias", "lift_fresh_copy", "detach")


def cast(node: fx.Node, fact: SlotFact) -> SlotFact | None:
    dtype = VAL[node].dtype
    if isinstance(fact, (Place, Counts, Scaled, Address)):
        return fact if dtype in COUNTS else None
    if isinstance(fact, Straight):
        return fact if name_of(node) != "detach" and dtype.is_floating_point else None
    if not isinstance(fact, Mask):
        return fact if dtype != torch.bool or isinstance(fact, Drop) else None
    if dtype == torch.bool:
        return _nonzero(node, fact)
    if all(term.exact or term.nonzero for term in fact.terms):
        return fact
    if name_of(node) == "detach" or not dtype.is_floating_point:
        return None
    return scaled(fact, node, fact.dims) if fact.terms[0].plain else fact


def _nonzero(node: fx.Node, fact: Mask) -> Mask | None:
    """1 where the mask is not 0."""
    if fact.terms[0].plain:
        return scaled(fact, node, fact.dims) if all(t.exact for t in fact.terms) else None
    return replace(fact, terms=tuple(t if t.exact else replace(t, nonzero=True) for t in fact.terms))


_FLIPPED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}


def compare(node: fx.Node, known: Known, hits: Hits) -> SlotFact | None:
    name, (left, right) = name_of(node), node.args[:2]
    if not isinstance(known_of(known, left), (Place, Mask)):
        left, right, name = right, left, _FLIPPED[name]
    fact, other = known_of(known, left), known_of(known, right)
    if not isinstance(left, fx.Node):
        return None
    if isinstance(fact, Mask):
        if (name, right) in (("ne", 0), ("gt", 0)) and (
            name == "ne" or all(t.exact or all(_nonnegative(v.node) for v in t.values) for t in fact.terms)
        ):
            return _nonzero(node, fact)
        if (name, right) in (("eq", 0), ("lt", 1)):
            return _not(node, fact)
        return fact if (name, right) in (("eq", 1), ("ge", 1)) and all(t.exact for t in fact.terms) else None
    if not isinstance(fact, Place):
        return None
    if (
        name == "eq"
        and isinstance(other, Numbers)
        and other.size is not None
        and fact.dims
        and fact.dims[-1] == ()
        and shape_of(node)[:-1] == shape_of(left)[:-1]
    ):
        slot = slot_of(fact, left, other.size, other.source, open=True)
        return Mask((*fact.dims[:-1], ("c",)), (in_slot(fact.queue.routing, slot),))
    if isinstance(right, int) and name in ("eq", "ne") and right < fact.first and right == fact.elsewhere:
        name, right = ("lt", fact.first) if name == "eq" else ("ge", fact.first)  # the mark of no place
    if name not in ("lt", "le", "gt", "ge") or shape_of(node) != shape_of(left):
        return None
    limit = number_of(right)
    if (
        limit is None
        and isinstance(right, fx.Node)
        and isinstance(VAL[right], torch.Tensor)
        and VAL[right].dim()
    ):
        return None
    least = limit + (name == "gt") if name in ("gt", "ge") and isinstance(limit, int) else None
    least = limit + (name == "le") if name in ("lt", "le") and isinstance(limit, int) else least
    if least is not None and _below(fact.elsewhere, least) and least <= fact.first:
        # A place has no less than its first number.
        return _chosen(node, fact, least) if name in ("gt", "ge") else None
    inverted = name in ("gt", "ge")
    value = Value(node, fact.dims, inverted)
    if limit is not None and _as_if_whole(fact, as_size(sympy.sympify(limit) + int(name in ("le", "gt")))):
        bit = Bit(
            fact.queue,
            as_size(sympy.sympify(limit) - fact.first + (1 if name in ("le", "gt") else 0)),
            source=value,
        )
    else:
        bit = Bit(node=node, source=value)
    term = Term(fact.queue.routing, values=(value,), guards=frozenset({bit}), exact=True)
    return Drop(fact.dims, term) if inverted else Mask(fact.dims, (term,))


def _as_if_whole(place: Place, limit: Size) -> bool:
    """Whether a place is below a limit where the position in the queue is: where that was cut off, not below
    the limit."""
    if place.guards == place.queue.guards:
        return True
    cut = place.cut
    return (
        cut is not None
        and place.guards - {cut[0]} == place.queue.guards
        and bool(sympy.sympify(cut[1] - limit).is_nonnegative)
    )


def _below(number: Size | None, least: int) -> bool:
    return number is not None and bool(sympy.sympify(number - least).is_negative)


def _chosen(node: fx.Node, place: Place, least: int) -> Mask:
    """The mask of those that have a place: `node`, which is 1 where the place is `least` or more."""
    value = Value(node, place.dims)
    # If it is less wherever a guard is 0, `node` says that all of them are 1; else it is a bit of its own.
    own = frozenset({Bit(node=node, source=value)}) if place.guards else frozenset()
    guards = own | place.guards if _below(place.off, least) and _can_read(place.guards) else own
    values = (value,) if guards else ()
    return Mask(place.dims, (Term(place.queue.routing, hit=True, values=values, guards=guards, exact=True),))


def _can_read(guards: frozenset[Bit]) -> bool:
    return all(bit.source is not None for bit in guards)


def slot_of(place: Place, node: fx.Node, size: Size, count: object, open: bool = False) -> Slot:
    """The slot of a place that is the value of `node`. count: the argument that says how many there are."""
    slot = Slot(
        place.queue,
        place.first,
        place.guards,
        Value(node, place.dims),
        size,
        outside=place.elsewhere,
        off=place.off,
        cut=place.cut,
        count=(count, 0) if isinstance(count, fx.Node) else (None, 0),
        open=open,
    )
    return uncut(slot)


def uncut(slot: Slot) -> Slot:
    """Of a place that was cut off at a number of no slot: whoever is beyond has none."""
    if slot.cut is None or not slot.is_none(slot.cut[1]):
        return slot
    return replace(slot, guards=slot.guards - {slot.cut[0]}, cut=None, open=True)


def in_slot(routing: Routing, slot: Slot) -> Term:
    """The term that is 1 in this slot, with what follows from it: the expert was chosen, if who was not has
    no slot; guards are 1, if others have none."""
    guards = slot.guards - ({slot.cut[0]} if slot.cut else frozenset())
    guards = guards if slot.is_none(slot.off) and _can_read(guards) else frozenset()
    values = sorted((bit.value for bit in guards), key=lambda value: value.node)
    hit = slot.is_none(slot.outside)
    return Term(routing, hit, slot, tuple(values), guards, exact=True, merged=slot.queue.merged)


def _nonnegative(value: object, depth: int = 24) -> bool:
    """Whether a value is provably not below zero."""
    if not isinstance(value, fx.Node):
        return isinstance(value, (int, float)) and value >= 0
    name, sources = name_of(value), value.all_input_nodes
    if not depth or value.op != "call_function":
        return False
    if (
        name in ("softmax", "_softmax", "sigmoid", "relu", "exp", "one_hot", "abs", "square")
        or VAL.get(value) is not None
        and _is_bool(value)
    ):
        return True
    if name == "clamp":
        low = argument(value, "min")
        return isinstance(low, (int, float)) and low >= 0
    if value.target is operator.getitem or name in (
        *CASTS,
        *SAME,
        "mul",
        "add",
        "div",
        "einsum",
        "sum",
        "mean",
        "max",
        "topk",
        "gather",
        "view",
        "reshape",
        "permute",
        "transpose",
        "unsqueeze",
        "squeeze",
        "select",
        "slice",
        "index",
        "where",
        "masked_fill",
    ):
        if name == "masked_fill" and not _nonnegative(value.args[2]):
            return False
        return all(_nonnegative(s, depth - 1) for s in sources) and all(
            not isinstance(a, float) or a >= 0 for a in value.args
        )
    return False


def _is_bool(node: fx.Node) -> bool:
    return isinstance(VAL[node], torch.Tensor) and VAL[node].dtype == torch.bool


def negate(node: fx.Node, known: Known, hits: Hits) -> Mask | Drop | None:
    fact = known.get(operand(node, 0))
    if isinstance(fact, Drop) and _is_bool(node):
        values = (Value(node, fact.dims),) if fact.term.plain else fact.term.values
        return Mask(fact.dims, (replace(fact.term, values=values),))
    return _not(node, fact) if isinstance(fact, Mask) and _is_bool(node) else None


def _not(node: fx.Node, fact: Mask) -> Drop | None:
    """`node` is 1 where the mask is 0."""
    if len(fact.terms) != 1 or not fact.terms[0].exact or fact.terms[0].slot is not None:
        return None
    (term,) = fact.terms
    values = (Value(node, fact.dims, True),) if term.plain else term.values
    return Drop(fact.dims, replace(term, values=values))
