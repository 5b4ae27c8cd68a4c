"""Masks of slots made from places, and products and sums of masks (the table of slot_facts.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import sympy
import torch
from torch import fx

from tedfx.capture.letters import Letters, einsum_letters
from tedfx.capture.products import chosen_place, multiply, reduce
from tedfx.capture.routing import argument, dim_of, known_of, name_of, number_of, shape_of
from tedfx.capture.slot_comparisons import Hits, Known, in_slot, slot_of, uncut
from tedfx.capture.slots import Drop, Mask, Place, SlotFact, Term, Totals, Value
from tedfx.graph import nodes
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import operand, overload
from tedfx.placement.sizes import Size, as_size


def one_hot(node: fx.Node, known: Known, hits: Hits) -> Mask | None:
    fact = known.get(operand(node, 0))
    if not isinstance(fact, Place):
        return None
    slot = slot_of(fact, operand(node, 0), shape_of(node)[-1], nodes.argument(node, 1))
    return Mask((*fact.dims, ("c",)), (in_slot(fact.queue.routing, slot),))


def scatter(node: fx.Node, known: Known, hits: Hits) -> Mask | None:
    """Ones scattered into zeros at places."""
    places, rank = operand(node, 2), len(shape_of(node))
    fact, dim = known.get(places), dim_of(node, rank)
    if (
        not isinstance(fact, Place)
        or dim is None
        or name_of(node.args[0]) not in ("zeros", "zeros_like", "new_zeros")
        or len(fact.dims) != rank
    ):
        return None
    source = argument(node, "src" if "src" in overload(node) else "value")
    dims = (*fact.dims[:dim], ("c",), *fact.dims[dim + 1 :])
    if (
        source != 1
        or fact.dims[dim] != ()
        or any(a != b for d, (a, b) in enumerate(zip(shape_of(node), shape_of(places))) if d != dim)
    ):
        return None
    return Mask(dims, (in_slot(fact.queue.routing, slot_of(fact, places, shape_of(node)[dim], None)),))


def slots_between(node: fx.Node, known: Known, hits: Hits) -> Mask | None:
    """`mask[..., 1:]`, `mask[..., :-1]`: the slots that are left are counted from zero."""
    fact = known.get(operand(node, 0))
    if not isinstance(fact, Mask) or argument(node, "step") != 1:
        return None
    dim = dim_of(node, len(fact.dims), default=0)
    start, end = argument(node, "start") or 0, argument(node, "end")
    if dim is None or fact.dims[dim] != ("c",) or any(t.nonzero for t in fact.terms):
        return None
    if not isinstance(start, int) or start < 0:
        return None
    whole, size = shape_of(operand(node, 0))[dim], shape_of(node)[dim]
    return Mask(
        fact.dims,
        tuple(between(term, start, size, as_size(whole - start - size), end) for term in fact.terms),
    )


def between(term: Term, start: int, size: Size, short: Size, end: object) -> Term:
    """A term of which `start` slots are left out before, and `short` behind: up to `end`."""
    old = term.own_slot
    minus = lambda x: None if x is None else as_size(x - start)
    count, plus = old.count
    if isinstance(end, fx.Node) and short != 0:
        count, plus = end, 0
    elif isinstance(short, int):
        plus -= short
    slot = replace(
        old,
        first=old.first - start,
        start=old.start + start,
        size=size,
        outside=minus(old.outside),
        off=minus(old.off),
        cut=None if old.cut is None else (old.cut[0], minus(old.cut[1])),
        count=(count, plus - start),
        open=old.open or short != 0 or old.first < start,
    )
    own = in_slot(term.routing, uncut(slot))
    values = term.values + tuple(v for v in own.values if v not in term.values)
    return replace(
        term, slot=own.slot, hit=term.hit or own.hit, values=values, guards=own.guards | term.guards
    )


def mul(node: fx.Node, known: Known, hits: Hits) -> Mask | Place | None:
    return _elementwise(node, node.args[:2], known, divides=name_of(node) == "div")


def _elementwise(
    node: fx.Node, operands: Sequence[object], known: Known, divides: bool = False
) -> Mask | Place | None:
    """A product of operands that broadcast: their letters are the places of their dims, from the right."""
    letters = [str(d) for d in range(len(shape_of(node)))]

    def own(x: object) -> Letters:
        rank = len(shape_of(x)) if isinstance(x, fx.Node) and isinstance(VAL[x], torch.Tensor) else 0
        return letters[len(letters) - rank :]

    return multiply(node, [(x, own(x)) for x in operands], letters, known, divides)


def where(node: fx.Node, known: Known, hits: Hits) -> Mask | Place | None:
    """`where(bit, mask, 0)`, `where(mask, place, -1)`, `where(place >= capacity, -1, place)`."""
    if len(node.args) != 3:
        return None
    bits, value, other = node.args
    if isinstance(drop := known_of(known, bits), Drop):
        value, other, known = other, value, _kept(bits, drop, known)
    return _instead(node, bits, value, other, known)


def masked_fill(node: fx.Node, known: Known, hits: Hits) -> Mask | Place | None:
    """`mask.masked_fill(place >= capacity, 0)`, `place.masked_fill(~mask, -1)`."""
    drop = known.get(operand(node, 1))
    if not isinstance(drop, Drop):
        return None
    return _instead(node, node.args[1], node.args[0], node.args[2], _kept(node.args[1], drop, known))


def _kept(node: object, drop: Drop, known: Known) -> Known:
    return {**known, node: Mask(drop.dims, (drop.term,))} if isinstance(node, fx.Node) else known


def _instead(node: fx.Node, bits: object, value: object, other: object, known: Known) -> Mask | Place | None:
    """`value` where the bits are 1, else the number `other`."""
    place, mask, number = known_of(known, value), known_of(known, bits), same_everywhere(other)
    if number == 0:
        return _elementwise(node, (value, bits), known)
    if number is None or not isinstance(place, Place) or not isinstance(mask, Mask):
        return None
    found = _elementwise(node, (value, bits), known)
    return chosen_place(place, mask, found.dims, number) if isinstance(found, Place) else None


def same_everywhere(value: object) -> Size | None:
    """The number that a value has everywhere."""
    if not isinstance(value, fx.Node):
        return 0 if value in (0, False) else number_of(value)
    if not isinstance(VAL.get(value), torch.Tensor):
        return number_of(value)
    name = name_of(value)
    if name in ("zeros", "zeros_like", "new_zeros"):
        return 0
    if name in ("ones", "ones_like", "new_ones"):
        return 1
    return number_of(argument(value, "fill_value")) if name in ("full", "full_like", "new_full") else None


def total(node: fx.Node, known: Known, hits: Hits) -> SlotFact | None:
    fact = known.get(operand(node, 0))
    if fact is None or argument(node, "dim") is None:
        return None
    rank = len(fact.dims)
    given = argument(node, "dim")
    over = {d % rank for d in (given if isinstance(given, (list, tuple)) else [given])}
    keep = bool(argument(node, "keepdim"))
    dims = tuple(() if d in over else dim for d, dim in enumerate(fact.dims) if d not in over or keep)
    found = reduce(fact, {x for d in over for x in fact.dims[d]}, dims, node)
    if isinstance(found, Totals):
        return replace(
            found, totals=frozenset(replace(t, source=Value(node.args[0], fact.dims)) for t in found.totals)
        )
    return found


def largest(node: fx.Node, known: Known, hits: Hits) -> Place | None:
    """The largest place over the experts, of one that is less where the expert was not chosen."""
    if name_of(node) == "getitem":
        node, wanted = operand(node, 0), nodes.argument(node, 1)
        if name_of(node) != "max" or wanted != 0:
            return None
    fact = known.get(operand(node, 0))
    given = argument(node, "dim")
    given = given if isinstance(given, (list, tuple)) else [given]
    if not isinstance(fact, Place) or len(given) != 1 or not isinstance(given[0], int):
        return None
    dim, outside = given[0] % len(fact.dims), fact.elsewhere
    if fact.dims[dim] != ("e",) or not isinstance(outside, int) or outside > fact.first:
        return None
    dims = (*fact.dims[:dim], *([()] * bool(argument(node, "keepdim"))), *fact.dims[dim + 1 :])
    off = max(fact.off, outside) if isinstance(fact.off, int) else None
    if fact.cut is not None and not sympy.sympify(fact.cut[1] - outside).is_nonnegative:
        fact, off = replace(fact, cut=None), None
    return replace(fact, dims=dims, outside=None, off=off, reduced=True)


def einsum(node: fx.Node, known: Known, hits: Hits) -> SlotFact | None:
    parsed, operands = einsum_letters(node), list(nodes.argument(node, 1))
    if parsed is None or not any(x in known for x in operands):
        return None
    terms, right = parsed
    letters = list(dict.fromkeys([*right, *"".join(terms)]))
    whole = multiply(node, [(x, list(t)) for x, t in zip(operands, terms)], letters, known)
    if whole is None or len(letters) == len(right):
        return whole
    gone = {x for letter, dim in zip(letters, whole.dims) if letter not in right for x in dim}
    return reduce(whole, gone, whole.dims[: len(right)], node)
