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
from tedfx.capture.routing import Fact, argument, known_of, name_of, shape_of
from tedfx.capture.slots import Bit, Drop, Mask, Numbers, Place, Slot, SlotFact, Term, Value
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import operand
from tedfx.placement.sizes import Size, as_size

Known: TypeAlias = Mapping[fx.Node, SlotFact]
Hits: TypeAlias = Mapping[fx.Node, Fact]

COUNTS = (torch.float32, torch.float64, torch.int32, torch.int64)
CASTS = ("to", "_to_copy", "type_as", "float", "long", "int", "bool", "double")
SAME = ("clone", "contiguous", "alias", "lift_fresh_copy", "detach")


def number(value: object) -> Size | None:
    """An int, or the expression of a size; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, fx.Node)):
        return None
    if isinstance(value, int):
        return value
    return as_size(VAL[value]) if isinstance(VAL.get(value), torch.SymInt) else None


def cast(node: fx.Node, fact: SlotFact) -> SlotFact | None:
    dtype = VAL[node].dtype
    if isinstance(fact, Place):
        return fact if dtype in COUNTS else None
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
        place = Value(left, fact.dims)
        slot = Slot(fact.queue, fact.first, fact.guards, place, other.size, beyond=other.source)
        outside = _outside_value(fact)
        hit = outside is not None and outside < 0  # no slot where the expert was not chosen
        return Mask(
            (*fact.dims[:-1], ("c",)),
            (
                Term(
                    fact.queue.routing,
                    hit=hit,
                    slot=slot,
                    exact=True,
                    guards=frozenset(),
                    merged=fact.queue.merged,
                ),
            ),
        )
    if name not in ("lt", "le", "gt", "ge") or shape_of(node) != shape_of(left):
        return None
    limit = number(right)
    if (
        limit is None
        and isinstance(right, fx.Node)
        and isinstance(VAL[right], torch.Tensor)
        and VAL[right].dim()
    ):
        return None
    least = limit + (name == "gt") if name in ("gt", "ge") and isinstance(limit, int) else None
    outside = _outside_value(fact)
    if least is not None and outside is not None and outside < least <= fact.first:
        value = Value(
            node, fact.dims
        )  # a place has no less than its first number; where guards are 0 nothing is known of it
        guards = frozenset({Bit(node=node, source=value)}) if fact.guards else frozenset()
        return Mask(
            fact.dims,
            (
                Term(
                    fact.queue.routing, hit=True, values=(value,) if guards else (), guards=guards, exact=True
                ),
            ),
        )
    inverted = name in ("gt", "ge")
    value = Value(node, fact.dims, inverted)
    if limit is not None and fact.guards == fact.queue.guards:
        bit = Bit(
            fact.queue,
            as_size(sympy.sympify(limit) - fact.first + (1 if name in ("le", "gt") else 0)),
            source=value,
        )
    else:
        bit = Bit(node=node, source=value)
    term = Term(fact.queue.routing, values=(value,), guards=frozenset({bit}), exact=True)
    return Drop(fact.dims, term) if inverted else Mask(fact.dims, (term,))


def _outside_value(place: Place) -> int | None:
    """The number of every (token, choice, expert) that was not chosen; None where it is not known, or where
    the place does not say of each of them whether it was."""
    each = not place.reduced and not place.queue.merged and any("e" in dim for dim in place.dims)
    return place.outside if each else None


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
        return Mask(fact.dims, (replace(fact.term, values=(Value(node, fact.dims),)),))
    if (
        isinstance(fact, Mask)
        and _is_bool(node)
        and len(fact.terms) == 1
        and fact.terms[0].plain
        and fact.terms[0].exact
    ):
        return Drop(fact.dims, replace(fact.terms[0], values=(Value(node, fact.dims, True),)))
    return None
