"""What a rule says of a node, the registry of rules, and the annotator that rules talk to.

A rule relates the factors of a node's operands and outputs. It returns a `Relation`; sharding, types and the
type check all follow from it: ``tedfx/decisions/decide.py`` reads nothing else. A factor of an operand is

- in the output: a shard passes through;
- ``contracted``: the op sums over it, so a shard makes the output a partial sum;
- ``whole``: the op needs all of it on that operand;
- ``absorbed``: the op has a parallel form that reduces by itself (vocabulary-parallel cross-entropy).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Callable, Sequence

import sympy
import torch
from torch import fx

from tedfx import ops
from tedfx.graph.facts import DIFFERENTIABLE, VAL, copy_provenance
from tedfx.graph.nodes import op_name
from tedfx.placement.factors import (
    Factor,
    as_size,
    dim_size,
    divides,
    is_data,
    leaves,
    quotient,
    settle,
    unify,
)

_BATCHED = frozenset(ops.BATCHED.values())
_LINEAR = (
    "aten",
    "prims",
    "tedfx",
)  # operators whose backward is the adjoint of a derivative; that of a user's own may be anything


def regroup_barrier(x):
    """Identity between two factorisations of a dim that do not agree; its operand is whole on that dim."""
    return x


@dataclass
class Relation:
    """Operands are counted by position in `operands(node)`."""

    out: list  # dims of the output; for several outputs a list of dims lists
    whole: dict = field(default_factory=dict)  # position -> factors
    contracted: tuple = ()
    absorbed: tuple = ()
    created: tuple = ()  # factors that no operand carries; kind "expand" may create them sharded
    linear: tuple = ()  # groups of positions in which the op is jointly linear
    several: bool = False  # several outputs
    kind: str = ""  # name of a special typing rule, else the general one
    # its gradient is not linear in the cotangents, so it needs those of all ranks: no result of replicated
    # operands may be R
    complete: bool = False
    constant: frozenset = (
        frozenset()
    )  # positions whose gradient depends on no value: the same on every rank, so they are never R
    unread: frozenset = frozenset()  # those of them whose value is read nowhere: P is as good as I


RULES: dict[str, Callable] = {}


def rule(*names: str):
    def register(fn):
        for name in names:
            RULES[name] = fn
        return fn

    return register


def is_tensor(node) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def operands(node: fx.Node) -> list[fx.Node]:
    """Tensor operands in argument order, with repetitions (lists flattened). Of an item of a batched op, the
    one value that it is made of."""
    if node.target is operator.getitem and node.args[0].target in _BATCHED:
        values, index = node.args[0].args[0], node.args[1]
        return [values[index]]
    found: list[fx.Node] = []

    def visit(arg):
        if isinstance(arg, fx.Node):
            if is_tensor(arg):
                found.append(arg)
        elif isinstance(arg, (list, tuple)):
            for item in arg:
                visit(item)

    visit(node.args)
    for value in node.kwargs.values():
        visit(value)
    return found


def argument(node: fx.Node, index: int, name: str, default=None):
    """An argument given by position or by name."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


