"""Types: what a value is on each mesh axis, and which conversions exist.

A **type** maps each mesh axis (of size above 1) to a placement: ``R`` (replicated, cotangent still to be
summed over the axis), ``I`` (invariant: replicated, cotangent replicated too), ``P`` (partial sum) or
``Shard(factor)``. A shard of a ragged factor (rows after dispatch) prints as ``V``: it varies and has no
global dim. The vocabulary is that of the ``spmd_types`` package.

Cotangents: R <-> P, I <-> I, S <-> S, V <-> V. Hence a node's differentiable operands are all I on an axis
or none is: an I operand would receive a cotangent that is not replicated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Mapping

from tedfx.placement.factors import Factor, leaves

R, I, P = "R", "I", "P"


@dataclass(frozen=True)
class Shard:
    """Split along one factor, equal contiguous pieces in the order of the axis coordinate."""

    factor: Factor

    def __eq__(self, other) -> bool:
        return isinstance(other, Shard) and self.factor.root() is other.factor.root()

    def __hash__(self) -> int:
        return hash(self.factor.root().uid)

    def __repr__(self) -> str:
        return "V" if self.factor.root().ragged else f"S({self.factor.root().name or self.factor.root().uid})"


Placement = "str | Shard"
Type = "dict[str, str | Shard]"


def sharding_axes(type_: Mapping, factor: Factor) -> tuple[str, ...]:
    """The axes that shard a factor, in mesh order (major first)."""
    root = factor.root()
    return tuple(a for a, p in type_.items() if isinstance(p, Shard) and p.factor.root() is root)


def find_dim(dims: Iterable, factor: Factor) -> tuple[int, int] | None:
    """(dim, position within the dim) at which a factor stands; None where it does not."""
    root = factor.root()
    for d, dim in enumerate(dims):
        for k, leaf in enumerate(leaves(dim)):
            if leaf is root:
                return d, k
    return None


def format_type(type_: Mapping | None, dims=None) -> str:
    """``dp:S(0) tp:P``, invariant axes left out; a strided factor shows its position, ``S(1.1)``."""
    if type_ is None:
        return ""
    words = []
    for axis, placement in type_.items():
        if isinstance(placement, Shard) and not placement.factor.root().ragged and dims is not None:
            place = find_dim(dims, placement.factor)
            where = "?" if place is None else str(place[0]) if place[1] == 0 else f"{place[0]}.{place[1]}"
            words.append(f"{axis}:S({where})")
        elif placement != I:
            words.append(f"{axis}:{placement}")
    return " ".join(words) or "I"
