"""Addresses of slots, `ids * C + place`, and what keeps them (the table of slot_facts.py).

An address is the number of a row of a buffer [E * C, ..] in which the experts' slots stand one after the
other. It says so only where its guards, and those of its place, are 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import sympy
import torch
from torch import fx

from tedfx.capture.gathers import picked
from tedfx.capture.indices import index_of
from tedfx.capture.routing import Fact, Routing, argument, known_of, name_of, number_of, product, shape_of
from tedfx.capture.slot_masks import same_everywhere
from tedfx.capture.slot_runs import begins
from tedfx.capture.slots import Address, Bit, Counts, Drop, Mask, Place, Scaled, SlotFact, Term
from tedfx.graph.facts import VAL
from tedfx.placement.sizes import Size, as_size

__all__ = ["at_most", "derive", "fits", "kept_by", "place_at_ids", "unmet"]


def derive(
    node: fx.Node, known: Mapping[fx.Node, SlotFact], hits: Mapping[fx.Node, Fact]
) -> Scaled | Address | Place | None:
    """What follows for a node that scales ids, adds a place to them, or keeps an address."""
    name = name_of(node)
    if name in ("index", "index_select"):
        return begins_at_ids(node, known, hits) or place_at_ids(node, known, hits)
    if name not in ("mul", "add", "sub", "where", "masked_fill", "clamp", "clamp_max", "clamp_min"):
        return None
    if not isinstance(VAL[node], torch.Tensor) or VAL[node].is_floating_point():
        return None
    if name == "mul":
        return _scaled(node, hits) or _times(node, known)
    if name in ("add", "sub"):
        return _sum(node, known)
    if name in ("where", "masked_fill"):
        return _instead(node, name, known)
    return _clamped(node, known)


def place_at_ids(
    node: fx.Node, known: Mapping[fx.Node, SlotFact], hits: Mapping[fx.Node, Fact]
) -> Place | None:
    """`place[arange(N), ids]`."""
    source = node.args[0]
    fact = known_of(known, source)
    if not isinstance(fact, Place) or fact.reduced:
        return None
    found = picked(node, hits)
    if found is None or found.routing is not fact.queue.routing or fact.dims[found.dim] != ("e",):
        return None
    rest = fact.dims[: found.dim] + fact.dims[found.dim + 1 :]
    if tuple(dim for dim in found.dims if dim not in ((), ("k",))) != rest:
        return None
    return replace(fact, dims=found.dims, outside=None, reduced=True)


def begins_at_ids(
    node: fx.Node, known: Mapping[fx.Node, SlotFact], hits: Mapping[fx.Node, Fact]
) -> Scaled | None:
    """`starts[ids]`, of the starts of the experts' runs; `(arange(E) * C)[ids]`, of equal ones."""
    found = index_of(node)
    if found is not None and len(found[1]) == 1 and (size := _multiples(found[0])) is not None:
        ids = known_of(hits, found[1][0])
        if ids is not None and ids.kind == "ids" and shape_of(found[0]) == [ids.routing.experts]:
            return Scaled(ids.dims, ids.routing, *size)
    starts = None if found is None else known.get(found[0])
    if found is None or not isinstance(starts, Counts) or len(found[1]) != 1:
        return None
    ids, runs = known_of(hits, found[1][0]), begins(starts)
    if ids is None or ids.kind != "ids" or ids.routing is not starts.routing or runs is None:
        return None
    # An expert's run is as long as it has tokens, or longer.
    return Scaled(ids.dims, ids.routing, _most(ids.routing, ids.routing.sizes), runs=runs)


def _multiples(node: fx.Node) -> tuple[Size, object] | None:
    """C of `arange(E) * C`."""
    if name_of(node) != "mul":
        return None
    for numbers, number in (node.args[:2], node.args[1::-1]):
        size = number_of(number)
        counts = isinstance(numbers, fx.Node) and name_of(numbers) == "arange" and len(numbers.args) == 1
        if counts and size is not None:
            return size, number
    return None


def _scaled(node: fx.Node, hits: Mapping[fx.Node, Fact]) -> Scaled | None:
    for ids, number in (node.args[:2], node.args[1::-1]):
        fact, size = known_of(hits, ids), number_of(number)
        if fact is not None and fact.kind == "ids" and size is not None:
            return Scaled(fact.dims, fact.routing, size, number)
    return None


def _times(node: fx.Node, known: Mapping[fx.Node, SlotFact]) -> Address | None:
    for one, other in (node.args[:2], node.args[1::-1]):
        address, bits = known_of(known, one), known_of(known, other)
        if isinstance(address, Address) and isinstance(bits, Mask):
            return _kept(node, address, bits.dims, bits.terms, 0)
    return None


