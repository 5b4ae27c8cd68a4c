"""Which nodes are masks, places and totals, by one walk over the graph (terms: slots.py).

| the model writes | fact |
|---|---|
| what masks.py calls a hit: `one_hot(ids, E)`, `ids[..., None] == arange(E)`, ones scattered at ids | mask |
| `mask.cumsum(d)` of a mask of bits; less 1, less the mask; plus totals | place |
| `(place * mask).sum(experts)`, `amax`, `gather` at the ids | place, reduced to the chosen expert |
| `mask.sum(tokens)` | totals |
| `place < capacity` | bit; `>=` its not |
| `where(mask, place, -1)`, `place.masked_fill(drop, -1)` | place, a number where there is none |
| `place >= 0` where the place is less wherever the expert was not chosen (`place * mask - 1`) | mask |
| `one_hot(place, C)`, `place[..., None] == arange(C)`, ones scattered at places | mask of slots |
| `one_hot(place, C + 1)[..., 1:]` | mask of the slots that are left, counted from zero |
| `ids * C + place`; `where(bit, address, number)`, `address * bit`, `address.clamp(..)` | address |
| `counts`, rounded up, running sums of them, sums and differences | counts (slot_runs.py) |
| `starts[ids] + place`, of the starts of the experts' runs | address |
| `place[:, k]`, `bit[:, k]` of one choice | place, bit |
| products (`*`, `&`, `where`, einsum) of these and others; sums over experts and choices | mask, place |
| `mask + mask`, `mask.bool()`, `mask != 0`, layouts, casts | mask |

A cumsum in a dtype that cannot count (bfloat16) has no fact, and neither has anything that is not in the
table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import fx

from tedfx.capture import slot_addresses, slot_columns, slot_comparisons, slot_masks, slot_places, slot_runs
from tedfx.capture.masks import facts
from tedfx.capture.products import scaled
from tedfx.capture.routing import Fact, known_of, moved, name_of, number_of
from tedfx.capture.slot_comparisons import CASTS, SAME, Hits, Known
from tedfx.capture.slots import Counts, Mask, Numbers, SlotFact, Term, Totals, sizes_of
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import operand_or_none

__all__ = ["slot_facts"]


def slot_facts(graph: fx.Graph, hits: Hits | None = None) -> dict[fx.Node, SlotFact]:
    """`hits`: what masks.py knows of the nodes, where that was asked already."""
    hits = facts(graph) if hits is None else hits
    known: dict[fx.Node, SlotFact] = {}
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(VAL.get(node), torch.Tensor):
            continue
        found = _hit(hits.get(node)) or _derive(node, known, hits)
        if found is not None:
            known[node] = found
    return known


def _hit(fact: Fact | None) -> Mask | None:
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


def _derive(node: fx.Node, known: Known, hits: Hits) -> SlotFact | None:
    name = name_of(node)
    if (
        name == "arange" and len(node.args) == 1 and (length := number_of(node.args[0])) is not None
    ):  # a float's is no place
        return Numbers((("c",),), length, node.args[0])
    for own in (slot_runs, slot_addresses, slot_columns):
        if (found := own.derive(node, known, hits)) is not None:
            total = slot_masks.total(node, known, hits) if name == "sum" else None
            both = isinstance(found, Counts) and isinstance(total, Totals)
            return replace(found, total=total) if both else found
    if name in _RULES:
        return _RULES[name](node, known, hits)
    fact = known_of(known, operand_or_none(node, 0))
    if fact is None:
        return None
    if name in CASTS or name in SAME:
        return slot_comparisons.cast(node, fact)
    dims = moved(node, name, fact.dims, sizes_of(fact))
    if dims is None:
        return None
    if isinstance(fact, Mask) and fact.terms[0].plain:
        return scaled(fact, node, dims)
    return replace(fact, dims=dims)


_Rule: TypeAlias = Callable[[fx.Node, Known, Hits], SlotFact | None]
_RULES: dict[str, _Rule] = {
    "lt": slot_comparisons.compare,
    "le": slot_comparisons.compare,
    "gt": slot_comparisons.compare,
    "ge": slot_comparisons.compare,
    "eq": slot_comparisons.compare,
    "ne": slot_comparisons.compare,
    "logical_not": slot_comparisons.negate,
    "bitwise_not": slot_comparisons.negate,
    "cumsum": slot_places.cumsum,
    "add": slot_places.add,
    "sub": slot_places.add,
    "clamp": slot_places.clamp,
    "clamp_max": slot_places.clamp,
    "clamp_min": slot_places.clamp,
    "gather": slot_places.gather,
    "one_hot": slot_masks.one_hot,
    "scatter": slot_masks.scatter,
    "slice": slot_masks.slots_between,
    "amax": slot_masks.largest,
    "getitem": slot_masks.largest,
    "mul": slot_masks.mul,
    "div": slot_masks.mul,
    "logical_and": slot_masks.mul,
    "bitwise_and": slot_masks.mul,
    "__and__": slot_masks.mul,
    "where": slot_masks.where,
    "masked_fill": slot_masks.masked_fill,
    "sum": slot_masks.total,
    "einsum": slot_masks.einsum,
}
