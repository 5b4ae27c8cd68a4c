"""Rows that the model itself sorts by expert (the terms are in routing.py).

| the model writes | what it is |
|---|---|
| `ids.flatten().argsort()`, `ids.flatten().sort()[1]` | **order**: assignments n * K + k, sorted by expert |
| `order // K` | **tokens** of the sorted rows |
| `order.argsort()` | **inverse**: where an assignment stands among the sorted rows |
| `x[order // K]`, `w.flatten()[order]`, element by element of these | **sorted**: a value per assignment |
| `ids.flatten().bincount()`, `one_hot(ids, E).sum((0, 1))`, .. | **load**: how many rows each expert has |
| `load.cumsum(0)` | **ends** of the experts' runs |

An index that was expanded over the features (for `gather`, `scatter`) is what it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from tedfx.capture.batched import is_pointwise
from tedfx.capture.loads import load_of
from tedfx.capture.routing import Fact, Routing, argument, dim_of, name_of, shape_of, whole_quotient
from tedfx.graph import nodes
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import operand, operand_or_none

__all__ = ["Sorted", "sorted_facts"]

_SAME = ("to", "_to_copy", "clone", "contiguous", "detach", "alias", "long", "int", "lift_fresh_copy")


@dataclass(frozen=True)
class Sorted:
    """kind: order, tokens, inverse, sorted, load or ends. of: of a sorted value, the value by token
    (`per_token`) or by assignment, where it is one node of the model's."""

    kind: str
    routing: Routing
    of: fx.Node | None = None
    per_token: bool = False


def sorted_facts(graph: fx.Graph, known: Mapping[fx.Node, Fact]) -> dict[fx.Node, Sorted]:
    found: dict[fx.Node, Sorted] = {}
    for node in graph.nodes:
        if node.op == "call_function" and (fact := _fact(node, known, found)) is not None:
            found[node] = fact
    return found


def _flat(fact: Fact | None) -> Routing | None:
    """The routing of ids in one dim, by token and then by choice."""
    if fact is None or fact.kind != "ids" or len(fact.dims) != 1:
        return None
    routing = fact.routing
    wanted = (*routing.tokens, "k") if routing.choices > 1 else routing.tokens
    return routing if tuple(x for x in fact.dims[0] if routing.sizes[x] != 1 or x != "k") == wanted else None


def _fact(node: fx.Node, known: Mapping[fx.Node, Fact], found: Mapping[fx.Node, Sorted]) -> Sorted | None:
    name, source = name_of(node), operand_or_none(node, 0)
    if source is None:
        return None
    of = found.get(source)
    if name == "argsort" and not argument(node, "descending"):
        routing = _flat(known.get(source))
        if routing is not None:
            return Sorted("order", routing)
        return Sorted("inverse", of.routing) if of is not None and of.kind == "order" else None
    if name == "getitem" and nodes.argument(node, 1) == 1 and name_of(source) == "sort":
        routing = _flat(known.get(operand(source, 0)))
        return Sorted("order", routing) if routing and not argument(source, "descending") else None
    load = load_of(node, known)
    if load is not None:
        return Sorted("load", load)
    if of is not None and of.kind in ("load", "ends") and name in _SAME:
        return of
    if of is not None and of.kind == "load" and name == "cumsum":
        return Sorted("ends", of.routing)
    if of is not None and of.kind in ("order", "tokens", "inverse"):
        if name in _SAME or (name in ("view", "reshape", "unsqueeze", "expand", "repeat") and _columns(node)):
            return of
        if of.kind == "order" and whole_quotient(node) == of.routing.choices:
            return Sorted("tokens", of.routing)
    by = _taken_by(node, name, found)
    if by is not None:
        return Sorted("sorted", by.routing, source, by.kind == "tokens")
    return _computed(node, found)


def _columns(node: fx.Node) -> bool:
    """Whether the rows stay the first dim, the same in all columns."""
    first, shape = shape_of(operand(node, 0)), shape_of(node)
    if not shape or first[0] != shape[0] or (len(first) > 1 and first[1:] != [1] * (len(first) - 1)):
        return False
    return name_of(node) in ("expand", "repeat") or all(size == 1 for size in shape[1:])


def _taken_by(node: fx.Node, name: str, found: Mapping[fx.Node, Sorted]) -> Sorted | None:
    """The order, tokens or inverse of which a value is taken: v[order]."""
    index = None
    if name == "index" and len(nodes.argument(node, 1)) == 1:
        index = nodes.argument(node, 1)[0]
    elif name in ("index_select", "gather") and dim_of(node, len(shape_of(operand(node, 0)))) == 0:
        index = operand(node, 2)
        if name == "gather" and shape_of(index)[1:] != shape_of(operand(node, 0))[1:]:
            return None  # of some of the columns alone
    by = found.get(index) if isinstance(index, fx.Node) else None
    return by if by is not None and by.kind in ("order", "tokens") else None


def _computed(node: fx.Node, found: Mapping[fx.Node, Sorted]) -> Sorted | None:
    """Element by element of sorted values and of what is the same for all rows."""
    rows = [n for n in node.all_input_nodes if n in found and found[n].kind == "sorted"]
    if not rows or not (is_pointwise(node) or name_of(node) in ("unsqueeze", "view", "reshape")):
        return None
    if not is_pointwise(node) and not (shape_of(node) and _columns_added(node)):
        return None
    count = shape_of(rows[0])[0]
    others = [
        n
        for n in node.all_input_nodes
        if n not in rows
        and isinstance(VAL.get(n), torch.Tensor)
        and (VAL[n].ndim > 1 or count in shape_of(n))
    ]
    routings = {found[n].routing for n in rows}
    return Sorted("sorted", routings.pop()) if len(routings) == 1 and not others else None


def _columns_added(node: fx.Node) -> bool:
    """w -> w[:, None]"""
    before, after = shape_of(operand(node, 0)), shape_of(node)
    return after[: len(before)] == before and all(size == 1 for size in after[len(before) :])
