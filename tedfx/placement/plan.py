"""The plan that types follow: which factors each mesh axis shards, and what else it may cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import fx

from tedfx.placement.factors import Dim, Factor, leaves
from tedfx.placement.roles import Roles
from tedfx.placement.sizes import Size, Symbol, estimate
from tedfx.placement.types import Placement


@dataclass
class Plan:
    """Which factors each axis shards (`passes/shard.py`), and the hints that sizes are compared with.

    tokens    the factor of the tokens that tensor axes may cut besides (the sequence; the batch where there
              is none)
    sequence  axes on which row-wise ops keep tokens cut (`passes/sequence_parallel.py`)
    dedup     axes on which tokens are cut before they are sent to experts (`passes/drop_duplicate_tokens.py`)
    algebra   names of the rows of `passes/collective_algebra.py` that hold; without any, each sum is made
              where it arises (TED's and Megatron's order)
    dense     the expert factors of mixtures without a dispatch, and the other factors of their parameters
              (tedfx/decisions/dense_experts.py)
    routers   names of the placeholders of routers' parameters, which have such a factor and stay whole
    """

    roles: Roles
    factors: dict[str, list[Factor]] = field(default_factory=dict[str, list[Factor]])  # by axis
    hints: dict[Symbol, int] = field(default_factory=dict[Symbol, int])  # example values
    tokens: Factor | None = None
    sequence: tuple[str, ...] = ()
    dedup: tuple[str, ...] = ()
    algebra: frozenset[str] = frozenset()
    dense: dict[Factor, set[Factor]] = field(default_factory=dict[Factor, set[Factor]])
    routers: set[str] = field(default_factory=set[str])
    numbers: dict[Size, float] = field(default_factory=dict[Size, float], repr=False)  # under the hints

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

    def chosen(self, axis: str, dims: Iterable[Dim]) -> Factor | None:
        """The factor among these dims that the plan shards over an axis."""
        for dim in dims:
            for leaf in leaves(dim):
                if self.shards(axis, leaf):
                    return leaf
        return None

    def elements(self, dims: Iterable[Dim]) -> float:
        """Number of elements, symbols replaced by their hints."""
        total = 1.0
        for dim in dims:
            for leaf in leaves(dim):
                size = leaf.size
                if size not in self.numbers:
                    self.numbers[size] = estimate(size, self.hints)
                total *= self.numbers[size]
        return total


@dataclass
class Decision:
    """Per operand the placement it must have (None: as it is); per output its placement."""

    targets: list[Placement | None]
    out: list[Placement]


def roots(factors: Iterable[Factor]) -> set[Factor]:
    return {f.root() for f in leaves(factors)}


def differentiable(node: fx.Node) -> bool:
    return node.meta.get("differentiable", False)
