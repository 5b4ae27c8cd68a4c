"""Types: what a value is on each mesh axis, and which conversions exist.

A **type** maps each mesh axis (of size above 1) to a **placement**, which is one of the classes below; the
first three have nothing to tell apart, so `R`, `I` and `P` are all there is of them. The vocabulary is that
of the ``spmd_types`` package.

Cotangents: R <-> P, I <-> I, S <-> S, V <-> V. Hence a node's differentiable operands are all I on an axis
or none is: an I operand would receive a cotangent that is not replicated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tedfx.placement.factors import Dim, Factor, leaves


@dataclass(frozen=True, repr=False)
class Replicated:
    """The same on every rank of the axis; its cotangent is still to be summed over them."""

    def __repr__(self) -> str:
        return "R"


@dataclass(frozen=True, repr=False)
class Invariant:
    """The same on every rank of the axis, and its cotangent is too."""

    def __repr__(self) -> str:
        return "I"


@dataclass(frozen=True, repr=False)
class PartialSum:
    """The value is the sum of what the ranks of the axis hold."""

    def __repr__(self) -> str:
        return "P"


@dataclass(frozen=True, eq=False, repr=False)
class Shard:
    """S: split along one factor, in contiguous pieces in the order of the axis coordinate. V, `varies`, where
    the factor is ragged (rows after dispatch): each rank has another number of them, which is data, and there
    is no global dim. Shards of factors that were unified are equal."""

    factor: Factor

    @property
    def varies(self) -> bool:
        return self.factor.root().ragged

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shard) and self.factor.root() is other.factor.root()

    def __hash__(self) -> int:
        return hash(self.factor.root().uid)

    def __repr__(self) -> str:
        return "V" if self.varies else f"S({self.factor.root().name or self.factor.root().uid})"


R, I, P = Replicated(), Invariant(), PartialSum()

Placement: TypeAlias = Replicated | Invariant | PartialSum | Shard
Type: TypeAlias = dict[str, Placement]  # by mesh axis


def kind(placement: Placement) -> str:
    """R, I or P; S for any shard."""
    return "S" if isinstance(placement, Shard) else str(placement)


def sharding_axes(type_: Mapping[str, Placement], factor: Factor) -> tuple[str, ...]:
    """The axes that shard a factor, in mesh order (major first)."""
    root = factor.root()
    return tuple(a for a, p in type_.items() if isinstance(p, Shard) and p.factor.root() is root)


def find_dim(dims: Iterable[Dim], factor: Factor) -> tuple[int, int] | None:
    """(dim, position within the dim) at which a factor stands; None where it does not."""
    root = factor.root()
    for d, dim in enumerate(dims):
        for k, leaf in enumerate(leaves(dim)):
            if leaf is root:
                return d, k
    return None


def format_type(type_: Mapping[str, Placement] | None, dims: Sequence[Dim] | None = None) -> str:
    """``dp:S(0) tp:P``, invariant axes left out; a strided factor shows its position, ``S(1.1)``."""
    if type_ is None:
        return ""
    words: list[str] = []
    for axis, placement in type_.items():
        if isinstance(placement, Shard) and not placement.varies and dims is not None:
            place = find_dim(dims, placement.factor)
            where = "?" if place is None else str(place[0]) if place[1] == 0 else f"{place[0]}.{place[1]}"
            words.append(f"{axis}:S({where})")
        elif placement != I:
            words.append(f"{axis}:{placement}")
    return " ".join(words) or "I"
