"""What a rule says of a node, the registry of rules, and the annotator that rules talk to.

A rule relates the factors of a node's operands and outputs. It returns a `Relation`; sharding, types and the
type check all follow from it: ``tedfx/decisions/decide.py`` reads nothing else. A factor of an operand is

- in the output: a shard passes through;
- ``contracted``: the op sums over it, so a shard makes the output a partial sum;
- ``whole``: the op needs all of it on that operand;
- ``absorbed``: the op has a parallel form that reduces by itself (vocabulary-parallel cross-entropy).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import torch
from torch import fx

from tedfx.graph.facts import DIFFERENTIABLE, VAL, copy_provenance
from tedfx.graph.nodes import argument, namespace, op_name, operands, results
from tedfx.placement.factors import Dim, Factor, dim_size, leaves, settle, unify
from tedfx.placement.sizes import Size, as_size, divides, plainness, quotient

_LINEAR = (
    "aten",
    "prims",
    "tedfx",
)  # operators whose backward is the adjoint of a derivative; that of a user's own may be anything


_T = TypeVar("_T")


def regroup_barrier(x: _T) -> _T:
    """Identity between two factorisations of a dim that do not agree; its operand is whole on that dim."""
    return x


@dataclass
class Relation:
    """Which factors of a node's operands are which of its results'. Operands are counted by position in
    `operands(node)`.

    out         dims of the output
    outs        of an op with several outputs, the dims of each; None for all other ops
    whole       by position, factors that the op needs uncut
    contracted  factors that it sums over
    absorbed    factors that are gone, and whose shards the op itself puts together
    created     factors that no operand carries; kind "expand" may create them sharded
    linear      groups of positions in which the op is jointly linear
    kind        name of a special typing rule, else the general one
    complete    its gradient is not linear in the cotangents, so it needs those of all ranks: no result of
                replicated operands may be R
    constant    positions whose gradient depends on no value: the same on every rank, so they are never R
    unread      those of them whose value is read nowhere: P is as good as I
    filled      torch refuses the op where a dim of an operand is empty
    run         a dim whose entries have numbers: its shards must be runs of them, so that of its factors only
                the first may be cut
    """

    out: list[Dim] = field(default_factory=list[Dim])
    outs: list[list[Dim]] | None = None
    whole: Mapping[int, Dim] = field(default_factory=dict[int, Dim])
    contracted: Dim = ()
    absorbed: Dim = ()
    created: Dim = ()
    linear: Sequence[frozenset[int]] = ()
    kind: str = ""
    complete: bool = False
    constant: frozenset[int] = frozenset()
    unread: frozenset[int] = frozenset()
    filled: bool = False
    run: Dim = ()

    @property
    def several(self) -> bool:
        return self.outs is not None

    @property
    def results(self) -> list[list[Dim]]:
        """The dims of each output."""
        return [self.out] if self.outs is None else self.outs


Rule: TypeAlias = Callable[[fx.Node, "Annotator"], Relation]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the rule of the operators of these names (`op_name`)."""

    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, fn))
        return fn

    return register


def flat(dims: Iterable[Dim]) -> Dim:
    """The factors of several dims, in order."""
    return tuple(f for dim in dims for f in dim)


def as_list(dims: int | Iterable[int]) -> list[int]:
    """A dim or several, as operators take them."""
    return [dims] if isinstance(dims, int) else list(dims)


def dim_of(node: fx.Node, rank: int, index: int, name: str = "dim", default: int | None = None) -> int:
    """The dim that an operator is given by position or by name, counted from the left."""
    dim: int = argument(node, index, name, default)
    return dim % rank


def shape_of(node: fx.Node) -> list[Size]:
    """Global sizes of a node's value, one tensor."""
    return [as_size(s) for s in node.meta["val"].shape]


