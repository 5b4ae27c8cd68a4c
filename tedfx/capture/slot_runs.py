"""Where the experts' runs begin and end, in rows that stand by expert: sums of numbers per expert.

| part | the number of expert e |
|---|---|
| ("own",) | how many assignments it has |
| ("rounded", values) | no less than that: a function of it alone, `(counts + 7) // 8 * 8` |
| ("function", values) | any other function of it alone |
| ("ends", part) | the running sum of a part, that of e included |

So a run begins where `ends - part` says: its end, less its length. That a function of counts is not less than
they are is found by computing it, for many counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from tedfx.capture.batched import is_pointwise
from tedfx.capture.loads import load_of
from tedfx.capture.routing import Fact, Routing, argument, dim_of, name_of, shape_of, whole_quotient
from tedfx.capture.slots import Counts, SlotFact
from tedfx.graph import nodes
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import function, is_tensor, operand

__all__ = ["begins", "derive", "ends_of"]

_MOST = 5000  # counts up to this one are all tried


def derive(node: fx.Node, known: Mapping[fx.Node, SlotFact], hits: Mapping[fx.Node, Fact]) -> Counts | None:
    if len(shape_of(node)) != 1:
        return None
    own = load_of(node, hits)
    if own is not None:
        return Counts((("e",),), own, {("own",): 1})
    name = name_of(node)
    if name in ("cat", "concat", "pad", "constant_pad_nd"):
        return _behind_zero(node, name, known)
    counts = {x: fact for x in node.all_input_nodes if isinstance(fact := known.get(x), Counts)}
    if not counts:
        return None
    first = next(iter(counts.values()))
    if any(fact.routing is not first.routing for fact in counts.values()):
        return None
    if name in ("add", "sub") and argument(node, "alpha") == 1 and all(x in counts for x in node.args[:2]):
        one, other = (counts[x] for x in nodes.arguments(node)[:2])
        return _sum(one, other, 1 if name == "add" else -1)
    if name == "cumsum" and dim_of(node, 1) == 0:
        part = _alone(first)
        return None if part is None else Counts(first.dims, first.routing, {("ends", part): 1})
    return _function(node, first.routing, hits)


def _sum(one: Counts, other: Counts, sign: int) -> Counts:
    parts = dict(one.parts)
    for part, times in other.parts.items():
        parts[part] = parts.get(part, 0) + sign * times
    return Counts(one.dims, one.routing, {part: times for part, times in parts.items() if times})


def _alone(counts: Counts) -> tuple[Any, ...] | None:
    """The part that the numbers are."""
    return next(iter(counts.parts)) if list(counts.parts.values()) == [1] else None


def begins(counts: Counts) -> tuple[Any, ...] | None:
    """The part of which these are the starts of the runs."""
    for part in counts.parts:
        if part[0] == "ends" and counts.parts == {part: 1, part[1]: -1}:
            return part[1] if part[1][0] in ("own", "rounded") else None
    return None


def ends_of(counts: Counts) -> tuple[Any, ...] | None:
    """The part of which these are the ends of the runs."""
    part = _alone(counts)
    return part[1] if part is not None and part[0] == "ends" else None


def _behind_zero(node: fx.Node, name: str, known: Mapping[fx.Node, SlotFact]) -> Counts | None:
    """`cat([zeros(1), ends[:-1]])`, `pad(ends[:-1], (1, 0))`: where the runs begin."""
    if name in ("cat", "concat"):
        zero, *rest = nodes.argument(node, 0)
        if len(rest) != 1 or name_of(zero) not in ("zeros", "new_zeros") or shape_of(zero) != [1]:
            return None
        (most,) = rest
    else:
        if list(argument(node, "pad")) != [1, 0] or argument(node, "value"):
            return None
        most = operand(node, 0)
    if name_of(most) != "slice" or (argument(most, "start") or 0) != 0:
        return None
    ends = known.get(operand(most, 0))
    part = ends_of(ends) if isinstance(ends, Counts) else None
    if part is None or not isinstance(ends, Counts):
        return None
    if argument(most, "end") != -1 and shape_of(most) != [ends.routing.experts - 1]:
        return None
    return Counts(ends.dims, ends.routing, {("ends", part): 1, part: -1})


def _function(node: fx.Node, routing: Routing, hits: Mapping[fx.Node, Fact]) -> Counts | None:
    """A function of the counts, number by number; equal functions are one part, however they are written."""
    if not _each(node) or VAL[node].dtype == torch.bool:
        return None
    tried = torch.cat([torch.arange(_MOST), torch.arange(_MOST) * 797, 2 ** torch.arange(24)])
    value = _computed(node, routing, hits, tried, {})
    if value is None or value.shape != tried.shape:
        return None
    same = bool((value == tried).all())
    kind = "rounded" if bool((value >= tried).all()) else "function"
    made = hashlib.sha256(value.double().numpy().tobytes()).hexdigest()
    return Counts((("e",),), routing, {("own",) if same else (kind, made): 1})


def _each(node: fx.Node) -> bool:
    return is_pointwise(node) or whole_quotient(node) is not None


def _computed(
    node: fx.Node, routing: Routing, hits: Mapping[fx.Node, Fact], tried: torch.Tensor, done: dict
) -> torch.Tensor | None:
    """What a node makes of counts, or None where it is made of something else, too."""
    if node not in done:
        done[node] = None
        if load_of(node, hits) is routing:
            done[node] = tried.to(VAL[node].dtype)
        elif is_tensor(node) and node.op == "call_function" and _each(node):
            given = {x: _computed(x, routing, hits, tried, done) for x in node.all_input_nodes}
            if given and all(value is not None for value in given.values()):
                args, kwargs = fx.map_arg((node.args, {**node.kwargs}), given.__getitem__)
                done[node] = function(node)(*args, **kwargs)
    return done[node]
