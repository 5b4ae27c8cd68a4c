"""Which nodes are masks, places and totals, by one walk over the graph (terms: slots.py).

| the model writes | fact |
|---|---|
| what masks.py calls a hit: `one_hot(ids, E)`, `ids[..., None] == arange(E)`, ones scattered at ids | mask |
| `mask.cumsum(d)` of a mask of bits; less 1, less the mask; plus totals | place |
| `(place * mask).sum(experts)`, `gather` at the ids | place, reduced to the chosen expert |
| `mask.sum(tokens)` | totals |
| `place < capacity` | bit; `>=` its not |
| `place >= 0` where the place is less wherever the expert was not chosen (`place * mask - 1`) | mask |
| `one_hot(place, C)`, `place[..., None] == arange(C)`, ones scattered at places | mask of slots |
| products (`*`, `&`, `where`, einsum) of these and others; sums over experts and choices | mask, place |
| `mask + mask`, `mask.bool()`, `mask != 0`, layouts, casts | mask |

A cumsum in a dtype that cannot count (bfloat16) has no fact, and neither has anything that is not in the
table.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from tedfx.capture.masks import facts
from tedfx.capture.products import multiply, reduce, scaled
from tedfx.capture.routing import argument, dim_of, moved, name_of, shape_of
from tedfx.capture.slots import Bit, Drop, Mask, Numbers, Place, Queue, Slot, Term, Totals, Value, sizes_of
from tedfx.placement.factors import as_size

__all__ = ["slot_facts"]

_COUNTS = (torch.float32, torch.float64, torch.int32, torch.int64)
_CASTS = ("to", "_to_copy", "type_as", "float", "long", "int", "bool", "double")
_SAME = ("clone", "contiguous", "alias", "lift_fresh_copy", "detach")


def slot_facts(graph: fx.Graph) -> dict[fx.Node, Any]:
    hits, known = facts(graph), {}
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        found = _hit(hits.get(node)) or _derive(node, known, hits)
        if found is not None:
            known[node] = found
    return known


def _hit(fact) -> Mask | None:
    if (
        fact is None
        or fact.kind != "hit"
        or fact.expert is not None
        or fact.column is not None
        or ("e",) not in fact.dims
    ):
        return None
    merged = fact.reduced and fact.routing.choices > 1
    return Mask(fact.dims, (Term(fact.routing, hit=True, exact=True, merged=merged),))


def _derive(node: fx.Node, known: dict, hits: dict):
    name = name_of(node)
    if (
        name == "arange" and len(node.args) == 1 and (length := _number(node.args[0])) is not None
    ):  # a float's is no place
        return Numbers((("c",),), length, node.args[0])
    if name in _RULES:
        return _RULES[name](node, known, hits)
    fact = known.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    if fact is None:
        return None
    if name in _CASTS or name in _SAME:
        return _cast(node, fact, known)
    dims = moved(node, name, fact.dims, sizes_of(fact))
    if dims is None:
        return None
    if isinstance(fact, Mask) and fact.terms[0].plain:
        return scaled(fact, node, dims)
    return replace(fact, dims=dims)


def _number(value):
    """An int, or the expression of a size; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, fx.Node)):
        return None
    if isinstance(value, int):
        return value
    return as_size(value.meta["val"]) if isinstance(value.meta.get("val"), torch.SymInt) else None


# --- casts and comparisons ----------------------------------------------------------------------------------


def _cast(node: fx.Node, fact, known: dict):
    dtype = node.meta["val"].dtype
    if isinstance(fact, Place):
        return fact if dtype in _COUNTS else None
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


def _compare(node: fx.Node, known: dict, hits: dict):
    name, (left, right) = name_of(node), node.args[:2]
    if not isinstance(known.get(left), (Place, Mask)):
        left, right, name = right, left, _FLIPPED[name]
    fact = known.get(left) if isinstance(left, fx.Node) else None
    other = known.get(right) if isinstance(right, fx.Node) else None
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
        hit = _known_outside(fact) and fact.outside < 0  # no slot where the expert was not chosen
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
    limit = _number(right)
    if (
        limit is None
        and isinstance(right, fx.Node)
        and isinstance(right.meta["val"], torch.Tensor)
        and right.meta["val"].dim()
    ):
        return None
    least = limit + (name == "gt") if name in ("gt", "ge") and isinstance(limit, int) else None
    if least is not None and _known_outside(fact) and fact.outside < least <= fact.first:
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


