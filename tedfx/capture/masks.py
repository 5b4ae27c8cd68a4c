"""What follows from a routing, by one walk over the graph: masks and searches here, gates in gates.py (terms:
routing.py).

| the model writes | fact |
|---|---|
| `ids == e`, `ids[..., None] == arange(E)`, `one_hot(ids, E)` | hit (`ids != e`, `~hit`: miss) |
| `any` or, for unique ids, `sum` of a hit over the choices | hit, reduced |
| `torch.where(hit)`, `hit.nonzero()`, of a mask too; one of its columns | search; with `column` |
| `token[:capacity]` | the first of a search: `at_most` |
| views, transposes, casts, `[e]`, `[:, e]`, `unbind` | the same fact, its dims moved, its `expert` known |

Whatever is not in the table has no fact, so a mask that means more than this (capacity, padding) is never
taken for a hit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import fx

from tedfx.capture.gates import both, masked_fill, multiply, scatter, sigmoid, softmax, where
from tedfx.capture.loads import load_of
from tedfx.capture.routing import (
    Dims,
    Fact,
    Routing,
    argument,
    dim_of,
    known_of,
    moved,
    name_of,
    number_of,
    origin,
    shape_of,
    whole_quotient,
)
from tedfx.graph import nodes
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import REGROUPS, operand, operand_or_none
from tedfx.placement.sizes import at_least_zero

__all__ = ["facts"]

Known: TypeAlias = Mapping[fx.Node, Fact]


def facts(graph: fx.Graph, given: Known = MappingProxyType({})) -> dict[fx.Node, Fact]:
    """What is known of the nodes; `given`: of some beforehand."""
    known: dict[fx.Node, Fact] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        found = given.get(node) or origin(node, known) or _derive(node, known)
        if found is not None:
            known[node] = found
    return known


def _derive(node: fx.Node, known: Known) -> Fact | None:
    """What follows from known operands."""
    name = name_of(node)
    if name == "arange" and len(node.args) == 1 and isinstance(node.args[0], int):
        count, dims = node.args[0], (("e",),)
        return Fact("numbers", Routing(node, dims, {"e": count}, count, unique=True), dims)
    fact = known_of(known, operand_or_none(node, 0))
    if name in _BINARY:
        return _BINARY[name](node, known)
    if name in ("scatter", "where", "masked_fill"):
        return _SPECIAL[name](node, known)
    if fact is None:
        return None
    if fact.kind in ("order", "ids") and (found := _sorted(node, name, fact)) is not None:
        return found
    if fact.kind == "order":
        return _run(node, name, fact, known)
    if name in _SPECIAL:
        return _SPECIAL[name](node, known)
    if fact.kind == "search" and fact.column is None:
        return _column(node, name, fact)
    if fact.kind == "search":
        if (token := _token(node, fact)) is not None:
            return token
        same = name in _SAME or (name in REGROUPS and len(shape_of(node)) == 1)
        return fact if same else None
    dims = _layout(node, name, fact)
    return replace(fact, dims=dims) if dims is not None else None


def _sorted(node: fx.Node, name: str, fact: Fact) -> Fact | None:
    """Ids in one dim, sorted: where assignments stand by expert; their tokens."""
    if fact.kind == "ids":
        whole = (*fact.routing.tokens, "k") if fact.routing.choices > 1 else fact.routing.tokens
        up = not (name == "argsort" and argument(node, "descending"))
        return replace(fact, kind="order") if name == "argsort" and up and fact.dims == (whole,) else None
    if name in _SAME and not VAL[node].is_floating_point():
        return fact
    return _token(node, fact)


def _token(node: fx.Node, fact: Fact) -> Fact | None:
    """`order // K`."""
    if whole_quotient(node) != fact.routing.choices or len(fact.dims) != 1:
        return None
    if fact.routing.choices == 1:
        return fact
    return replace(fact, dims=(fact.routing.tokens, ("k",)))


def _run(node: fx.Node, name: str, fact: Fact, known: Known) -> Fact | None:
    """An expert's run of the order: a search for its assignments, or for their tokens."""
    if name != "expert_run" or load_of(operand(node, 1), known) is not fact.routing:
        return None
    return replace(fact, kind="search", expert=node.args[2], column=0)


_SAME = (
    "to",
    "_to_copy",
    "clone",
    "contiguous",
    "detach",
    "alias",
    "long",
    "int",
    "bool",
    "float",
    "lift_fresh_copy",
    "type_as",
)


