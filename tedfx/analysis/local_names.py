"""The names under which sizes of a rank are told: `batch` and `sequence`."""

from __future__ import annotations

from math import prod

import sympy
from torch import fx

from tedfx.analysis.sizes import Pieces, Share
from tedfx.errors import TedfxError
from tedfx.graph.facts import LOCAL_SHAPE


class LocalSizes:
    """A rank's sizes by name: the size symbols of a compilation, renamed `batch` and `sequence`, and numbers
    for them."""

    def __init__(self, compilation):
        roles = {symbol: name for name, symbol in compilation.trace.sizes.items()}
        self.names: dict[sympy.Symbol, sympy.Symbol] = {}
        symbols = {
            s
            for n in compilation.graph_module.graph.find_nodes(op="placeholder")
            for s in _free(LOCAL_SHAPE.get(n) or ())
        }
        for symbol in [*roles, *sorted(symbols - set(roles), key=str)]:
            node, dim = compilation.size_sources.get(str(symbol), (str(symbol), 0))
            self.names[symbol] = sympy.Symbol(roles.get(symbol, f"{node}_{dim}"), integer=True, positive=True)
        self._renamed: dict = {}

    def __call__(self, size):
        """A size of `local_shape` in the names of this class."""
        if isinstance(size, int):
            return size
        if size not in self._renamed:
            # A share of what ranks need not divide counts as the average: exact in sums over the ranks, but
            # for what is padded. Pieces of parameters count as the largest, which the first rank has.
            self._renamed[size] = (
                sympy.sympify(size)
                .replace(Share, lambda whole, degree, *axes: whole / degree)
                .replace(Pieces, lambda lengths, axes: max(lengths))
                .xreplace(self.names)
            )
        return self._renamed[size]

    def shape(self, node: fx.Node) -> tuple | None:
        shape = LOCAL_SHAPE.get(node)
        return None if shape is None else tuple(self(s) for s in shape)

    def elements(self, node: fx.Node):
        shape = self.shape(node)
        if shape is None:
            raise TedfxError(f"{node.name} has no local shape, so its elements cannot be counted")
        return prod(shape)


def _free(shape) -> set:
    return {s for size in shape if isinstance(size, sympy.Expr) for s in size.free_symbols}
