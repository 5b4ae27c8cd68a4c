"""One collective of a step, and sums of them.

The **payload** is the operand that this rank hands to the collective. **Wire** bytes are what it sends, in a
ring of n ranks: of a buffer of S bytes 2 S (n-1)/n for an all-reduce, S (n-1)/n for the others, where S is
the whole buffer: the input of an all-reduce, reduce-scatter or all-to-all, the output of an all-gather, which
is n payloads (`_WIRE`). ZeRO-3's gathers of parameters are all-gathers, and its scatters of gradients are
reduce-scatters.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch

from tedfx.ops.properties import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    GATHER_PARAMETERS,
    REDUCE_SCATTER,
    SCATTER_GRADIENTS,
)

Size = int | sympy.Expr

# What the run-time counter (`tedfx.ops.count_collectives`) calls them.
COUNTED = {
    GATHER_PARAMETERS: GATHER_PARAMETERS,
    SCATTER_GRADIENTS: SCATTER_GRADIENTS,
    "all_reduce": ALL_REDUCE,
    "all_gather": ALL_GATHER,
    "reduce_scatter": REDUCE_SCATTER,
    "all_to_all": ALL_TO_ALL,
}
PHASES = ("forward", "recompute", "backward", "boundary")

# Wire bytes per byte of payload, on n ranks. Whoever adds a collective says it here.
_WIRE = {
    ALL_REDUCE: lambda n: sympy.Rational(2 * (n - 1), n),
    **dict.fromkeys((ALL_GATHER, GATHER_PARAMETERS), lambda n: sympy.Integer(n - 1)),
    **dict.fromkeys((REDUCE_SCATTER, SCATTER_GRADIENTS, ALL_TO_ALL), lambda n: sympy.Rational(n - 1, n)),
}


@dataclass(frozen=True)
class Communication:
    """One collective of one step."""

    node: str
    op: str  # torch's name
    axes: tuple[str, ...]  # of size above 1
    ranks: int  # in the group
    phase: str
    elements: Size  # of the operand on this rank: int, or an expression in `batch` and `sequence`
    dtype: torch.dtype
    ragged: bool = False  # elements are those of balanced routing

    @property
    def payload(self) -> Size:
        """Bytes of the operand on this rank."""
        return self.elements * self.dtype.itemsize

    @property
    def factor(self) -> sympy.Rational:
        """Wire bytes per byte of payload."""
        return _WIRE[self.op](self.ranks)


@dataclass(frozen=True)
class Redundancy:
    """Bytes of a rank's payload that all-to-alls over `axes` move although the ranks over `copies` move the
    same."""

    axes: tuple[str, ...]
    copies: tuple[str, ...]
    payload: Size  # the part beyond one copy, all phases of a step


@dataclass(frozen=True)
class Total:
    """All collectives of one kind over the same axes in one phase."""

    phase: str
    op: str
    axes: tuple[str, ...]
    ranks: int
    count: int
    payload: Size
    wire: Size
    ragged: bool