def _known_outside(place: Place) -> bool:
    """Whether the place says of every (token, choice, expert) whether it was chosen, if one of its numbers
    does."""
    return (
        place.outside is not None
        and not place.reduced
        and not place.queue.merged
        and any("e" in dim for dim in place.dims)
    )


def _nonnegative(value, depth: int = 24) -> bool:
    """Whether a value is provably not below zero."""
    if not isinstance(value, fx.Node):
        return isinstance(value, (int, float)) and value >= 0
    name, sources = name_of(value), [a for a in fx.node.map_aggregate(value.all_input_nodes, lambda n: n)]
    if not depth or value.op != "call_function":
        return False
    if (
        name in ("softmax", "_softmax", "sigmoid", "relu", "exp", "one_hot", "abs", "square")
        or value.meta.get("val") is not None
        and _is_bool(value)
    ):
        return True
    if name == "clamp":
        low = argument(value, "min")
        return isinstance(low, (int, float)) and low >= 0
    if value.target is operator.getitem or name in (
        *_CASTS,
        *_SAME,
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
    return isinstance(node.meta["val"], torch.Tensor) and node.meta["val"].dtype == torch.bool


def _not(node: fx.Node, known: dict, hits: dict):
    fact = known.get(node.args[0])
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


# --- places -------------------------------------------------------------------------------------------------


def _cumsum(node: fx.Node, known: dict, hits: dict) -> Place | None:
    fact = known.get(node.args[0])
    if not isinstance(fact, Mask) or len(fact.terms) != 1 or node.meta["val"].dtype not in _COUNTS:
        return None
    term, labels = fact.terms[0], fact.dims[dim_of(node, len(fact.dims))]
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


def _add(node: fx.Node, known: dict, hits: dict):
    name, (left, right) = name_of(node), node.args[:2]
    if argument(node, "alpha") != 1:
        return None
    if (
        name == "add"
        and isinstance(known.get(right), (Place, Mask))
        and not isinstance(known.get(left), (Place, Mask))
    ):
        left, right = right, left
    if name == "add" and isinstance(known.get(right), Place):
        left, right = right, left
    fact, other, sign = (
        known.get(left) if isinstance(left, fx.Node) else None,
        known.get(right) if isinstance(right, fx.Node) else None,
        1 if name == "add" else -1,
    )
    if isinstance(fact, Place):
        if shape_of(node) != shape_of(left):
            return None
        if isinstance(right, int) and not isinstance(right, bool):
            return replace(
                fact,
                first=fact.first + sign * right,
                outside=None if fact.outside is None else fact.outside + sign * right,
            )
        if isinstance(other, Totals) and sign == 1 and not fact.reduced and _same_dims(fact.dims, other.dims):
            if any(total in fact.queue.before for total in other.totals):
                return None
            old = fact.queue
            queue = replace(old, before=old.before | other.totals)
            return replace(fact, queue=queue, outside=None)
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
                )
        return None
    if (
        isinstance(fact, Totals)
        and isinstance(other, Totals)
        and sign == 1
        and fact.dims == other.dims
        and not fact.totals & other.totals
    ):
        return replace(fact, totals=fact.totals | other.totals)
    if not isinstance(fact, Mask) or sign == -1:
        return None
    if isinstance(right, (int, float)) and right == 0:
        return scaled(fact, node, fact.dims) if fact.terms[0].plain else fact
    if (
        isinstance(other, Mask)
        and fact.dims == other.dims
        and not any(t.plain for t in fact.terms + other.terms)
    ):
        if shape_of(node) == shape_of(left) == shape_of(right):
            return Mask(fact.dims, fact.terms + other.terms)
    return None


