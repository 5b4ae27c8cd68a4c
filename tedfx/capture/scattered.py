"""Rows written to slots at addresses, and read back there (terms: slots.py, slot_addresses.py).

    rows[ids, place] = x          rows [E, C, H]; or at ids * C + place of [E * C, H]
    y = rows[ids, place]

A write says where each assignment's row stands: a term of a mask of slots, as a one-hot dispatch has it. Its
guards are all that a row which stands in its own slot is known to satisfy. Who does not satisfy them

- was not written: a mask picked the others (picks.py);
- or is zero, in a write that adds;
- or was written to a number of no slot: behind the last, or one that is cut off before the experts.

A read gives an assignment its own row where the guards of the write and of the address are 1, and anything
elsewhere; zero, where it reads behind the experts' rows in zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx

from tedfx.capture.chains import is_zero
from tedfx.capture.indices import index_of, rows_of
from tedfx.capture.picks import Pick, Picks
from tedfx.capture.routing import Dims, Fact, Routing, argument, known_of, name_of, shape_of
from tedfx.capture.slot_addresses import at_most, fits, kept_by
from tedfx.capture.slot_comparisons import in_slot, slot_of
from tedfx.capture.slots import Address, Bit, Drop, Mask, Place, Slot, SlotFact, Term, Zeros
from tedfx.errors import CaptureError, user_line
from tedfx.graph import nodes
from tedfx.graph.nodes import is_tensor, operand, overload
from tedfx.placement.sizes import as_size, at_least_zero

__all__ = ["Read", "Scattered", "Spot", "Write", "by_bits", "covers", "refuse", "zero_where"]


def refuse(what: str, node: fx.Node, fix: str) -> CaptureError:
    return CaptureError(f"cannot capture the rows at addresses: {what} | at {user_line(node)} | {fix}")


@dataclass(frozen=True)
class Spot:
    """The address of each assignment. `flat`: in a buffer of one dim of slots, of which each expert has
    `address.size`; `pick`: the address, where it is of some assignments or sorted; `bits` are what the mask
    that picked them is made of."""

    address: Address
    flat: bool
    pick: Pick | None = None
    bits: frozenset[Bit] = frozenset()

    @property
    def labels(self) -> Dims:
        """Of the buffer's dims but the last; "r" are rows in runs."""
        if not self.flat:
            return ("e",), ("c",)
        return (("e", "c"),) if self.address.runs is None else (("r",),)

    @property
    def dims(self) -> Dims:
        return self.address.dims

    @property
    def place(self) -> Place:
        return self.address.place

    @property
    def routing(self) -> Routing:
        return self.address.place.queue.routing

    @property
    def right(self) -> frozenset[Bit]:
        """Where these are 1 an address is what it says."""
        return self.address.guards | self.place.guards

    def slot(self) -> Slot:
        place, size = self.place, self.address.size
        # What is no slot of this expert is one of another, or, below zero, counted from the end.
        within = lambda low, high: at_least_zero(as_size(high - low))
        inside = lambda x: (
            x if x is not None and within(0, x) and not (self.flat and not within(x, size - 1)) else None
        )
        cut = place.cut if place.cut is not None and inside(place.cut[1]) is not None else None
        place = replace(place, outside=None, off=inside(place.off), cut=cut)
        slot = slot_of(place, self.address.node, size, self.address.source)
        return replace(slot, start=-self.address.shift)


@dataclass(frozen=True)
class Write:
    node: fx.Node
    base: fx.Node
    rows: fx.Node
    spot: Spot
    adds: bool

    def term(self, known: Mapping[fx.Node, SlotFact]) -> Term:
        """1 in the slot of an assignment whose row stands there."""
        spot, slot = self.spot, self.spot.slot()
        own = in_slot(spot.routing, slot)
        guards = own.guards | spot.bits
        if self.adds:
            guards |= zero_where(self.rows, spot.dims, known)
        last = as_size(spot.address.size * spot.routing.experts)
        if spot.address.guards and spot.address.off is not None and at_most(last, spot.address.off):
            guards |= spot.address.guards
        if not spot.address.guards <= guards:
            raise refuse(
                "rows of dropped tokens share a slot with another's",
                self.node,
                "write them behind the last slot, or not at all, or add zeros: x * keep.unsqueeze(-1)",
            )
        if spot.place.first < 0:
            raise refuse("places below zero", self.node, "count them from zero: cumsum(mask) - mask")
        if spot.flat:
            cut = frozenset() if slot.cut is None else frozenset({slot.cut[0]})
            if not fits(spot.place, spot.address.size, guards | cut | (spot.place.guards - slot.guards)):
                raise refuse(
                    "a place beyond an expert's slots is the address of another's",
                    self.node,
                    "write those alone whose place is below the capacity",
                )
        guards = frozenset(bit for bit in guards if bit.source is not None)
        values = sorted((bit.value for bit in guards), key=lambda value: value.node)
        return Term(
            spot.routing, True, own.own_slot, tuple(values), guards, exact=True, merged=slot.queue.merged
        )


@dataclass(frozen=True)
class Read:
    """`node` reads `source` at the address; `padded`: zeros stand behind the rows."""

    node: fx.Node
    source: fx.Node
    spot: Spot
    padded: bool