def _layout(node: fx.Node, name: str, fact: Fact) -> Dims | None:
    """The dims of a change of layout or dtype; None where `node` is something else."""
    if name == "detach" and not (fact.kind in ("hit", "miss", "ids", "numbers") or fact.mask):
        return None  # whose gradient is another
    if name in _SAME:
        return (
            fact.dims
            if fact.kind in ("hit", "miss", "ids", "numbers") or fact.mask or VAL[node].is_floating_point()
            else None
        )
    return moved(node, name, fact.dims, fact.routing.sizes)


def _same_kind(a: Dims, b: Dims) -> Dims | None:
    """Dims of a broadcast: right-aligned, equal or one of them ()."""
    rank = max(len(a), len(b))
    a, b = ((),) * (rank - len(a)) + tuple(a), ((),) * (rank - len(b)) + tuple(b)
    out = tuple(x or y for x, y in zip(a, b))
    return out if all(not x or not y or x == y for x, y in zip(a, b)) else None


def _compare(node: fx.Node, known: Known) -> Fact | None:
    """`ids == e`, `ids.unsqueeze(-1) == arange(E)`; of a hit, `== 1`, `!= 0`, `> 0`."""
    name, (_, right) = name_of(node), node.args[:2]
    fact, other = (known_of(known, x) for x in node.args[:2])
    if other is not None and (fact is None or fact.kind == "numbers"):
        (right, _), fact, other = node.args[:2], other, fact
    if fact is None:
        return None
    if fact.kind == "ids" and name in ("eq", "ne"):
        kind = "hit" if name == "eq" else "miss"
        if isinstance(right, int) and not isinstance(right, bool):
            return Fact(kind, fact.routing, fact.dims, expert=right)
        if other is not None and other.kind == "numbers" and other.routing.experts == fact.routing.experts:
            dims = _same_kind(fact.dims, other.dims)
            return (
                Fact(kind, fact.routing, dims)
                if dims is not None and sum("e" in d for d in dims) == 1
                else None
            )
    if (fact.kind == "hit" or fact.mask) and (name, right) in (("eq", 1), ("ne", 0), ("gt", 0), ("ge", 1)):
        return fact
    return None


def _reduce(node: fx.Node, known: Known) -> Fact | None:
    """`any` and `sum` over the choices."""
    fact = known[operand(node, 0)]
    rank = len(fact.dims)
    dim = argument(node, "dim")
    if dim is None or fact.kind not in ("hit", "weighed", "gate"):
        return None
    over = {d % rank for d in (dim if isinstance(dim, (list, tuple)) else [dim])}
    labels = {label for d in over for label in fact.dims[d]}
    if (
        labels - {"k"}
        or (name_of(node) != "sum" and fact.kind != "hit")
        or (name_of(node) == "sum" and fact.kind == "hit" and not fact.routing.unique)
    ):
        return None
    keep = bool(argument(node, "keepdim"))
    dims = tuple(() if d in over else dim for d, dim in enumerate(fact.dims) if d not in over or keep)
    if not labels and fact.routing.choices > 1:
        return replace(fact, dims=dims)
    return replace(fact, dims=dims, reduced=True, kind="hit" if fact.kind == "hit" else "gate")


def _one_hot(node: fx.Node, known: Known) -> Fact | None:
    fact = known[operand(node, 0)]
    classes = node.args[1]
    if fact.kind != "ids" or not isinstance(classes, int) or classes < fact.routing.experts:
        return None
    # Classes beyond the experts, as a place for what another library drops, are never hit.
    return Fact("hit", fact.routing, (*fact.dims, ("e",)))


def _pick(node: fx.Node, known: Known) -> Fact | None:
    """`mask[e]`, `gates[:, e]`, `gates[:, e:e+1]`."""
    fact = known[operand(node, 0)]
    if fact.kind == "search":
        return _first(node, fact) if name_of(node) == "slice" else _column(node, name_of(node), fact)
    dim = dim_of(node, len(fact.dims), default=0)
    if dim is not None and fact.dims[dim] == ():
        dims = moved(node, name_of(node), fact.dims, fact.routing.sizes)
        return replace(fact, dims=dims) if dims is not None else None
    if dim is None or fact.dims[dim] != ("e",) or fact.kind not in ("hit", "miss", "weighed", "gate"):
        return None
    if name_of(node) == "select":
        expert, dims = node.args[2], fact.dims[:dim] + fact.dims[dim + 1 :]
    else:
        expert, dims = argument(node, "start") or 0, fact.dims[:dim] + ((),) + fact.dims[dim + 1 :]
        if shape_of(node)[dim] != 1 or fact.routing.experts == 1:
            return None
    if not isinstance(expert, int):
        return None
    return _of_expert(replace(fact, dims=dims), expert, shape_of(operand(node, 0))[dim])