def _same_dims(dims, other) -> bool:
    """Whether `other` broadcasts against `dims`, labels on labels."""
    other = ((),) * (len(dims) - len(other)) + tuple(other)
    return len(dims) == len(other) and all(not b or a == b for a, b in zip(dims, other))


def _clamp(node: fx.Node, known: dict, hits: dict) -> Place | None:
    fact = known.get(node.args[0])
    low, high = argument(node, "min"), argument(node, "max")
    if not isinstance(fact, Place) or (low is not None and not (isinstance(low, int) and low <= fact.first)):
        return None
    if high is None:
        return replace(fact, outside=None if fact.outside is None else max(fact.outside, low))
    limit = _number(high)
    if limit is None:
        return None
    bit = Bit(fact.queue, as_size(sympy.sympify(limit) + 1 - fact.first))
    return replace(fact, guards=fact.guards | {bit}, outside=None)


def _gather(node: fx.Node, known: dict, hits: dict) -> Place | None:
    """Places at the ids."""
    fact, ids = known.get(node.args[0]), hits.get(node.args[2])
    if (
        not isinstance(fact, Place)
        or fact.reduced
        or ids is None
        or ids.kind != "ids"
        or ids.routing is not fact.queue.routing
    ):
        return None
    dim = dim_of(node, len(fact.dims))
    if fact.dims[dim] != ("e",) or len(ids.dims) != len(fact.dims) or ids.dims[dim] not in ((), ("k",)):
        return None
    if ids.dims[:dim] + ids.dims[dim + 1 :] != fact.dims[:dim] + fact.dims[dim + 1 :]:
        return None
    return replace(fact, dims=ids.dims, outside=None, reduced=True)


# --- slots --------------------------------------------------------------------------------------------------


def _one_hot(node: fx.Node, known: dict, hits: dict) -> Mask | None:
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


def _scatter(node: fx.Node, known: dict, hits: dict) -> Mask | None:
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


# --- products and sums --------------------------------------------------------------------------------------


def _mul(node: fx.Node, known: dict, hits: dict):
    rank = len(shape_of(node))
    operands = [(x, _aligned(x, rank)) for x in node.args[:2]]
    return multiply(node, operands, list(range(rank)), known, name_of(node) == "div")


def _aligned(x, rank: int) -> list:
    """Letters of an operand that is broadcast: the places of its dims, from the right."""
    own = len(shape_of(x)) if isinstance(x, fx.Node) and isinstance(x.meta["val"], torch.Tensor) else 0
    return list(range(rank - own, rank))


def _where(node: fx.Node, known: dict, hits: dict):
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


def _masked_fill(node: fx.Node, known: dict, hits: dict):
    """`mask.masked_fill(place >= capacity, 0)`."""
    if node.args[2] != 0 or not isinstance(known.get(node.args[1]), Drop):
        return None
    rank, drop = len(shape_of(node)), known[node.args[1]]
    keep = {**known, node.args[1]: Mask(drop.dims, (drop.term,))}
    return multiply(node, [(x, _aligned(x, rank)) for x in node.args[:2]], list(range(rank)), keep)


def _sum(node: fx.Node, known: dict, hits: dict):
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


def _einsum(node: fx.Node, known: dict, hits: dict):
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


_RULES: dict[str, Callable] = {
    "lt": _compare,
    "le": _compare,
    "gt": _compare,
    "ge": _compare,
    "eq": _compare,
    "ne": _compare,
    "logical_not": _not,
    "bitwise_not": _not,
    "cumsum": _cumsum,
    "add": _add,
    "sub": _add,
    "clamp": _clamp,
    "clamp_max": _clamp,
    "clamp_min": _clamp,
    "gather": _gather,
    "one_hot": _one_hot,
    "scatter": _scatter,
    "mul": _mul,
    "div": _mul,
    "logical_and": _mul,
    "bitwise_and": _mul,
    "__and__": _mul,
    "where": _where,
    "masked_fill": _masked_fill,
    "sum": _sum,
    "einsum": _einsum,
}
