"""Masks of slots made from places, and products and sums of masks (the table of slot_facts.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from tedfx.capture.letters import Letters, einsum_letters
from tedfx.capture.products import multiply, reduce
from tedfx.capture.routing import argument, dim_of, name_of, shape_of
from tedfx.capture.slot_comparisons import Hits, Known
from tedfx.capture.slots import Drop, Mask, Place, Slot, SlotFact, Term, Totals, Value
from tedfx.graph import nodes
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import operand, overload


def one_hot(node: fx.Node, known: Known, hits: Hits) -> Mask | None:
    fact = known.get(operand(node, 0))
    if not isinstance(fact, Place):
        return None
    slot = Slot(
        fact.queue,
        fact.first,
        fact.guards,
        Value(node.args[0], fact.dims),
        shape_of(node)[-1],
    )
    return Mask(
        (*fact.dims, ("c",)), (Term(fact.queue.routing, slot=slot, exact=True, merged=fact.queue.merged),)
    )


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
    slot = Slot(fact.queue, fact.first, fact.guards, Value(places, fact.dims), shape_of(node)[dim])
    return Mask(dims, (Term(fact.queue.routing, slot=slot, exact=True, merged=fact.queue.merged),))


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
    """`where(bit, mask, 0)`."""
    if (
        len(node.args) != 3
        or node.args[2] != 0
        and not (
            isinstance(node.args[2], fx.Node)
            and name_of(node.args[2]) in ("zeros", "zeros_like", "new_zeros")
        )
    ):
        return None
    return _elementwise(node, node.args[:2], known)


def masked_fill(node: fx.Node, known: Known, hits: Hits) -> Mask | Place | None:
    """`mask.masked_fill(place >= capacity, 0)`."""
    fill = operand(node, 1)
    drop = known.get(fill)
    if node.args[2] != 0 or not isinstance(drop, Drop):
        return None
    return _elementwise(node, node.args[:2], {**known, fill: Mask(drop.dims, (drop.term,))})


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
