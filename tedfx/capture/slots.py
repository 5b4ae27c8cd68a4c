"""What the masks of a mixture with a capacity mean: hits times slots, and why no two tokens share a slot.

    position = cumsum(mask, 0) - mask            a place in the **queue** of each expert
    keep = position < capacity                   a **bit**: 0 or 1
    combine[n, e, c] = gate[n] * keep[n] * [ids[n] == e] * [position[n] == c]

A **mask** is a sum of terms. A **term** is, at (token n, choice k, expert e, slot c), the product of values
(nodes of the user's), of 1 where ids[n,k] == e (`hit`) and of 1 where the place is c (`slot`); without `hit`
its values are those at the expert that was chosen.

A **queue** numbers those tokens of an expert whose guards are 1, one after the other along `labels`, behind
the totals `before`. A **guard** is a bit; a place says where a token stands only where its guards are 1. So
two tokens share no slot (`shared_slot` finds none) if

1. every term's slot is a place of its own routing whose guards are guards of the term too: where they are 0,
   the term is 0;
2. the queue runs over all the tokens and choices among which the expert sums;
3. of any two terms one queues behind all that the other can place: behind the total of its queue, or of those
   of it that a bit `position < limit`, a guard of the term, lets through: the first of the queue.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import sympy
from torch import fx

from tedfx.capture.routing import Dims, Routing, Sizes
from tedfx.errors import TedfxError
from tedfx.placement.sizes import Size, as_size

__all__ = [
    "Address",
    "Bit",
    "Counts",
    "Drop",
    "Mask",
    "Numbers",
    "Place",
    "Queue",
    "Scaled",
    "Slot",
    "SlotFact",
    "Straight",
    "Term",
    "Total",
    "Totals",
    "Value",
    "Zeros",
    "sizes_of",
    "totals_of",
    "shared_slot",
]


@dataclass(frozen=True)
class Total:
    """How many tokens of each expert have these guards, over `labels`. `source`: the mask that was summed."""

    routing: Routing
    labels: frozenset[str]
    guards: frozenset[Bit]
    source: Value | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Queue:
    """`merged`: of a mask that says whether any choice of a token is e. `whole`: of one choice alone, its
    number, and the queue of all choices in which it stands."""

    routing: Routing
    labels: frozenset[str]
    guards: frozenset[Bit] = frozenset()
    before: frozenset[Total] = frozenset()
    merged: bool = False
    whole: tuple[int, Queue] | None = None


@dataclass(frozen=True)
class Value:
    node: Any  # or a number
    dims: Dims
    inverted: bool = False  # its logical not


@dataclass(frozen=True)
class Bit:
    """0 or 1: whether a position in `queue` is below `limit`; or any truth value `node`. `source`: where it
    can be read (equal bits have equal values)."""

    queue: Queue | None = None
    limit: Size | None = None
    node: fx.Node | None = None
    source: Value | None = field(default=None, compare=False)

    @property
    def value(self) -> Value:
        """Where it can be read, as every guard of a term can; that of a place that is cut off cannot."""
        if self.source is None:
            raise TedfxError(f"a guard of a mask of slots is no value of the graph: {self}")
        return self.source


@dataclass(frozen=True)
class Slot:
    """1 where the place is c. `place`: a value that is `start` + c there; `outside`, `off` and `cut`: as of
    its Place, in numbers of slots. `count`: how many slots there are, as a node (None: a number of its own)
    and what is added to it. `open`: a place beyond them has none, and that is no error."""

    queue: Queue
    first: int
    guards: frozenset[Bit]
    place: Value
    size: Size
    start: int = 0
    outside: Size | None = field(default=None, compare=False)
    off: Size | None = field(default=None, compare=False)
    cut: tuple[Bit, Size] | None = field(default=None, compare=False)
    count: tuple[fx.Node | None, int] = field(default=(None, 0), compare=False)
    open: bool = field(default=False, compare=False)

    def is_none(self, number: Size | None) -> bool:
        """Whether a number is provably that of no slot."""
        if number is None:
            return False
        below, above = sympy.sympify(number), sympy.sympify(as_size(number - self.size))
        return bool(below.is_negative or above.is_nonnegative)


@dataclass(frozen=True)
class Term:
    """`exact`: its values are bits, all of them guards. `nonzero`: it is 1 where the product of its values is
    not 0."""

    routing: Routing
    hit: bool = False
    slot: Slot | None = None
    values: tuple[Value, ...] = ()
    guards: frozenset[Bit] = frozenset()
    exact: bool = False
    nonzero: bool = False
    merged: bool = False

    @property
    def plain(self) -> bool:
        """A value by token, at the expert that was chosen."""
        return not self.hit and self.slot is None

    @property
    def own_slot(self) -> Slot:
        """Its slot, of a term that has one: those of a mask of slots do."""
        if self.slot is None:
            raise TedfxError(f"a term of a mask of slots has no slot: {self}")
        return self.slot


# --- facts: what a node is ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mask:
    dims: Dims
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Place:
    """`first` + the position in the queue, where the guards are 1. If they are known: `outside`, its value
    where the expert was not chosen; `off`, where it was, and a guard but that of `cut` is 0. `cut`: of a
    place that was cut off, the guard that says who is not beyond, and the value of those who are."""

    dims: Dims
    queue: Queue
    first: int
    guards: frozenset[Bit]
    outside: Size | None = None
    reduced: bool = field(default=False)  # at the expert that was chosen
    off: Size | None = None
    cut: tuple[Bit, Size] | None = None

    def shifted(self, by: int) -> Place:
        """The place plus a number."""
        plus = lambda x: None if x is None else as_size(x + by)
        cut = None if self.cut is None else (self.cut[0], as_size(self.cut[1] + by))
        return replace(self, first=self.first + by, outside=plus(self.outside), off=plus(self.off), cut=cut)

    @property
    def elsewhere(self) -> Size | None:
        """`outside`, of a place that says of each (token, choice, expert) whether it was chosen."""
        each = not self.reduced and not self.queue.merged and any("e" in dim for dim in self.dims)
        return self.outside if each else None


@dataclass(frozen=True)
class Totals:
    dims: Dims
    totals: frozenset[Total]


@dataclass(frozen=True)
class Drop:
    """The logical not of a bit."""

    dims: Dims
    term: Term


@dataclass(frozen=True)
class Zeros:
    """A value that is 0 where one of the guards is, which need not be values of the graph."""

    dims: Dims
    routing: Routing
    guards: frozenset[Bit]


@dataclass(frozen=True)
class Numbers:
    """0, 1, .. size - 1."""

    dims: Dims
    size: Size
    source: Any  # the node of the size, or a number


@dataclass(frozen=True)
class Counts:
    """A number per expert [E]: so many times each of the parts (slot_runs.py), summed. `total`: what it is as
    a total."""

    dims: Dims
    routing: Routing
    parts: Mapping[tuple[Any, ...], int]
    total: Totals | None = None


@dataclass(frozen=True)
class Scaled:
    """ids * size; `source`: the node of the size, or a number. With `runs`, where the run of the expert
    begins, each as long as that part of a `Counts` says, and no shorter than `size`."""

    dims: Dims
    routing: Routing
    size: Size
    source: Any = field(default=None, compare=False)
    runs: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Address:
    """ids * size + place, the row of a buffer [E * size, ..], where the `guards` are 1; elsewhere `off`, if
    that is known. The place is the value of `node` plus `shift`; `source`: the node of the size, or a
    number."""

    dims: Dims
    place: Place
    node: fx.Node
    size: Size
    source: Any = field(default=None, compare=False)
    guards: frozenset[Bit] = frozenset()
    off: Size | None = None
    shift: int = 0
    runs: tuple[Any, ...] | None = None

    def shifted(self, by: int) -> Address:
        off = None if self.off is None else as_size(self.off + by)
        return replace(self, place=self.place.shifted(by), off=off, shift=self.shift + by)


@dataclass(frozen=True)
class Straight:
    """A mask through which a gradient goes straight to the weights that it was made of: `terms`, and
    `weights - weights.detach()`, which is zero; `terms` is empty of the latter alone."""

    dims: Dims
    terms: tuple[Term, ...]
    weights: tuple[Term, ...]


SlotFact: TypeAlias = Mask | Place | Totals | Drop | Zeros | Numbers | Counts | Scaled | Address | Straight


def totals_of(fact: SlotFact | None) -> Totals | None:
    """The totals that a value is."""
    return fact.total if isinstance(fact, Counts) else fact if isinstance(fact, Totals) else None


def sizes_of(fact: SlotFact) -> Sizes:
    """Label -> size."""
    if isinstance(fact, Numbers):
        return {"c": fact.size}
    if isinstance(fact, (Counts, Scaled, Zeros)):
        return fact.routing.sizes
    if isinstance(fact, (Place, Address)):
        place = fact if isinstance(fact, Place) else fact.place
        return place.queue.routing.sizes
    if isinstance(fact, Totals):
        return next(iter(fact.totals)).routing.sizes
    terms = (
        (fact.term,)
        if isinstance(fact, Drop)
        else fact.terms or fact.weights
        if isinstance(fact, Straight)
        else fact.terms
    )
    slots = [t.slot.size for t in terms if t.slot is not None]
    return {**terms[0].routing.sizes, **({"c": slots[0]} if slots else {})}


# --- the proof ----------------------------------------------------------------------------------------------


def shared_slot(terms: tuple[Term, ...], over: Set[str]) -> str:
    """Why two tokens (or choices of one) may share a slot of an expert, which sums over the token labels
    `over`; "" where none can."""
    for term in terms:
        queue, choices = term.own_slot.queue, term.routing.choices > 1
        if queue.routing is not term.routing:
            return "a token's place was counted among the tokens of another choice of experts"
        if not term.own_slot.guards <= term.guards:
            return "tokens beyond the capacity are not masked out: they share a slot"
        if choices and not (queue.merged or "k" in queue.labels):
            return "each choice counts its places from zero"
        if (queue.merged or term.merged) and choices and not term.routing.unique:
            return "a token that may name an expert twice has one place there"
        if not over <= queue.labels:
            return "places are counted in groups of tokens, and the slots are filled from all groups"
    for i, one in enumerate(terms):
        for other in terms[i + 1 :]:
            if one.own_slot.first != other.own_slot.first or not (_behind(one, other) or _behind(other, one)):
                return "one choice of experts does not queue behind another"
    return ""


def _behind(later: Term, earlier: Term) -> bool:
    queue = earlier.own_slot.queue
    one, other = queue.whole, later.own_slot.queue.whole
    if one is not None and other is not None and one[1] == other[1] and one[0] != other[0]:
        return True  # other choices of one queue
    first = {bit for bit in earlier.guards if bit.queue == queue}
    before = later.own_slot.queue.before
    for total in before:
        if (
            total.routing is queue.routing
            and total.labels == queue.labels
            and queue.guards <= total.guards <= queue.guards | first
        ):
            if queue.before <= before - {total}:
                return True
    return False