def _of_expert(fact: Fact, index: int, classes: object) -> Fact | None:
    """The fact about the expert at an index of a dim of so many classes; none of a class that is no
    expert's."""
    expert = index % classes if isinstance(classes, int) else index
    return replace(fact, expert=expert) if expert < fact.routing.experts else None


def _unbind(node: fx.Node, known: Known) -> Fact | None:
    fact = known[operand(node, 0)]
    if fact.kind == "search":
        return fact if dim_of(node, 2, default=0) == 1 else None
    dim = dim_of(node, len(fact.dims), default=0)
    if dim is None or fact.dims[dim] != ("e",) or fact.kind == "numbers":
        return None
    return replace(
        fact, dims=(("e",), *fact.dims[:dim], *fact.dims[dim + 1 :]), column=-1
    )  # a list over experts


def _getitem(node: fx.Node, known: Known) -> Fact | None:
    fact, index = known[operand(node, 0)], nodes.argument(node, 1)
    if fact.kind == "search":
        return replace(fact, column=index % len(fact.dims)) if fact.column is None else None
    if fact.column == -1:
        listed = VAL[operand(node, 0)]
        return _of_expert(replace(fact, dims=fact.dims[1:], column=None), index, len(listed))
    return None


def _find(node: fx.Node, known: Known) -> Fact | None:
    """`torch.where` of one operand searches, of three it chooses."""
    return _search(node, known) if len(node.args) == 1 else where(node, known)


def _search(node: fx.Node, known: Known) -> Fact | None:
    """`torch.where(mask)`, `mask.nonzero()`."""
    fact = known_of(known, node.args[0])
    return (
        replace(fact, kind="search", mask=False)
        if fact is not None and (fact.kind == "hit" or fact.mask) and fact.expert is not None
        else None
    )


def _first(node: fx.Node, fact: Fact) -> Fact | None:
    """`token[:capacity]`: the first of what a search found."""
    start, end = argument(node, "start"), argument(node, "end")
    if fact.at_most is not None or start not in (None, 0) or dim_of(node, 2, default=0) != 0:
        return None
    size = number_of(end)
    if size is None or not at_least_zero(size) or argument(node, "step") != 1:
        return None
    found = node
    while name_of(found) in (*_SAME, *REGROUPS, "slice", "select", "getitem", "unbind", "squeeze"):
        found = operand(found, 0)
    # Of rows that were sorted, the order within an expert's run is that of the sort.
    return replace(fact, at_most=end) if name_of(found) in ("where", "nonzero", "nonzero_numpy") else None


def _column(node: fx.Node, name: str, fact: Fact) -> Fact | None:
    """One column of `mask.nonzero()`, a matrix with a row per entry found."""
    width = len(fact.dims)
    if name == "select" and argument(node, "dim") in (1, -1):
        return replace(fact, column=argument(node, "index") % width)
    if name in _SAME:
        return fact
    if width == 1 and name in ("squeeze", "view", "reshape", "flatten") and len(shape_of(node)) == 1:
        return replace(fact, column=0)
    if name == "t":
        return replace(fact, column=-2)
    return None


def _not(node: fx.Node, known: Known) -> Fact | None:
    fact = known[operand(node, 0)]
    other = {"hit": "miss", "miss": "hit"}.get(fact.kind)
    return replace(fact, kind=other) if other and VAL[node].dtype == torch.bool else None


_Rule: TypeAlias = Callable[[fx.Node, Known], Fact | None]
_BINARY: dict[str, _Rule] = {
    "eq": _compare,
    "ne": _compare,
    "gt": _compare,
    "ge": _compare,
    "mul": multiply,
    "div": multiply,
    "bitwise_and": both,
    "logical_and": both,
    "__and__": both,
}
_SPECIAL: dict[str, _Rule] = {
    "any": _reduce,
    "sum": _reduce,
    "amax": _reduce,
    "one_hot": _one_hot,
    "select": _pick,
    "slice": _pick,
    "unbind": _unbind,
    "getitem": _getitem,
    "where": _find,
    "nonzero": _search,
    "nonzero_numpy": _search,
    "scatter": scatter,
    "sigmoid": sigmoid,
    "softmax": softmax,
    "_softmax": softmax,
    "masked_fill": masked_fill,
    "logical_not": _not,
    "bitwise_not": _not,
}
