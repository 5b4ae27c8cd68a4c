"""Places in a queue (the table of slot_facts.py): running sums of masks, what is added to them, where they
are cut off, and those at the ids."""

from __future__ import annotations

from dataclasses import replace

import sympy
from torch import fx

from tedfx.capture.products import scaled
from tedfx.capture.routing import Dims, argument, dim_of, known_of, name_of, number_of, shape_of
from tedfx.capture.slot_comparisons import COUNTS, Hits, Known
from tedfx.capture.slots import Bit, Mask, Place, Queue, SlotFact, Straight, totals_of
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import operand, operand_or_none
from tedfx.placement.sizes import as_size


def cumsum(node: fx.Node, known: Known, hits: Hits) -> Place | None:
    fact = known.get(operand(node, 0))
    if not isinstance(fact, Mask) or len(fact.terms) != 1 or VAL[node].dtype not in COUNTS:
        return None
    term, dim = fact.terms[0], dim_of(node, len(fact.dims))
    if dim is None:
        return None
    labels = fact.dims[dim]
    if (
        not term.exact
        or not term.hit
        or term.slot is not None
        or set(labels) & {"e", "c"}
        or not any(x.startswith("t") for x in labels)
    ):
        return None
    return Place(
        fact.dims, Queue(term.routing, frozenset(labels), term.guards, merged=term.merged), 1, term.guards
    )


def add(node: fx.Node, known: Known, hits: Hits) -> SlotFact | None:
    name, (left, right) = name_of(node), node.args[:2]
    if argument(node, "alpha") != 1:
        return None
    if (
        name == "add"
        and isinstance(known_of(known, right), (Place, Mask))
        and not isinstance(known_of(known, left), (Place, Mask))
    ):
        left, right = right, left
    if name == "add" and isinstance(known_of(known, right), Place):
        left, right = right, left
    fact, other, sign = known_of(known, left), known_of(known, right), 1 if name == "add" else -1
    if not isinstance(left, fx.Node):
        return None
    if isinstance(fact, Place):
        if shape_of(node) != shape_of(left):
            return None
        if isinstance(number := number_of(right), int):
            return fact.shifted(sign * number)
        sums = totals_of(other)
        if sums is not None and sign == 1 and not fact.reduced and _same_dims(fact.dims, sums.dims):
            if any(total in fact.queue.before for total in sums.totals):
                return None
            old = fact.queue
            queue = replace(old, before=old.before | sums.totals)
            return replace(fact, queue=queue, outside=None, off=None, cut=None)
        if isinstance(other, Mask) and len(other.terms) == 1 and _same_dims(fact.dims, other.dims):
            term = other.terms[0]
            if (
                term.exact
                and term.hit
                and term.slot is None
                and term.routing is fact.queue.routing
                and term.guards <= fact.guards
            ):
                return replace(
                    fact,
                    first=fact.first + sign,
                    outside=fact.outside if term.merged == fact.queue.merged else None,
                    off=fact.off if term.guards == fact.guards and fact.cut is None else None,
                    cut=None,
                )
        return None
    one, sums = totals_of(fact), totals_of(other)
    if one is not None and sums is not None:
        both = sign == 1 and one.dims == sums.dims and not one.totals & sums.totals
        return replace(one, totals=one.totals | sums.totals) if both else None
    if one is not None and number_of(right) == 0:
        return one
    if sign == -1:
        return _less_itself(left, right, known)
    if isinstance(fact, Straight) and isinstance(other, Mask):
        fact, other = other, fact
    if not isinstance(fact, Mask):
        return None
    if isinstance(other, Straight) and not other.terms and other.dims == fact.dims:
        return Straight(fact.dims, fact.terms, other.weights)
    if isinstance(right, (int, float)) and right == 0:
        return scaled(fact, node, fact.dims) if fact.terms[0].plain else fact
    if (
        isinstance(other, Mask)
        and fact.dims == other.dims
        and not any(t.plain for t in fact.terms + other.terms)
    ):
        if isinstance(right, fx.Node) and shape_of(node) == shape_of(left) == shape_of(right):
            return Mask(fact.dims, fact.terms + other.terms)
    return None


def _less_itself(left: fx.Node, right: object, known: Known) -> Straight | None:
    """`weights - weights.detach()`, and `(mask + weights) - weights.detach()`."""
    weights = operand_or_none(right, 0) if isinstance(right, fx.Node) and name_of(right) == "detach" else None
    if weights is None:
        return None
    fact = known.get(weights)
    if not isinstance(fact, Mask) or any(t.exact or t.nonzero for t in fact.terms):
        return None
    if left is weights:
        return Straight(fact.dims, (), fact.terms)
    parts = [operand_or_none(left, i) for i in (0, 1)] if name_of(left) == "add" else []
    masks = [known_of(known, x) for x in parts if x is not weights]
    if len(masks) != 1 or not isinstance(masks[0], Mask) or argument(left, "alpha") != 1:
        return None
    return Straight(fact.dims, masks[0].terms, fact.terms) if masks[0].dims == fact.dims else None


def _same_dims(dims: Dims, other: Dims) -> bool:
    """Whether `other` broadcasts against `dims`, labels on labels."""
    other = ((),) * (len(dims) - len(other)) + other
    return len(dims) == len(other) and all(not b or a == b for a, b in zip(dims, other))


def clamp(node: fx.Node, known: Known, hits: Hits) -> Place | None:
    fact = known.get(operand(node, 0))
    low, high = argument(node, "min"), argument(node, "max")
    if not isinstance(fact, Place) or (low is not None and not (isinstance(low, int) and low <= fact.first)):
        return None
    if low is not None:
        least = lambda x: max(x, low) if isinstance(x, int) else None
        if fact.cut is not None and least(fact.cut[1]) != fact.cut[1]:
            fact = replace(fact, cut=None, off=None)
        fact = replace(fact, outside=least(fact.outside), off=least(fact.off))
    if high is None:
        return fact
    limit = number_of(high)
    if limit is None:
        return None
    bit = Bit(fact.queue, as_size(sympy.sympify(limit) + 1 - fact.first))
    most = lambda x: x if x is not None and sympy.sympify(limit - x).is_nonnegative else None
    new = fact.guards == fact.queue.guards
    return replace(
        fact,
        guards=fact.guards | {bit},
        outside=most(fact.outside),
        off=most(fact.off) if new else None,
        cut=(bit, limit) if new else None,
    )


def gather(node: fx.Node, known: Known, hits: Hits) -> Place | None:
    """Places at the ids."""
    fact, ids = known.get(operand(node, 0)), hits.get(operand(node, 2))
    if (
        not isinstance(fact, Place)
        or fact.reduced
        or ids is None
        or ids.kind != "ids"
        or ids.routing is not fact.queue.routing
    ):
        return None
    dim = dim_of(node, len(fact.dims))
    if (
        dim is None
        or fact.dims[dim] != ("e",)
        or len(ids.dims) != len(fact.dims)
        or ids.dims[dim] not in ((), ("k",))
    ):
        return None
    if ids.dims[:dim] + ids.dims[dim + 1 :] != fact.dims[:dim] + fact.dims[dim + 1 :]:
        return None
    return replace(fact, dims=ids.dims, outside=None, reduced=True)
