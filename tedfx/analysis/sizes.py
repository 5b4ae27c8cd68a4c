"""Local sizes: every size in the local graph is written anew from the inputs' sizes.

A dim of the inputs' sizes that ranks split among themselves (tokens over a tensor axis) need not divide: its
local size is a `Share`. Nor need a dim of parameters (experts): there it is one of `Pieces`.

The symbol of the sharded batch dim stands, in the local graph, for this rank's part: `batch` there is the
local size, and the global one is `batch x degree`. So does the symbol s of a batch that must be even (`2*s`
in the trace): on a rank it is the local size, and the global s is `batch x degree / 2`. A size that only the
data tells is asked of the value that has it. Sizes that shape a tensor become local; sizes used as numbers (a
mean's divisor, the length of a range) stay global. The graph's own size arithmetic is dropped: dims know
their sizes, so nothing has to be followed.
"""

from __future__ import annotations

import math
import operator
from functools import reduce
from typing import TypeAlias

import sympy
import torch
from sympy.core.symbol import Str
from torch import fx

from tedfx import ops
from tedfx._torch import size_max, size_min
from tedfx.errors import TraceError, user_line
from tedfx.graph.facts import DIMS, TYPE, VAL
from tedfx.graph.nodes import is_tensor
from tedfx.ops.cuts import lengths_of
from tedfx.placement.factors import Factor, dim_size, leaves
from tedfx.placement.sizes import as_size, solve, symbol_of
from tedfx.placement.types import sharding_axes
from tedfx.stages.graphs import LocalGraph, TypedGraph

# Numbers made from sizes, through floats: a capacity of `ceil(tokens / experts * factor)`.
_NUMBERS = {
    "ToFloat": torch.sym_float,
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
    "CeilToInt": math.ceil,
    "FloorToInt": math.floor,
    "TruncToInt": math.trunc,
    "RoundToInt": round,
}


Number: TypeAlias = int | float | fx.Node


class Share(sympy.Function):
    """Share(whole, degree, *axis names): this rank's piece of a dim that `degree` ranks need not divide. As a
    number, the average."""

    @classmethod
    def eval(cls, whole, degree, *axes):
        if whole.is_Integer:
            return sympy.Rational(int(whole), int(degree))

    def _eval_is_integer(self):
        return True

    def _eval_is_nonnegative(self):
        return True

    def _sympystr(self, printer):
        return f"{printer.parenthesize(self.args[0], 50)}/{self.args[1]}"

    axes = property(lambda self: tuple(str(a) for a in self.args[2:]))


class Pieces(sympy.Function):
    """Pieces((lengths), (axis names)): this rank's piece of a dim whose size is a number that the ranks do
    not divide. As a number, the largest piece."""

    def _eval_is_integer(self):
        return True

    def _eval_is_nonnegative(self):
        return True

    def _eval_evalf(self, prec):
        return sympy.Float(self.largest, precision=prec)

    def _sympystr(self, printer):
        return f"({'|'.join(map(str, self.lengths))})"

    lengths = property(lambda self: tuple(int(n) for n in self.args[0]))
    axes = property(lambda self: tuple(str(a) for a in self.args[1]))
    largest = property(lambda self: max(self.lengths))


