"""The rule of a kept Function (`tedfx/ops/function.py`) is computed, not written: from the types that the
typing rules give the graph of its forward and backward (`tedfx/rules/bodies.py`)."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from tedfx.graph.nodes import operands, results
from tedfx.ops.function import kept_of
from tedfx.placement.factors import Dim, Factor
from tedfx.placement.sizes import as_size
from tedfx.rules.base import Annotator, Relation, flat
from tedfx.rules.bodies import Found, found_of
from tedfx.trace.bodies import bodies_of

__all__ = ["adds_up", "function", "is_elementwise"]


def function(node: fx.Node, ctx: Annotator) -> Relation:
    """The rule of a node whose target is a kept Function."""
    kept, found = kept_of(node.target), _rule(node)
    assert kept is not None, node
    tensors = operands(node)
    dims: dict[Factor, Dim] = {}
    for factor, places in found.classes.items():
        dims[factor] = ctx.match(*((tensors[i], d) for i, d in places)) if factor in found.free else ()
    whole = {
        i: flat(dim for dim, f in zip(ctx.dims(n), found.dims[i]) if f is None or f not in found.free)
        for i, n in enumerate(tensors)
    }
    whole = {i: factors for i, factors in whole.items() if factors}
    if whole:
        ctx.notes.append(
            f"{kept.name}.apply: {', '.join(tensors[i].name for i in whole)} whole in "
            f"{'some' if found.free else 'all'} dims, whose parts its code does not compute apart"
        )
    outs: list[list[Dim]] = []
    for v, factors in zip(results(node), found.out):
        sizes = [as_size(s) for s in v.shape]
        outs.append(
            [
                () if s == 1 else dims[f] if f is not None and f in found.free else (Factor(s),)
                for s, f in zip(sizes, factors)
            ]
        )
    several = not kept.single
    new = flat(d for d, f in zip(outs[0], found.out[0]) if f not in found.free)
    return Relation(
        out=[] if several else outs[0],
        outs=outs if several else None,
        whole=whole,
        contracted=flat(dims[factor] for factor in found.contracted),
        created=() if several else new,
        linear=found.linear,
        complete=found.complete,
        constant=found.constant,
        unread=found.unread,
        filled=True,  # who knows what its code does with nothing
    )


def is_elementwise(node: fx.Node) -> bool:
    """Whether every element of the results, and of the gradients, is made of the elements of the operands
    at its place (and of operands of one element without a gradient).
    """
    found = _rule(node)
    shapes = {tuple(ds) for ds in (*found.dims, *found.out) if ds}
    scalars = any(learned and not ds for learned, ds in zip(found.learned, found.dims))
    if len(shapes) != 1 or scalars or found.contracted or found.constant:
        return False
    (shape,) = shapes
    return len(set(shape)) == len(shape) and found.free.issuperset(shape)


def adds_up(node: fx.Node) -> bool:
    """Whether the gradients of a sum of cotangents are the sums of their gradients, so that one call may
    stand for several.
    """
    found = _rule(node)
    return not found.complete and not found.constant


def _rule(node: fx.Node) -> Found:
    found, *others = [found_of(body) for body in bodies_of(node)]
    for other in others:
        found = _both(found, other)
    return found


def _both(one: Found, other: Found) -> Found:
    """What holds whichever cotangents there are, of two sets."""
    there = {factor: other.dims[i][d] for factor, ((i, d), *_) in one.classes.items()}
    free = {
        f
        for f in one.free
        if (same := there[f]) is not None
        and same in other.free
        and one.classes[f] == other.classes[same]
        and (f in one.contracted) == (same in other.contracted)
    }
    learned = [a or b for a, b in zip(one.learned, other.learned)]
    constant = frozenset(
        i
        for i in one.constant | other.constant
        if all(i in f.constant or not f.learned[i] for f in (one, other))
    )
    unclear = constant != one.constant | other.constant
    return replace(
        one,
        free=set() if unclear else free,
        contracted=[f for f in one.contracted if f in free and not unclear],
        learned=learned,
        constant=constant,
        complete=one.complete or other.complete or unclear,
        linear=tuple(g for g in one.linear if g in other.linear),
        unread=frozenset(i for i in constant if all(i in f.unread or not f.learned[i] for f in (one, other))),
    )
