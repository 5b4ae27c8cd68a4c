"""Whether the sizes of a call fit what was traced.

A dim that the trace left free may be anything within its bounds, equal symbols have equal sizes, every other
dim is as traced. The batch of a call is a rank's part of the global one; bounds and conditions are about the
global batch. Sizes that were found to fit are remembered, so a call costs a look-up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor

from tedfx.errors import CallError
from tedfx.graph.facts import VAL
from tedfx.graph.signature import Path, show
from tedfx.placement.sizes import as_size, holds, symbols_of

REMEDY = "pass inputs of these sizes as example_inputs of parallelize"


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


class SizeCheck:
    """`check(tensors by path)` raises CallError for sizes that the trace does not hold for. ranks: how many
    have a part of the global batch each."""

    def __init__(self, trace, ranks: int = 1):
        placeholders = {n.name: n for n in trace.graph_module.graph.find_nodes(op="placeholder")}
        self.inputs = {
            path: [_expression(s) for s in VAL[placeholders[name]].shape]
            for name, path in trace.inputs.items()
        }
        self.bounds, self.conditions, self.ranks = trace.bounds, trace.conditions, ranks
        self.batch, self.names = (
            trace.sizes.get("batch"),
            {symbol: name for name, symbol in trace.sizes.items()},
        )
        self.rows = trace.extents.get(
            "batch"
        )  # the batch itself: its symbol, or 2*s where only even ones will do
        self._fine: set[tuple] = set()

    @property
    def batch_inputs(self) -> frozenset[Path]:
        """The inputs whose dim 0 is the batch; others are the same on every rank."""
        return frozenset(
            path
            for path, dims in self.inputs.items()
            if dims and self.rows is not None and dims[0] == self.rows
        )

    def __call__(self, given: Mapping[Path, Tensor]) -> None:
        shapes = tuple(given[path].shape for path in self.inputs)
        if shapes not in self._fine:
            self._check(given)
            self._fine.add(shapes)

    def _check(self, given: Mapping[Path, Tensor]) -> None:
        found: dict[
            sympy.Symbol, tuple[int, str]
        ] = {}  # symbol -> (its value over all ranks, where it was found)
        for path, dims in self.inputs.items():
            shape = given[path].shape
            if len(dims) != len(shape):
                raise CallError(f"{show(path)} was traced with {len(dims)} dims and has {len(shape)}")
            for dim, (expr, here) in enumerate(zip(dims, shape)):
                where = f"dim {dim} of {show(path)}"
                whole = here * self.ranks if self.batch in expr.free_symbols else here
                said = f"{here} on each of {self.ranks} ranks, {whole} in all" if whole != here else str(here)
                unknown = [s for s in symbols_of(expr) if s not in found]
                if len(unknown) == 1:
                    known = expr.subs({s: size for s, (size, _) in found.items()})
                    size = self._solve(known, unknown[0], whole, f"{where} is {said}")
                    found[unknown[0]] = (size, f"dim {dim} of {show(path)}")
                    self._bounded(unknown[0], size, known, f"{where} is {said}")
                elif not unknown:
                    expected = int(as_size(expr.subs({s: size for s, (size, _) in found.items()})))
                    if expected != whole:
                        mine = expected // self.ranks if whole != here else expected
                        raise CallError(f"{where} is {here}; expected {mine}{self._why(expr, found)}")
        sizes = {s: size for s, (size, _) in found.items()}
        for condition in self.conditions:
            if holds(condition, sizes) is False:
                said = ", ".join(f"{name} = {sizes[s]}" for s, name in self.names.items() if s in sizes)
                over = " over all ranks" if self.ranks > 1 else ""
                raise CallError(f"the model only accepts sizes with {condition}; the call has {said}{over}")

    def _bounded(self, symbol: sympy.Symbol, size: int, expr, what: str) -> None:
        low, high = self.bounds.get(symbol, (1, None))
        if size < low or (high is not None and size > high):
            least, most = expr.subs(symbol, low), "any" if high is None else expr.subs(symbol, high)
            raise CallError(f"{what}; the model was traced for {least} to {most}")

    def _solve(self, expr, symbol, whole: int, what: str) -> int:
        """The symbol's value for which `expr` is `whole`."""
        if expr == symbol:
            return whole
        roots = [r for r in sympy.solve(expr - whole, symbol) if r.is_Integer and r > 0]
        if not roots:
            raise CallError(f"{what}; the model only accepts {expr} there, with a whole number {symbol}")
        return int(roots[0])

    def _why(self, expr, found) -> str:
        if expr.is_Symbol:
            return f", as {found[expr][1]}"
        if expr.free_symbols:
            return f", which is {expr}"
        return f", the size that was traced: the model's code fixes it, or the example had no other; {REMEDY}"