class Annotator:
    """Gives every value its dims, node by node (``passes/annotate.py`` drives it)."""

    def __init__(self, graph: fx.Graph, tensor_degree: int = 1):
        self.graph, self.tensor_degree = graph, tensor_degree
        self.symbols: dict[sympy.Expr, Factor] = {}
        self.given: dict[sympy.Expr, Factor] = {}  # those of the inputs, the batch first
        self.node: fx.Node | None = None
        self._replaced: dict[fx.Node, fx.Node] = {}
        self.barriers = 0
        self.notes: list[str] = []

    # dims and sizes -----------------------------------------------------------------------------------------
    def dims(self, node: fx.Node) -> list[tuple[Factor, ...]]:
        node = self._replaced.get(node, node)
        return [leaves(dim) for dim in node.meta["dims"]]

    def give(self, size, factor: Factor) -> None:
        """A size of the inputs: its factor stands for every created dim of that size."""
        factor = self.symbols.setdefault(size, factor)
        self.given.setdefault(size, factor)

    def dim_of(self, size, name: str = "") -> tuple[Factor, ...]:
        """The dim of a created size: a fresh factor for a number, the canonical factors for symbols (products
        of input sizes in input order)."""
        size = as_size(size)
        if isinstance(size, int):
            return () if size == 1 else (Factor(size, name),)
        if size in self.symbols:
            return (self.symbols[size],)
        rest, parts = size, []
        for one, factor in self.given.items():
            if not isinstance(rest, int) and divides(one, rest):
                rest = quotient(rest, one)
                parts.append(factor)
        if isinstance(rest, int):
            return tuple(parts) + ((Factor(rest, name),) if rest != 1 else ())
        self.symbols[size] = Factor(size, name or str(size))
        return (self.symbols[size],)

    def fresh(self, dim: Sequence[Factor], name: str = "") -> tuple[Factor, ...]:
        """A new factor of the same size, unrelated to the old (the value is whole there)."""
        size = dim_size(leaves(dim))
        return () if size == 1 else (Factor(size, name),)

    # relations ----------------------------------------------------------------------------------------------
    def may_refine(self, factor: Factor, sizes: list) -> bool:
        """A factor divisible by the tensor degree is not refined into parts none of which is (4 heads over 4
        ranks stay 4 heads where the 2 kv heads x 2 are repeated: the kv side then is whole and sliced)."""
        t = self.tensor_degree
        if t == 1 or not isinstance(factor.size, int) or factor.size % t:
            return True
        return any(isinstance(s, int) and s % t == 0 for s in sizes)

    def match(self, *places: tuple[fx.Node, int]) -> tuple[Factor, ...]:
        """State that these dims of operands are one dim (size-1 dims broadcast and are left out); its
        factors.

        Where two factorisations do not agree, a barrier is put before the later operand, which then is whole
        on that dim; before all of them, where it has parts that no single factor refines into.
        """
        wide = [(n, d) for n, d in places if self.dims(n)[d] != ()]
        if not wide:
            return ()
        dim = lambda place: self.dims(place[0])[place[1]]
        first = wide[0]
        for other in wide[1:]:
            settle(dim(first), dim(other))
            if not unify(dim(first), dim(other), self.may_refine):
                self.barrier(*other)
                if not unify(dim(first), dim(other), self.may_refine):
                    return self.whole(wide)
        return dim(first)

    def whole(self, places: list[tuple[fx.Node, int]]) -> tuple[Factor, ...]:
        """These dims as one new factor, each behind a barrier. Their sizes may be written in different ways
        (`min(256, s)` for s, a total of counts): that they are equal the op itself asks for, here and on a
        single device; the plainest one stays."""
        plain = lambda size: (
            isinstance(size, sympy.Expr) and any(is_data(s) for s in size.free_symbols),
            sympy.sympify(size).count_ops(),
            str(size),
        )
        size = min((dim_size(self.dims(n)[d]) for n, d in places), key=plain)
        joint = Factor(size)
        for n, d in places:
            self.barrier(n, d, (joint,))
        return (joint,)

    def barrier(self, operand: fx.Node, dim: int, fresh: tuple[Factor, ...] | None = None) -> fx.Node:
        """`operand` whole on a dim, which has these factors behind it (new ones by default)."""
        current = self._replaced.get(operand, operand)
        old = [leaves(d) for d in current.meta["dims"]]
        with self.graph.inserting_before(self.node):
            new = self.graph.call_function(regroup_barrier, (current,))
        copy_provenance(current, new)
        for key in (VAL, DIFFERENTIABLE):
            if current in key:
                key[new] = key[current]
        new.meta["dims"] = [(fresh or self.fresh(d)) if i == dim else d for i, d in enumerate(old)]
        new.meta["relation"] = Relation(
            out=new.meta["dims"], whole={0: old[dim]}, linear=(frozenset({0}),), created=new.meta["dims"][dim]
        )
        self._replaced[operand] = new
        self.barriers += 1
        return new

    def annotate(self, node: fx.Node, fn: Callable) -> None:
        self.node, self._replaced = node, {}
        relation = fn(node, self)
        for old, new in self._replaced.items():
            node.replace_input_with(old, new)
        node.meta["relation"] = relation
        if relation.several:
            node.meta["dims_of"] = relation.out
        else:
            node.meta["dims"] = relation.out


def positions(node: fx.Node, *wanted: fx.Node) -> frozenset[int]:
    return frozenset(i for i, n in enumerate(operands(node)) if n in wanted)


def whole_everywhere(node: fx.Node, ctx: Annotator, note: bool = True) -> Relation:
    """The rule of ops without a rule: every operand whole, every output replicated."""
    whole = {i: tuple(f for d in ctx.dims(n) for f in d) for i, n in enumerate(operands(node))}
    if note:
        ctx.notes.append(f"{op_name(node)} has no rule: its operands are replicated")
    value = node.meta["val"]
    fresh = lambda t: [() if as_size(s) == 1 else (Factor(as_size(s)),) for s in t.shape]
    complete = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in _LINEAR
    if isinstance(value, (tuple, list)):
        return Relation(
            out=[fresh(v) if isinstance(v, torch.Tensor) else [] for v in value],
            whole=whole,
            several=True,
            complete=complete,
        )
    return Relation(
        out=fresh(value), whole=whole, created=tuple(f for d in fresh(value) for f in d), complete=complete
    )