class Annotator:
    """Gives every value its dims, node by node (``passes/annotate.py`` drives it)."""

    def __init__(self, graph: fx.Graph, tensor_degree: int = 1):
        self.graph, self.tensor_degree = graph, tensor_degree
        self.symbols: dict[Size, Factor] = {}
        self.given: dict[Size, Factor] = {}  # those of the inputs, the batch first
        self.node: fx.Node | None = None
        self._replaced: dict[fx.Node, fx.Node] = {}
        self.barriers = 0
        self.notes: list[str] = []

    # dims and sizes -----------------------------------------------------------------------------------------
    def dims(self, node: fx.Node) -> list[Dim]:
        node = self._replaced.get(node, node)
        return [leaves(dim) for dim in node.meta["dims"]]

    def give(self, size: Size, factor: Factor) -> None:
        """A size of the inputs: its factor stands for every created dim of that size."""
        factor = self.symbols.setdefault(size, factor)
        self.given.setdefault(size, factor)

    def dim_of(self, size: Any, name: str = "") -> Dim:
        """The dim of a created size: a fresh factor for a number, the canonical factors for symbols (products
        of input sizes in input order)."""
        size = as_size(size)
        if isinstance(size, int):
            return () if size == 1 else (Factor(size, name),)
        if size in self.symbols:
            return (self.symbols[size],)
        rest: Size = size
        parts: list[Factor] = []
        for one, factor in self.given.items():
            if not isinstance(rest, int) and divides(one, rest):
                rest = quotient(rest, one)
                parts.append(factor)
        if isinstance(rest, int):
            return tuple(parts) + ((Factor(rest, name),) if rest != 1 else ())
        self.symbols[size] = Factor(size, name or str(size))
        return (self.symbols[size],)

    def fresh(self, dim: Sequence[Factor], name: str = "") -> Dim:
        """A new factor of the same size, unrelated to the old (the value is whole there)."""
        size = dim_size(leaves(dim))
        return () if size == 1 else (Factor(size, name),)

    # relations ----------------------------------------------------------------------------------------------
    def may_refine(self, factor: Factor, sizes: list[Size]) -> bool:
        """A factor divisible by the tensor degree is not refined into parts none of which is (4 heads over 4
        ranks stay 4 heads where the 2 kv heads x 2 are repeated: the kv side then is whole and sliced)."""
        t = self.tensor_degree
        if t == 1 or not isinstance(factor.size, int) or factor.size % t:
            return True
        return any(isinstance(s, int) and s % t == 0 for s in sizes)

    def match(self, *places: tuple[fx.Node, int]) -> Dim:
        """State that these dims of operands are one dim (size-1 dims broadcast and are left out); its
        factors.

        Where two factorisations do not agree, a barrier is put before the later operand, which then is whole
        on that dim; before all of them, where it has parts that no single factor refines into.
        """
        wide = [(n, d) for n, d in places if self.dims(n)[d] != ()]
        if not wide:
            return ()
        first = wide[0]
        for other in wide[1:]:
            settle(self._dim(first), self._dim(other))
            if not unify(self._dim(first), self._dim(other), self.may_refine):
                self.barrier(*other)
                if not unify(self._dim(first), self._dim(other), self.may_refine):
                    return self.whole(wide)
        return self._dim(first)

    def _dim(self, place: tuple[fx.Node, int]) -> Dim:
        return self.dims(place[0])[place[1]]

    def whole(self, places: list[tuple[fx.Node, int]]) -> Dim:
        """These dims as one new factor, each behind a barrier. Their sizes may be written in different ways
        (`min(256, s)` for s, a total of counts): that they are equal the op itself asks for, here and on a
        single device; the plainest one stays."""
        size = min((dim_size(self._dim(place)) for place in places), key=plainness)
        joint = Factor(size)
        for n, d in places:
            self.barrier(n, d, (joint,))
        return (joint,)

    def barrier(self, operand: fx.Node, dim: int, fresh: Dim | None = None) -> fx.Node:
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

    def annotate(self, node: fx.Node, fn: Rule) -> None:
        self.node, self._replaced = node, {}
        relation = fn(node, self)
        for old, new in self._replaced.items():
            node.replace_input_with(old, new)
        node.meta["relation"] = relation
        if relation.outs is not None:
            node.meta["dims_of"] = relation.outs
        else:
            node.meta["dims"] = relation.out


def whole_everywhere(node: fx.Node, ctx: Annotator, note: bool = True) -> Relation:
    """The rule of ops without a rule: every operand whole, every output replicated."""
    whole = {i: flat(ctx.dims(n)) for i, n in enumerate(operands(node))}
    if note:
        ctx.notes.append(f"{op_name(node)} has no rule: its operands are replicated")
    complete = namespace(node) not in ("", *_LINEAR)
    outs = [_fresh(v) if isinstance(v, torch.Tensor) else [] for v in results(node)]
    if isinstance(node.meta["val"], (tuple, list)):
        return Relation(outs=outs, whole=whole, complete=complete)
    return Relation(outs[0], whole=whole, created=flat(outs[0]), complete=complete)


def _fresh(value: torch.Tensor) -> list[Dim]:
    sizes = [as_size(s) for s in value.shape]
    return [() if s == 1 else (Factor(s),) for s in sizes]
