"""Sizes of inputs that are no symbols of their own.

Where a model only accepts an even batch (`x.view(2, -1)`, `x[::2] * x[1::2]`), torch.export writes that size
as `2*s` and all other sizes in terms of `s`. Here: from such a size to its symbol and back. `s` is a whole
number for every size that the model accepts, so sizes made from it need no division; a factor of the size
`2*s` may be refined into (s, 2), pairs of neighbours, which a shard of the first part keeps together
(`tedfx/placement/factors.py`). What that asks of the rows of a rank, `Fit` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy

from tedfx.errors import CallError
from tedfx.graph.signature import show
from tedfx.placement.factors import as_size, dim_size, leaves
from tedfx.placement.types import sharding_axes


def symbol_of(size) -> sympy.Symbol | None:
    """The symbol that a size is a multiple of, give or take a constant (`s`, `2*s`, `3*s + 1`); None for any
    other size."""
    size = as_size(size)
    if isinstance(size, int) or len(size.free_symbols) != 1:
        return None
    (symbol,) = size.free_symbols
    step, _ = _line(size, symbol)
    return symbol if step is not None and step > 0 else None


def solve(size, value):
    """What the symbol of `size` is where the size is `value` (a number or an expression): `2*s` is 8 for s =
    4."""
    step, start = _line(as_size(size), symbol_of(size))
    return as_size((sympy.sympify(value) - start) / step)


def _line(size, symbol) -> tuple:
    if size == symbol:
        return 1, 0
    step = size.diff(symbol)
    start = size.subs(symbol, 0)
    return (int(step), int(start)) if step.is_Integer and start.is_Integer else (None, None)


@dataclass(frozen=True)
class Fit:
    """What a dim of an input has to be on a rank, besides what the model accepts
    (`tedfx/trace/call_check.py`).

    path, dim   where it is in the call
    piece       neighbours that an op takes together: a rank must hold whole pieces
    line        the op's, in the model
    """

    path: tuple
    dim: int
    piece: int
    line: str

    def check(self, flat: Mapping[tuple, Any]) -> None:
        """CallError where the call does not fit; `flat`: its leaves by path."""
        actual = flat[self.path].shape[self.dim]
        if actual % self.piece:
            raise CallError(
                f"dim {self.dim} of {show(self.path)} is {actual} on a rank, and the model takes "
                f"{self.piece} "
                f"neighbours at a time | at {self.line} | pass a multiple of {self.piece} per rank, so "
                "that none of "
                "them lie on two ranks"
            )


def whole_pieces(compilation) -> list[Fit]:
    """What a call of a rank has to fit besides its trace's bounds: nothing for a model that takes any
    size."""
    found, inputs = [], compilation.trace.inputs
    for node in compilation.graph_module.graph.find_nodes(op="placeholder"):
        if node.name not in inputs:
            continue
        for d, dim in enumerate(node.meta["dims"]):
            parts = leaves(dim)
            derived = symbol_of(dim_size(parts)) not in (None, dim_size(parts))
            if derived and len(parts) > 1 and any(sharding_axes(node.meta["type"], f) for f in parts):
                line = compilation.pieces.get(parts[0].root(), "an unknown line")
                found.append(Fit(inputs[node.name], d, dim_size(parts[1:]), line))
    return found
