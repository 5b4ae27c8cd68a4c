"""Numbers of routed rows, where something is drawn for each row: what a row draws must not depend on where it
is computed.

A row's place on a rank follows from the exchange. Its number is that of its assignment in the global batch
(`tedfx/ops/random.py`, `row_numbers`). The numbers go the way of the rows, by the same ops, as int64 beside
them: 8 bytes a row, forward only, and only for a dispatch on whose rows something draws.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from tedfx import ops
from tedfx.graph.draws import draws
from tedfx.graph.facts import DIFFERENTIABLE, DIMS, DIMS_OF, TYPE, VAL
from tedfx.graph.nodes import operand
from tedfx.placement.factors import leaves
from tedfx.placement.types import I, Shard
from tedfx.stages.graphs import TypedGraph

__all__ = ["RowNumbers"]


class RowNumbers:
    """The numbers of one dispatch's rows, moved as the rows are.

    program.row_numbers maps the factor of the rows to (the numbers as they arrive, the dispatch's tokens, k),
    for `passes/localize.py`, which knows local sizes and writes the factors of the tokens.
    """

    def __init__(self, program: TypedGraph, dispatch: fx.Node, order: fx.Node, make: Callable):
        self.program, self.make = program, make
        self.tokens, ids = operand(dispatch, 0), operand(dispatch, 1)
        self.top_k = VAL[ids].shape[1]
        self.dims = [DIMS_OF[dispatch][0][0]]
        self.factor = leaves(self.dims[0])[0].root()
        self.now = self._made(ops.row_numbers, order, self.top_k, (), type_=TYPE[order])
        VAL[self.now] = VAL[dispatch][2]
        self.origin = self.now

    @classmethod
    def of(
        cls, program: TypedGraph, dispatch: fx.Node, order: fx.Node, make: Callable
    ) -> "RowNumbers | None":
        """None where nothing is drawn. To be made where `order` is known; `make(target, *args, dims=,
        type_=)` inserts a node."""
        rows = leaves(DIMS_OF[dispatch][0][0])[0].root()
        drawn = any(
            draws(n) and any(f.root() is rows for dim in DIMS[n] for f in leaves(dim))
            for n in program.graph_module.graph.nodes
        )
        return cls(program, dispatch, order, make) if drawn else None

    def move(self, target: Callable, *args, type_) -> None:
        """What is done to the rows, done to their numbers; `type_` is that of the rows then."""
        self.now = self._made(target, self.now, *args, type_=type_)

    def arrive(self) -> None:
        self.program.row_numbers[self.factor] = (self.now, self.origin, self.tokens, self.top_k)

    def _made(self, target, *args, type_) -> fx.Node:
        rows = {
            axis: p if isinstance(p, Shard) and p.factor.root() is self.factor else I
            for axis, p in type_.items()
        }
        new = self.make(target, *args, dims=self.dims, type_=rows)
        DIFFERENTIABLE[new] = False
        VAL.setdefault(new, None)
        return new