class Scattered:
    """The writes and reads of a graph."""

    def __init__(self, known: Mapping[fx.Node, SlotFact], hits: Mapping[fx.Node, Fact], picks: Picks):
        self.known, self.hits, self.picks = known, hits, picks

    def write(self, node: fx.Node) -> Write | None:
        name, adds = name_of(node), False
        if name == "index_put":
            indices, rows = list(nodes.argument(node, 1)), operand(node, 2)
            adds = bool(argument(node, "accumulate"))
        elif name in ("index_copy", "index_add", "scatter", "scatter_add", "scatter_reduce"):
            if argument(node, "dim") != 0 or len(node.args) < 4 or not is_tensor(node.args[3]):
                return None
            index, rows = operand(node, 2), operand(node, 3)
            column = index if name.startswith("index") else rows_of(index)
            if column is None or "reduce" in overload(node) or shape_of(rows)[:1] != shape_of(column):
                return None
            if not name.startswith("index") and shape_of(index) != shape_of(rows):
                return None
            if name == "index_add" and argument(node, "alpha") != 1:
                return None
            if name == "scatter_reduce" and (argument(node, "reduce"), argument(node, "include_self")) != (
                "sum",
                True,
            ):
                return None
            indices, adds = [column], name not in ("index_copy", "scatter")
        else:
            return None
        base = operand(node, 0)
        spot = self.spot(indices, base)
        if spot is None or len(shape_of(base)) != len(indices) + 1:
            return None
        return Write(node, base, rows, spot, adds)

    def read(self, node: fx.Node) -> Read | None:
        found = index_of(node)
        if found is None:
            return None
        source, indices = found
        spot = self.spot(indices, source)
        if spot is None or len(shape_of(source)) != len(indices) + 1:
            return None
        inner = _unpadded(source) if spot.flat else None
        return Read(node, source if inner is None else inner, spot, inner is not None)

    def spot(self, indices: list, of: fx.Node) -> Spot | None:
        found = [self.picks.of(x) if is_tensor(x) else None for x in indices]
        if not all(is_tensor(x) for x in indices) or len({pick and pick.by for pick in found}) != 1:
            return None
        at = [x if pick is None else pick.value for x, pick in zip(indices, found)]
        address, flat = known_of(self.known, at[-1]), len(at) == 1
        if len(at) == 2:
            ids, place = self.hits.get(at[0]), address
            if ids is None or ids.kind != "ids" or not isinstance(place, Place) or not place.reduced:
                return None
            if ids.routing is not place.queue.routing or ids.dims != place.dims:
                return None
            address = Address(place.dims, place, at[1], shape_of(of)[1], _count(of))
        if len(at) > 2 or not isinstance(address, Address):
            return None
        pick = found[-1]
        if pick is None or pick.mask is None:
            return Spot(address, flat, pick)
        bits = self.known.get(pick.mask)
        guards = kept_by(bits.dims, bits.terms, address) if isinstance(bits, Mask) else None
        return None if guards is None else Spot(address, flat, pick, guards)


def _count(of: fx.Node) -> object:
    """How many slots each expert has, of a buffer [E, C, H]: a number, or its node."""
    while name_of(of) in ("index_put", "view", "reshape"):
        if name_of(of) != "index_put":
            return nodes.argument(of, 1)[1]
        of = operand(of, 0)
    size = argument(of, "size") if name_of(of) in ("zeros", "new_zeros", "full", "new_full") else None
    return None if size is None or len(size) != 3 else size[1]


def _unpadded(node: fx.Node) -> fx.Node | None:
    """y of `cat([y, zeros])`, `pad(y, (0, 0, 0, 1))`."""
    if name_of(node) in ("cat", "concat") and (argument(node, "dim") or 0) == 0:
        first, *rest = nodes.argument(node, 0)
        return first if rest and all(is_zero(x) for x in rest) else None
    if name_of(node) in ("constant_pad_nd", "pad"):
        pad = list(argument(node, "pad"))
        zero = not argument(node, "value") and argument(node, "mode", "constant") == "constant"
        if zero and len(pad) == 4 and pad[:3] == [0, 0, 0] and isinstance(pad[3], int) and pad[3] > 0:
            return operand(node, 0)
    return None


def by_bits(node: object, dims: Dims, known: Mapping[fx.Node, SlotFact]) -> frozenset[Bit]:
    """The bits of which a value with these dims is 0 where one is 0."""
    fact = known_of(known, node)
    if not isinstance(fact, (Mask, Drop, Zeros)) or fact.dims != dims:
        return frozenset()
    if isinstance(fact, Zeros):
        return fact.guards
    term = fact.term if isinstance(fact, Drop) else fact.terms[0]
    alone = isinstance(fact, Drop) or len(fact.terms) == 1
    return term.guards if alone and term.plain else frozenset()


def zero_where(node: fx.Node, dims: Dims, known: Mapping[fx.Node, SlotFact]) -> frozenset[Bit]:
    """The bits of which rows of features, by assignment, are zero where one is 0."""
    name, own = name_of(node), (*dims, ())
    if name in ("to", "_to_copy", "clone", "contiguous"):
        return zero_where(operand(node, 0), dims, known)
    if name == "mul":
        sides = [x for x in node.args[:2] if is_tensor(x)]
        return frozenset().union(*(by_bits(x, own, known) or zero_where(x, dims, known) for x in sides))
    if name == "where" and len(node.args) == 3:
        bits, value, other = node.args
        left_out = value if isinstance(known_of(known, bits), Drop) else other
        return by_bits(bits, own, known) if _is_nothing(left_out) else frozenset()
    if name == "masked_fill" and isinstance(known_of(known, node.args[1]), Drop):
        return by_bits(node.args[1], own, known) if _is_nothing(node.args[2]) else frozenset()
    return frozenset()


def _is_nothing(value: object) -> bool:
    return is_zero(value) if isinstance(value, fx.Node) else value == 0


def covers(term: Term, written: Spot, read: Spot) -> bool:
    """Whether a row is read where it was written, if both count equal numbers of slots."""
    slot = term.own_slot
    return (
        term.routing is read.routing
        and slot.queue == read.place.queue
        and slot.first == read.place.first
        and written.address.runs == read.address.runs
    )