class Sizes:
    """Expressions and nodes for sizes of one local graph."""

    def __init__(self, program: TypedGraph | LocalGraph):
        self.graph, self.plan = program.graph, program.plan
        self.mesh = program.roles.mesh
        self.symbols: dict = {}  # symbol -> its global value, in local symbols
        self.sources: dict = {}  # symbol -> (placeholder, dim) whose local size it is here
        self.given: dict = {}  # factor -> axes that split the inputs along it
        self.nodes: dict = {}
        self.locals: dict = {}  # (global size, degree) -> local size
        self.products: dict = {}
        self.last: fx.Node | None = None
        self.current: fx.Node | None = None
        for node in self.graph.find_nodes(op="placeholder"):
            self.last = node
            for d, dim in enumerate(DIMS.get(node, ())):
                size = dim_size(leaves(dim))
                symbol = symbol_of(size)
                if symbol is not None and (
                    symbol not in self.sources or (symbol == size and self.symbols[symbol][1] != size)
                ):
                    axes = [sharding_axes(TYPE[node], f) for f in leaves(dim)]
                    self.given.update((f.root(), a) for f, a in zip(leaves(dim), axes))
                    self.sources[symbol] = (node, d)
                    self.symbols[symbol] = (solve(size, symbol * math.prod(map(self.mesh.size, axes))), size)

    def whole(self, expr):
        """A global size in terms of local symbols."""
        expr = as_size(expr)
        if isinstance(expr, int):
            return expr
        return as_size(
            expr.subs(
                {s: self.symbols[s][0] for s in expr.free_symbols & self.symbols.keys()}, simultaneous=True
            )
        )

    def factor(self, factor: Factor, type_) -> "int | sympy.Expr":
        """Local size of a factor in a value of this type."""
        axes = sharding_axes(type_, factor)
        counted = factor.root().everywhere
        rest = tuple(
            a for a in axes if a not in self.given.get(factor.root(), ())
        )  # what is left to split once the inputs' own split is taken off
        key = (factor.size, axes, rest, factor.ragged, counted)
        if key not in self.locals:
            total, degree = self.whole(factor.size) if counted is None else counted, self.mesh.size(axes)
            if isinstance(total, int) and total % degree:
                lengths = lengths_of(total, [self.mesh.size((a,)) for a in axes])
                self.locals[key] = Pieces(sympy.Tuple(*lengths), sympy.Tuple(*(Str(a) for a in axes)))
            elif isinstance(total, int):
                self.locals[key] = total // degree
            else:
                local, over = as_size(total / degree), self.mesh.size(rest)
                exact = over == 1 or factor.ragged or counted is not None or _is_whole(local)
                self.locals[key] = (
                    local if exact else Share(total / degree * over, over, *(Str(a) for a in rest))
                )
        return self.locals[key]

    def dim(self, dim, type_) -> "int | sympy.Expr":
        sizes = tuple(self.factor(f, type_) for f in leaves(dim))
        if len(sizes) == 1:
            return sizes[0]
        if sizes not in self.products:
            self.products[sizes] = as_size(reduce(operator.mul, sizes, sympy.Integer(1)))
        return self.products[sizes]

    def shape(self, node: fx.Node) -> list:
        """Local shape of a node, as expressions."""
        self.current = node
        return [self.dim(d, TYPE[node]) for d in DIMS[node]]

    # nodes --------------------------------------------------------------------------------------------------
    def node(self, expr) -> Number:
        """An int, or the node that computes the expression from the inputs' sizes."""
        expr = as_size(expr)
        if isinstance(expr, int):
            return expr
        if expr not in self.nodes:
            self.nodes[expr] = self._make(sympy.sympify(expr))
        return self.nodes[expr]

    def _call(self, target, *args) -> fx.Node:
        """Behind the inputs and their sizes; behind its operands where those are sizes of computed values."""
        given = [a for a in args if isinstance(a, fx.Node)]
        later = max(given if self.last is None else [self.last, *given], default=None)
        if later is None:  # a graph without inputs
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                return self.graph.call_function(target, args)
        with self.graph.inserting_after(later):
            made = self.graph.call_function(target, args)
        if later is self.last:
            self.last = made
        return made

    def _fold(self, target, numbers: list[Number]) -> Number:
        first, *rest = numbers
        for other in rest:
            first = self._call(target, first, other)
        return first

    def _of_data(self, symbol) -> tuple[fx.Node, int]:
        """The first value that is as long as only the data tells. What the node at hand makes, pieces of a
        split by such lengths, is no source of them."""
        for node in self.graph.nodes:
            if node is self.current:
                break
            for d, size in enumerate(getattr(VAL.get(node), "shape", ())):
                if as_size(size) == symbol and is_tensor(node):
                    return node, d
        raise TraceError(
            f"a size that only the data tells ({symbol}) shapes a value here, and no tensor before it "
            f"has that size | at {user_line(self.current)} | use a mask over all "
            "elements, or a size that follows from those of the inputs"
        )

    def _make(self, expr) -> Number:
        if expr.is_Float:
            return float(expr)
        if expr.is_Symbol:
            source, dim = self.sources.get(expr) or self._of_data(expr)
            return self._call(torch.ops.aten.sym_size.int, source, dim)
        if expr.is_Add or expr.is_Mul:
            top, bottom = sympy.fraction(sympy.together(expr))
            if bottom.is_Integer and bottom != 1:
                return self._call(operator.floordiv, self.node(top), int(bottom))
        if isinstance(expr, Pieces):
            return self._call(ops.share, expr.lengths, expr.axes)
        if isinstance(expr, Share):
            return self._call(ops.share, self.node(expr.args[0]), expr.axes)
        args: list[Number] = [self.node(a) for a in expr.args]
        if expr.is_Add:
            return self._fold(operator.add, args)
        if expr.is_Mul:
            return self._fold(operator.mul, args)
        if expr.is_Pow and expr.exp.is_Integer and expr.exp > 0:
            args = [self.node(expr.base)] * int(expr.exp)
            return self._fold(operator.mul, args)
        table = {
            "FloorDiv": operator.floordiv,
            "Mod": operator.mod,
            "PythonMod": operator.mod,
            "CleanDiv": operator.floordiv,
            "Max": size_max,
            "Min": size_min,
        }
        name = type(expr).__name__
        if name in _NUMBERS:
            return self._call(_NUMBERS[name], *args)
        if name in table:
            return self._fold(table[name], args)
        raise TraceError(
            f"a size of the form {expr} cannot be written for one rank | at {user_line(self.current)} | "
            "make it of +, *, //, %, min and max of the inputs' sizes"
        )


def _is_whole(size) -> bool:
    """Whether a quotient is a whole number whatever the symbols are, as far as its form tells."""
    if isinstance(size, int) or not size.is_polynomial():
        return True
    return all(c.is_Integer for c in sympy.Poly(size, *sorted(size.free_symbols, key=str)).coeffs())
