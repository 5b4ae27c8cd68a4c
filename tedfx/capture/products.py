"""Products and sums of masks and places (terms: slots.py).

A product has **letters**: one per dim, as in an einsum; equal letters are one dim. Labels of a letter come
from the operands that are masks or places; an operand of which nothing is known is a value, and may not widen
a mask by a dim that has no label.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace

import torch
from torch import fx

from tedfx.capture.routing import Dims, Sizes, is_bits, known_of, product, shape_of
from tedfx.capture.slots import Bit, Mask, Place, SlotFact, Term, Total, Totals, Value, sizes_of
from tedfx.graph.facts import VAL
from tedfx.placement.sizes import Size

__all__ = ["multiply", "reduce", "scaled"]


def scaled(fact: Mask, node: fx.Node, dims: Dims) -> Mask | None:
    """A value by token that was computed on: `node` is the value now."""
    if len(fact.terms) != 1:
        return None
    return Mask(dims, (replace(fact.terms[0], values=(Value(node, dims),)),))


def multiply(
    node: fx.Node,
    operands: Sequence[tuple[object, Sequence[str]]],
    letters: Sequence[str],
    known: Mapping[fx.Node, SlotFact],
    divides: bool = False,
) -> Mask | Place | None:
    """The product of (operand, its letters), before any sum; `divides`: by the second."""
    labels: dict[str, tuple[str, ...]] = {}
    found: list[Mask | Place | None] = []
    for x, own in operands:
        fact = known_of(known, x)
        fact = fact if isinstance(fact, (Mask, Place)) else None
        found.append(fact)
        for letter, dim in zip(own, fact.dims if fact is not None else ()):
            if dim and labels.setdefault(letter, dim) != dim:
                return None
    if not any(found) or (divides and found[1] is not None and found[0] is None):
        return None
    places = [f for f in found if isinstance(f, Place)]
    masks = [f for f in found if isinstance(f, Mask)]
    routings = {t.routing for m in masks for t in m.terms if not t.plain} | {p.queue.routing for p in places}
    if not routings:
        routings = {t.routing for m in masks[:1] for t in m.terms}
    out = tuple(labels.get(letter, ()) for letter in letters)
    if places:
        if len(places) > 1 or len(masks) != 1 or len(operands) != 2 or divides:
            return None
        return chosen_place(places[0], masks[0], out, 0)
    total: list[Term] | None = None
    values: list[Value] = []
    sizes = {k: v for m in masks for k, v in sizes_of(m).items()}
    for (x, own), fact in zip(operands, found):
        divisor = divides and fact is found[-1] and x is operands[-1][0]
        if (
            isinstance(fact, Mask)
            and not divisor
            and not (all(t.plain for t in fact.terms) and fact.terms[0].routing not in routings)
        ):
            total = list(fact.terms) if total is None else _times(total, fact.terms)
            if total is None:
                return None
        else:
            dims = _dims_of(x, own, labels, sizes)
            if dims is None:
                return None
            values.append(Value(x, dims))
    if total is None:
        return None
    for value in values:
        valued = [_valued(term, value, divides) for term in total]
        total = [term for term in valued if term is not None]
        if len(total) != len(valued):
            return None
    if all(term.plain for term in total):
        return scaled(Mask(out, tuple(total)), node, out) if len(total) == 1 else None
    if divides and values:
        return None  # the division of a mask is left to its value, before it is spread over experts and slots
    return Mask(out, tuple(total))


def _dims_of(
    x: object, own: Sequence[str], labels: Mapping[str, tuple[str, ...]], sizes: Sizes
) -> Dims | None:
    """The labels of an operand of which nothing is known."""
    if not isinstance(x, fx.Node) or not isinstance(VAL[x], torch.Tensor):
        return ()
    dims: list[tuple[str, ...]] = []
    for letter, size in zip(own, shape_of(x)):
        dim = labels.get(letter, ())
        if size == 1:
            dims.append(())
        elif dim and size == product(sizes[label] for label in dim):
            dims.append(dim)
        else:
            return None
    return tuple(dims)


def _times(left: Iterable[Term], right: Sequence[Term]) -> list[Term] | None:
    out: list[Term] = []
    for a in left:
        for b in right:
            if a.routing is not b.routing or (a.slot is not None and b.slot is not None and a.slot != b.slot):
                return None
            if (a.nonzero and not b.exact) or (b.nonzero and not a.exact):
                return None
            out.append(
                Term(
                    a.routing,
                    a.hit or b.hit,
                    a.slot or b.slot,
                    a.values + tuple(v for v in b.values if v not in a.values or not b.exact),
                    a.guards | b.guards,
                    a.exact and b.exact,
                    a.nonzero or b.nonzero,
                    a.merged or b.merged,
                )
            )
    return out


def _valued(term: Term, value: Value, divides: bool) -> Term | None:
    if term.nonzero:
        return None
    if not isinstance(value.node, fx.Node) and value.node == 1:
        return term
    if isinstance(value.node, fx.Node) and is_bits(value.node, {}) and not divides:
        return replace(
            term, values=(*term.values, value), guards=term.guards | {Bit(node=value.node, source=value)}
        )
    return replace(term, values=(*term.values, value), exact=False)


def chosen_place(place: Place, mask: Mask, out: Dims, other: Size) -> Place | None:
    """The place where the bits of a mask are 1, a number where one is 0."""
    if len(mask.terms) != 1 or out != place.dims:
        return None
    (term,) = mask.terms
    if (
        not term.exact
        or term.slot is not None
        or term.routing is not place.queue.routing
        or (term.merged and not place.queue.merged)
    ):
        return None
    # Where a guard of the place alone is 0, its value stays what it was.
    alone = place.guards - term.guards - ({place.cut[0]} if place.cut else frozenset())
    return replace(
        place,
        guards=term.guards | place.guards,  # the term's can be read
        outside=other if place.outside == other or (term.hit and not place.reduced) else None,
        off=other if not alone or place.off == other else None,
        cut=None if place.cut is None or place.cut[0] in term.guards else place.cut,
    )


def reduce(fact: SlotFact, labels: Set[str], dims: Dims, node: fx.Node) -> SlotFact | None:
    """The sum over dims with these labels; `dims` are left."""
    if isinstance(fact, Place):
        if labels == {"e"} and fact.outside == 0 and not fact.queue.merged and not fact.reduced:
            return replace(fact, dims=dims, reduced=True)
        return replace(fact, dims=dims) if not labels else None
    if not isinstance(fact, Mask):
        return None
    terms = fact.terms
    if not labels:
        return replace(fact, dims=dims) if not terms[0].plain else scaled(fact, node, dims)
    if "c" in labels or any(t.plain or t.nonzero for t in terms):
        return None
    if labels == {"k"}:
        exact = lambda t: t.exact and (t.slot is not None or t.routing.unique)
        return Mask(dims, tuple(replace(t, exact=exact(t), merged=t.merged or t.slot is None) for t in terms))
    if len(terms) != 1 or not terms[0].hit or terms[0].slot is not None:
        return None
    (term,) = terms
    if labels == {"e"}:
        return None if term.merged else Mask(dims, (replace(term, hit=False, values=(Value(node, dims),)),))
    if (
        term.exact
        and "e" not in labels
        and any(x.startswith("t") for x in labels)
        and not any(set(dim) & labels for dim in dims)
    ):
        return Totals(dims, frozenset({Total(term.routing, frozenset(labels), term.guards)}))
    return None
