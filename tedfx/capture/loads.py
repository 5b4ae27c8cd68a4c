"""Which experts have tokens: whether a mask says just that.

`every_assignment` follows a mask or count [E] back to the hits of a routing (masks.py). It is positive where
any token named the expert by any choice, and nowhere else, if it is the sum, `any` or maximum of all hits
over all tokens and choices, or a count of the ids (`bincount`, `histc`, ones scattered at ids); compared with
zero, cast or laid out anew. Of a mask that leaves some assignments out, the same for those that are left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torch import fx

from tedfx.capture.routing import Dims, Fact, Routing, argument, moved, name_of
from tedfx.graph.nodes import operand_or_none

__all__ = ["every_assignment", "load_of"]

_POSITIVE = {("gt", 0), ("ne", 0), ("ge", 1)}
_INEXACT = {"gt", "ne", "ge", "any", "amax", "count_nonzero"}
_CASTS = {"to", "_to_copy", "clone", "contiguous", "detach", "alias", "long", "int", "bool", "float"}


Kept: TypeAlias = tuple[fx.Node, Dims] | None  # the mask of the assignments that are left; None of all


def every_assignment(node: fx.Node, known: Mapping[fx.Node, Fact]) -> tuple[Routing, Kept] | None:
    """The routing whose experts with tokens are those where `node` [E] is positive, or that `node`, ids of
    any shape, names, and which of its assignments count; None where that is not proven."""
    fact = known.get(node)
    if fact is not None and fact.kind == "ids" and _whole(fact):
        return fact.routing, None
    found = _counted(node, known)
    return (found[0], found[2]) if found is not None and found[1] == (("e",),) else None


def load_of(node: fx.Node, known: Mapping[fx.Node, Fact]) -> Routing | None:
    """The routing of which `node` [E] says how many assignments each expert has; None where that is not
    proven."""
    found = _counted(node, known, exact=True)
    return found[0] if found is not None and found[1:] == ((("e",),), None) else None


def _whole(fact: Fact) -> bool:
    """All ids of the routing, each once, in any layout."""
    return sorted(label for dim in fact.dims for label in dim) == sorted(
        label for dim in fact.routing.dims for label in dim
    )


def _bin_each(node: fx.Node, ids: Fact) -> bool:
    """Whether a histogram has one bin for each expert."""
    experts = ids.routing.experts
    given = [argument(node, name) for name in ("bins", "min", "max")]
    return given in ([experts, 0, experts - 1], [experts, 0, experts])


def _counted(
    node: fx.Node, known: Mapping[fx.Node, Fact], exact: bool = False
) -> tuple[Routing, Dims, Kept] | None:
    """(routing, labels of the dims, hits of which assignments): positive where the token, choice or expert of
    an entry has any hit; `exact`: how many it has."""
    fact, name = known.get(node), name_of(node)
    if fact is not None and fact.mask and fact.expert is None:
        return fact.routing, fact.dims, fact.kept
    if fact is not None and fact.kind == "hit" and fact.expert is None:
        known_once = not (exact and fact.reduced) or fact.routing.unique
        return (fact.routing, fact.dims, None) if known_once else None
    source = operand_or_none(node, 0)
    if source is None:
        return None
    if name in ("bincount", "histc"):
        ids = known.get(source)
        if (
            ids is None
            or ids.kind != "ids"
            or not _whole(ids)
            or (name == "histc" and not _bin_each(node, ids))
        ):
            return None
        return ids.routing, (("e",),), None
    found = _counted(source, known, exact)
    if found is None or (exact and (name == "bool" or name in _INEXACT)):
        return None
    routing, dims, kept = found
    if name in _CASTS or (name in ("gt", "ne", "ge") and (name, node.args[1]) in _POSITIVE):
        return found
    if name in ("sum", "any", "amax", "count_nonzero"):
        over = argument(node, "dim")
        if over is None:
            return None
        gone = {d % len(dims) for d in (over if isinstance(over, (list, tuple)) else [over])}
        if any("e" in dims[d] for d in gone):
            return None
        keep = name != "count_nonzero" and bool(argument(node, "keepdim"))
        left = tuple(() if d in gone else dim for d, dim in enumerate(dims) if d not in gone or keep)
        return routing, left, kept
    laid = moved(node, name, dims, routing.sizes)
    return (routing, laid, kept) if laid is not None else None
