"""Places and bits of one choice: `place[:, k]`, of places that all choices of a token were given together.

The choices of one queue stand in places of their own, so each of them is a queue of its own whose places no
other choice has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from tedfx.capture.routing import Fact, Routing, argument, dim_of, name_of
from tedfx.capture.slots import Bit, Mask, Place, Queue, SlotFact, Value, Zeros
from tedfx.graph.nodes import operand

__all__ = ["derive"]


def derive(
    node: fx.Node, known: Mapping[fx.Node, SlotFact], hits: Mapping[fx.Node, Fact]
) -> Place | Mask | Zeros | None:
    fact = known.get(operand(node, 0)) if name_of(node) == "select" else None
    if not isinstance(fact, (Place, Mask)):
        return None
    dim = dim_of(node, len(fact.dims))
    routing = fact.queue.routing if isinstance(fact, Place) else fact.terms[0].routing
    if dim is None or fact.dims[dim] != ("k",):
        return None
    number = argument(node, "index") % routing.choices
    own = next((f.routing for f in hits.values() if f.routing.of == (routing, number)), None)
    dims = fact.dims[:dim] + fact.dims[dim + 1 :]
    if own is None:
        return None
    if isinstance(fact, Place):
        queue = _column(fact.queue, own, number)
        if queue is None or not fact.reduced:
            return None
        guards = _bits(fact.guards, own, number, None)
        cut = None if fact.cut is None else _bits(frozenset({fact.cut[0]}), own, number, None)
        if guards is None or (fact.cut is not None and not cut):
            return None
        cut = None if fact.cut is None or not cut else (next(iter(cut)), fact.cut[1])
        return replace(fact, dims=dims, queue=queue, guards=guards, cut=cut)
    term = fact.terms[0]
    if len(fact.terms) != 1 or not term.plain:
        return None
    value = Value(node, dims)
    alone = term.exact and len(term.guards) == 1  # then its bit is the mask, and can be read
    guards = _bits(term.guards, own, number, value if alone else None)
    if guards is None:
        return None
    if not alone:
        return Zeros(dims, own, guards)
    return Mask(dims, (replace(term, routing=own, values=(value,), guards=guards),))


def _column(queue: Queue, own: Routing, number: int) -> Queue | None:
    if "k" not in queue.labels or queue.merged or queue.guards or queue.before:
        return None
    return Queue(own, queue.labels - {"k"}, whole=(number, queue))


def _bits(bits: frozenset[Bit], own: Routing, number: int, source: Value | None) -> frozenset[Bit] | None:
    """Bits about one queue as those about the queue of one choice."""
    found = []
    for bit in bits:
        queue = None if bit.queue is None else _column(bit.queue, own, number)
        if queue is None:
            return None
        found.append(replace(bit, queue=queue, source=source))
    return frozenset(found)
