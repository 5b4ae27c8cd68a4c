"""The plan that types follow: which factors each mesh axis shards, and what else it may cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Sequence

from torch import fx

from tedfx.placement.factors import Factor, leaves
from tedfx.placement.roles import Roles


@dataclass
class Plan:
    """Which factors each axis shards (`passes/shard.py`), and the hints that sizes are compared with.

    tokens    the factor of the tokens that tensor axes may cut besides (the sequence; the batch where there
              is none)
    sequence  axes on which row-wise ops keep tokens cut (`passes/sequence_parallel.py`)
    dedup     axes on which tokens are cut before they are sent to experts (`passes/drop_duplicate_tokens.py`)
    algebra   names of the rows of `passes/collective_algebra.py` that hold; without any, each sum is made
              where it arises (TED's and Megatron's order)
    """

    roles: Roles
    factors: dict = field(default_factory=dict)  # axis -> list of factors
    hints: dict = field(default_factory=dict)  # size symbol -> example value
    tokens: Factor | None = None
    sequence: tuple[str, ...] = ()
    dedup: tuple[str, ...] = ()
    algebra: frozenset[str] = frozenset()
    numbers: dict = field(default_factory=dict, repr=False)  # size -> its value under the hints

    @property
    def axes(self) -> tuple[str, ...]:
        return self.roles.mesh.wide(self.roles.mesh.names)

    def take(self, axes: Sequence[str], factor: Factor) -> None:
        for axis in axes:
            self.factors.setdefault(axis, []).append(factor)

    def cuts(self, axis: str) -> Factor | None:
        """The token factor, where this axis may cut it."""
        return (
            self.tokens.root()
            if self.tokens is not None and (axis in self.sequence or axis in self.dedup)
            else None
        )

    def shards(self, axis: str, factor: Factor) -> bool:
        return any(f.root() is factor.root() for f in self.factors.get(axis, ()))

    def axes_of(self, factor: Factor) -> tuple[str, ...]:
        return tuple(a for a in self.axes if self.shards(a, factor))

    def chosen(self, axis: str, dims) -> Factor | None:
        """The factor among these dims that the plan shards over an axis."""
        for dim in dims:
            for leaf in leaves(dim):
                if self.shards(axis, leaf):
                    return leaf
        return None

    def elements(self, dims) -> float:
        """Number of elements, symbols replaced by their hints."""
        total = 1
        for dim in dims:
            for leaf in leaves(dim):
                size = leaf.size
                if not isinstance(size, int):
                    if size not in self.numbers:
                        self.numbers[size] = float(
                            size.subs({**{x: 2048 for x in size.free_symbols}, **self.hints})
                        )
                    size = self.numbers[size]
                total *= size
        return total


@dataclass
class Decision:
    """Per operand the placement it must have (None: as it is); per output its placement."""

    targets: list
    out: list


def roots(factors) -> set:
    return {f.root() for f in leaves(factors)}


def differentiable(node: fx.Node) -> bool:
    return node.meta.get("differentiable", False)
