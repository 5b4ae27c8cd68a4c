"""Masks of slots made from places, and products and sums of masks (the table of slot_facts.py)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from tedfx.capture.products import multiply, reduce
from tedfx.capture.routing import argument, dim_of, name_of, shape_of
from tedfx.capture.slots import Drop, Mask, Place, Slot, Term, Totals, Value
from tedfx.placement.sizes import as_size


def one_hot(node: fx.Node, known: dict, hits: dict) -> Mask | None:
    fact = known.get(node.args[0])
    if not isinstance(fact, Place):
        return None
    slot = Slot(
        fact.queue,
        fact.first,
        fact.guards,
        Value(node.args[0], fact.dims),
        as_size(node.meta["val"].shape[-1]),
    )
    return Mask(
        (*fact.dims, ("c",)), (Term(fact.queue.routing, slot=slot, exact=True, merged=fact.queue.merged),)
    )


def scatter(node: fx.Node, known: dict, hits: dict) -> Mask | None:
    """Ones scattered into zeros at places."""
    fact, rank = known.get(node.args[2]), len(shape_of(node))
    if (
        not isinstance(fact, Place)
        or name_of(node.args[0]) not in ("zeros", "zeros_like", "new_zeros")
        or len(fact.dims) != rank
    ):
        return None
    dim = dim_of(node, rank)
    source = argument(node, "src") if "src" in node.target._overloadname else argument(node, "value")
    dims = (*fact.dims[:dim], ("c",), *fact.dims[dim + 1 :])
    if (
        source != 1
        or fact.dims[dim] != ()
        or any(a != b for d, (a, b) in enumerate(zip(shape_of(node), shape_of(node.args[2]))) if d != dim)
    ):
        return None
    slot = Slot(fact.queue, fact.first, fact.guards, Value(node.args[2], fact.dims), shape_of(node)[dim])
    return Mask(dims, (Term(fact.queue.routing, slot=slot, exact=True, merged=fact.queue.merged),))


def mul(node: fx.Node, known: dict, hits: dict):
    rank = len(shape_of(node))
    operands = [(x, _aligned(x, rank)) for x in node.args[:2]]
    return multiply(node, operands, list(range(rank)), known, name_of(node) == "div")


def _aligned(x, rank: int) -> list:
    """Letters of an operand that is broadcast: the places of its dims, from the right."""
    own = len(shape_of(x)) if isinstance(x, fx.Node) and isinstance(x.meta["val"], torch.Tensor) else 0
    return list(range(rank - own, rank))


def where(node: fx.Node, known: dict, hits: dict):
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
    rank = len(shape_of(node))
    return multiply(node, [(x, _aligned(x, rank)) for x in node.args[:2]], list(range(rank)), known)


def masked_fill(node: fx.Node, known: dict, hits: dict):
    """`mask.masked_fill(place >= capacity, 0)`."""
    if node.args[2] != 0 or not isinstance(known.get(node.args[1]), Drop):
        return None
    rank, drop = len(shape_of(node)), known[node.args[1]]
    keep = {**known, node.args[1]: Mask(drop.dims, (drop.term,))}
    return multiply(node, [(x, _aligned(x, rank)) for x in node.args[:2]], list(range(rank)), keep)


def total(node: fx.Node, known: dict, hits: dict):
    fact = known.get(node.args[0])
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


def einsum(node: fx.Node, known: dict, hits: dict):
    left, _, right = node.args[0].replace(" ", "").partition("->")
    terms, operands = left.split(","), list(node.args[1])
    if (
        "." in left
        or not right
        or any(len(set(t)) != len(t) for t in terms)
        or not any(x in known for x in operands)
    ):
        return None
    letters = list(dict.fromkeys([*right, *"".join(terms)]))
    whole = multiply(node, [(x, list(t)) for x, t in zip(operands, terms)], letters, known)
    if whole is None or len(letters) == len(right):
        return whole
    gone = {x for letter, dim in zip(letters, whole.dims) if letter not in right for x in dim}
    return reduce(whole, gone, whole.dims[: len(right)], node)
