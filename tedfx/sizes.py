"""Local sizes: every size in the local graph is written anew from the inputs' sizes.

A dim of the inputs' sizes that ranks split among themselves (tokens over a tensor axis) need not divide: its local size is a `Share`.

The size of the sharded batch dim stands, in the local graph, for this rank's part: `batch` there is the local size, and the global one is
`batch x degree`. Sizes that shape a tensor become local; sizes used as numbers (a mean's divisor, the length of a range) stay global. The graph's own
size arithmetic is dropped: dims know their sizes, so nothing has to be followed.
"""

from __future__ import annotations

import math
import operator
from functools import reduce

import sympy
import torch
from sympy.core.symbol import Str
from torch import fx

from tedfx import ops
from tedfx.factors import Factor, as_size, leaves
from tedfx.types import sharding_axes


# Numbers made from sizes, through floats: a capacity of `ceil(tokens / experts * factor)`.
_NUMBERS = {"ToFloat": torch.sym_float, "IntTrueDiv": operator.truediv, "FloatTrueDiv": operator.truediv, "CeilToInt": math.ceil, "FloorToInt": math.floor,
            "TruncToInt": math.trunc, "RoundToInt": round}  # fmt: skip


class Share(sympy.Function):
    """Share(whole, degree, *axis names): this rank's piece of a dim that `degree` ranks need not divide. As a number, the average."""

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


class Sizes:
    """Expressions and nodes for sizes of one local graph."""

    def __init__(self, program):
        self.program, self.graph, self.plan = program, program.graph_module.graph, program.plan
        self.mesh = program.roles.mesh
        self.degrees: dict = {}  # symbol -> degree by which inputs of that size are split
        self.sources: dict = {}  # symbol -> (placeholder, dim)
        self.given: dict = {}  # symbol -> axes that split the inputs of that size
        self.nodes: dict = {}
        self.locals: dict = {}  # (global size, degree) -> local size
        self.products: dict = {}
        self.last = None
        for node in self.graph.nodes:
            if node.op != "placeholder":
                break
            self.last = node
            for d, dim in enumerate(node.meta.get("dims", ())):
                if len(dim) == 1 and isinstance(leaves(dim)[0].size, sympy.Symbol) and leaves(dim)[0].size not in self.sources:
                    factor = leaves(dim)[0]
                    self.sources[factor.size] = (node, d)
                    self.given[factor.size] = sharding_axes(node.meta["type"], factor)
                    self.degrees[factor.size] = self.mesh.size(self.given[factor.size])

    def whole(self, expr):
        """A global size in terms of local symbols."""
        expr = as_size(expr)
        if isinstance(expr, int) or all(self.degrees.get(s, 1) == 1 for s in expr.free_symbols):
            return expr
        return as_size(expr.subs({s: s * d for s, d in self.degrees.items()}, simultaneous=True))

    def factor(self, factor: Factor, type_) -> "int | sympy.Expr":
        """Local size of a factor in a value of this type."""
        axes = sharding_axes(type_, factor)
        counted = factor.root().everywhere
        key = (factor.size, axes, factor.ragged, counted)
        if key not in self.locals:
            total, degree = self.whole(factor.size) if counted is None else counted, self.mesh.size(axes)
            if isinstance(total, int):
                assert total % degree == 0, (factor, degree)
                self.locals[key] = total // degree
            else:
                local = as_size(total / degree)
                whole = isinstance(local, int) or all(c.is_Integer for c in sympy.Poly(local, *sorted(local.free_symbols, key=str)).coeffs()) if local.is_polynomial() else True
                self.locals[key] = local if whole or factor.ragged or counted is not None else self._share(factor.size, axes)
        return self.locals[key]

    def _share(self, size, axes) -> Share:
        """What is left to split of a size once the inputs' own split is taken off it."""
        given = self.given.get(size, ())
        rest = tuple(a for a in axes if a not in given)
        return Share(self.whole(size) / self.mesh.size(given), self.mesh.size(rest), *(Str(a) for a in rest))

    def dim(self, dim, type_) -> "int | sympy.Expr":
        sizes = tuple(self.factor(f, type_) for f in leaves(dim))
        if len(sizes) == 1:
            return sizes[0]
        if sizes not in self.products:
            self.products[sizes] = as_size(reduce(operator.mul, sizes, sympy.Integer(1)))
        return self.products[sizes]

    def shape(self, node: fx.Node) -> list:
        """Local shape of a node, as expressions."""
        return [self.dim(d, node.meta["type"]) for d in node.meta["dims"]]

    # nodes ----------------------------------------------------------------------------------------------------------------
    def node(self, expr):
        """An int, or the node that computes the expression from the inputs' sizes."""
        expr = as_size(expr)
        if isinstance(expr, int):
            return expr
        if expr not in self.nodes:
            self.nodes[expr] = self._make(sympy.sympify(expr))
        return self.nodes[expr]

    def _call(self, target, *args) -> fx.Node:
        with self.graph.inserting_after(self.last):
            self.last = self.graph.call_function(target, args)
        return self.last

    def _make(self, expr):
        if expr.is_Float:
            return float(expr)
        if expr.is_Symbol:
            source, dim = self.sources[expr]
            return self._call(torch.ops.aten.sym_size.int, source, dim)
        if isinstance(expr, Share):
            return self._call(ops.share, self.node(expr.args[0]), expr.axes)
        args = [self.node(a) if not a.is_Rational or a.is_Integer else a for a in expr.args]
        if expr.is_Add:
            return reduce(lambda a, b: self._call(operator.add, a, b), args)
        if expr.is_Mul:
            top = [a for a, s in zip(args, expr.args) if not (s.is_Rational and not s.is_Integer)]
            bottom = [int(s.q) for s in expr.args if s.is_Rational and not s.is_Integer]
            top += [int(s.p) for s in expr.args if s.is_Rational and not s.is_Integer and s.p != 1]
            value = reduce(lambda a, b: self._call(operator.mul, a, b), top)
            return reduce(lambda a, b: self._call(operator.floordiv, a, b), bottom, value)
        if expr.is_Pow and expr.exp.is_Integer and expr.exp > 0:
            return reduce(lambda a, b: self._call(operator.mul, a, b), [self.node(expr.base)] * int(expr.exp))
        table = {"FloorDiv": operator.floordiv, "Mod": operator.mod, "PythonMod": operator.mod, "CleanDiv": operator.floordiv, "Max": torch.sym_max, "Min": torch.sym_min}
        name = type(expr).__name__
        if name in _NUMBERS:
            return self._call(_NUMBERS[name], *args)
        if name in table:
            return reduce(lambda a, b: self._call(table[name], a, b), args)
        raise NotImplementedError(f"a size of the form {expr} cannot be written for one rank")