def _kept(
    node: fx.Node, address: Address, dims: tuple, terms: tuple[Term, ...], off: Size | None
) -> Address | None:
    """The address where bits are 1, the number `off` elsewhere."""
    guards = kept_by(dims, terms, address)
    if guards is None or off is None or len(shape_of(node)) != len(address.dims):
        return None
    same = address.off == off or not address.guards
    return replace(address, guards=address.guards | guards, off=off if same else None)


def kept_by(dims: tuple, terms: tuple[Term, ...], address: Address | Place) -> frozenset[Bit] | None:
    """The guards of bits by assignment, laid out as an address is; None where they are something else."""
    routing = (address if isinstance(address, Place) else address.place).queue.routing
    if len(terms) != 1 or not (terms[0].plain and terms[0].exact) or terms[0].routing is not routing:
        return None
    return terms[0].guards if dims == address.dims else None


def _sum(node: fx.Node, known: Mapping[fx.Node, SlotFact]) -> Address | None:
    if argument(node, "alpha") != 1:
        return None
    sign = 1 if name_of(node) == "add" else -1
    address, number = known_of(known, node.args[0]), node.args[1]
    if isinstance(address, Address) and isinstance(number, int) and not isinstance(number, bool):
        return address.shifted(sign * number)
    if sign == -1:
        return None
    for one, other in (node.args[:2], node.args[1::-1]):
        base, place = known_of(known, one), known_of(known, other)
        if (
            isinstance(base, Scaled)
            and isinstance(place, Place)
            and isinstance(one, fx.Node)
            and isinstance(other, fx.Node)
            and place.reduced
            and base.routing is place.queue.routing
            and base.dims == place.dims
            and shape_of(one) == shape_of(other)
        ):
            return Address(base.dims, place, other, base.size, base.source, runs=base.runs)
    return None


def _instead(node: fx.Node, name: str, known: Mapping[fx.Node, SlotFact]) -> Address | None:
    """`where(keep, address, number)`, `where(drop, number, address)`, `address.masked_fill(drop, number)`."""
    if name == "where" and len(node.args) != 3:
        return None
    bits, value, other = node.args if name == "where" else (node.args[1], node.args[2], node.args[0])
    fact = known_of(known, bits)
    if isinstance(fact, Drop):
        value, other = other, value
    address = known_of(known, value)
    if not isinstance(address, Address) or not isinstance(fact, (Mask, Drop)):
        return None
    if name == "masked_fill" and not isinstance(fact, Drop):
        return None
    terms = fact.terms if isinstance(fact, Mask) else (fact.term,)
    return _kept(node, address, fact.dims, terms, same_everywhere(other))


def _clamped(node: fx.Node, known: Mapping[fx.Node, SlotFact]) -> Address | None:
    """An address in the buffer stays what it is."""
    address = known_of(known, node.args[0])
    if not isinstance(address, Address):
        return None
    low = argument(node, "min") if name_of(node) != "clamp_max" else None
    high = argument(node, "max") if name_of(node) != "clamp_min" else None
    if low is not None and (number_of(low) is None or not at_most(number_of(low), 0)):
        return None
    off = address.off if low is None or (address.off is not None and at_most(0, address.off)) else None
    if high is not None:
        most = number_of(high)
        last = as_size(address.size * address.place.queue.routing.experts - 1)
        if most is None or not at_most(last, most):
            return None
        off = off if off is not None and at_most(off, most) else None
    return replace(address, off=off)


def at_most(one: Size | None, other: Size | None) -> bool:
    return one is not None and other is not None and bool(sympy.sympify(other - one).is_nonnegative)


def fits(place: Place, size: Size, guards: frozenset[Bit]) -> bool:
    """Whether a place is provably one of `size` slots, where these guards are 1: one says so, or there are as
    many slots as there may be tokens."""
    if place.first < 0:
        return False
    room = as_size(size - place.first)
    for bit in guards:
        if bit.queue == place.queue and bit.limit is not None and at_most(bit.limit, room):
            return True
    queue = place.queue if place.queue.whole is None else place.queue.whole[1]
    routing = queue.routing
    count = sum((_most(routing, total.labels) for total in queue.before), _most(routing, queue.labels))
    return at_most(as_size(count), room)


def _most(routing: Routing, labels: Iterable[str]) -> Size:
    """How many tokens an expert may get of those along these labels."""
    return product(routing.sizes[x] for x in labels if x != "e" and not (x == "k" and routing.unique))


def unmet(needed: frozenset[Bit], given: frozenset[Bit]) -> frozenset[Bit]:
    """Those of the bits that do not follow from others: who is below a limit is below a larger one."""
    follows = lambda bit: any(
        bit == other
        or (bit.queue is not None and bit.queue == other.queue and at_most(other.limit, bit.limit))
        for other in given
    )
    return frozenset(bit for bit in needed if not follows(bit))
