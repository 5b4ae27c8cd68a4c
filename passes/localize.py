"""Sizes and operators as one rank has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import fx
from torch.fx.node import map_aggregate

from tedfx import ops
from tedfx.analysis.sizes import Pieces, Share, Sizes
from tedfx.errors import TraceError, user_line
from tedfx.graph.draws import drawn, draws
from tedfx.graph.facts import DIMS, DIMS_OF, LOCAL_SHAPE, RELATION, RUNS, TYPE, TYPES_OF, VAL, copy_value
from tedfx.graph.nodes import REGROUPS, argument, arguments, op_name, operand, overload
from tedfx.ops.distributions import drawable
from tedfx.ops.random import NUMBERED, SHARE
from tedfx.passes.base import Pass, PassResult
from tedfx.placement.factors import dim_size, leaves
from tedfx.placement.plan import roots
from tedfx.placement.sizes import as_size
from tedfx.placement.types import Shard, sharding_axes
from tedfx.rules.views import piece_of, reads_bits
from tedfx.stages.graphs import LocalGraph, TypedGraph

aten = torch.ops.aten


@dataclass(frozen=True)
class Localize(Pass[TypedGraph]):
    """Rewrite what depends on sizes, from dims and types alone.

    1. Views, expands, creations, pieces: their literal and symbolic sizes become local ones.
    2. A range over a sharded dim keeps global numbers: local range plus this coordinate's offset. A mean over
       a sharded dim becomes a sum over the global count.
    3. A vocabulary that is sharded: embedding and cross-entropy in their parallel forms. A running sum along
       a sharded dim: the ranks' totals.
    4. Draws become counter-based: a hash of (seed, site, global index), so that replicas agree and shards
       differ.
    5. Any other size used as a number becomes the global one. The old size arithmetic is dead and dropped.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"collectives", "local_experts"})
    gives = LocalGraph

    def __call__(self, program: TypedGraph) -> PassResult:
        return _Localizer(program).run()


class _Localizer:
    def __init__(self, program: TypedGraph):
        self.program, self.graph = program, program.graph_module.graph
        self.sizes, self.plan, self.result = Sizes(program), program.plan, PassResult()
        self.sites = 0
        self.seed: fx.Node | None = None

    def run(self) -> PassResult:
        for node in list(self.graph.nodes):
            if node.op != "call_function" or node not in RELATION:
                continue
            before, self.sizes.current = (node.target, node.args, node.kwargs), node
            self.visit(node)
            self.numbers(node)
            self.result.matches += 1
            self.result.changes += (node.target, node.args, node.kwargs) != before
        self.graph.eliminate_dead_code()
        for node in self.graph.nodes:
            if node in DIMS and node in TYPE:
                LOCAL_SHAPE[node] = self.sizes.shape(node)
        self.result.next = self.program.then(
            LocalGraph,
            size_sources={str(s): (n.name, d) for s, (n, d) in self.sizes.sources.items()},
            uses_seed=self.seed is not None,
        )
        return self.result

    # one node -----------------------------------------------------------------------------------------------
    def visit(self, node: fx.Node) -> None:
        rewrite = REWRITES.get(op_name(node))
        if rewrite is not None:
            rewrite(self, node)
        else:
            self.draw(node)

    def draw(self, node: fx.Node) -> None:
        """TraceError for an op that draws and has no form for a rank."""
        if not draws(node):
            return
        made, value = drawn(node), VAL[node]
        if made is None or not drawable(value.dtype):
            raise TraceError(
                f"{op_name(node)} draws random numbers and has no counter-based form, so replicas would not "
                f"agree; draw element by element, without a generator ({user_line(node)})"
            )
        device = node.kwargs.get("device")
        self.drawing(node, ops.draw, (made.distribution, made.parameters), last=(value.dtype, device))

    def drawing(
        self, node: fx.Node, op: Callable, first: tuple, factors: tuple | None = None, last: tuple = ()
    ) -> None:
        """`op(*first, seed, site, factors, *last)` in place of a node. `factors`: of what is drawn; those of
        the node's dims by default."""
        factors = self.factors(node) if factors is None else factors
        if self.seed is None:
            inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
            with self.graph.inserting_after(inputs[-1]) if inputs else self.graph.inserting_before():
                self.seed = self.graph.placeholder("seed")
            VAL[self.seed] = torch.empty((), dtype=torch.int64, device="meta")
        node.target, node.args, node.kwargs = op, (*first, self.seed, self.sites, factors, *last), {}
        self.sites += 1

    def factors(self, node: fx.Node) -> tuple[tuple[tuple, ...], ...]:
        return tuple(self.parts(node, d, TYPE[node]) for d in range(len(DIMS[node])))

    def view(self, node: fx.Node) -> None:
        if reads_bits(node):
            return
        if op_name(node) not in ("aten.view", "aten._unsafe_view"):
            node.target = aten.reshape.default
        node.args, node.kwargs = (node.args[0], self.view_shape(node)), {}

    def expand(self, node: fx.Node) -> None:
        node.target, node.args, node.kwargs = aten.expand.default, (node.args[0], self.shape(node)), {}

    def create(self, node: fx.Node) -> None:
        at = 1 if op_name(node).startswith("aten.new_") else 0
        node.args = (*node.args[:at], self.shape(node), *node.args[at + 1 :])

    def embedding(self, node: fx.Node) -> None:
        table, ids = operand(node, 0), operand(node, 1)
        axes = self.contracted_axes(table, 0)
        if axes:
            padding = argument(node, 2, "padding_idx", -1)
            padding = None if padding is None or padding < 0 else padding
            node.target, node.kwargs = ops.vocab_parallel_embedding, {}
            node.args = (table, ids, axes, padding, *self.lengths(table, 0))

    def cross_entropy(self, node: fx.Node) -> None:
        logits, labels = operand(node, 0), operand(node, 1)
        axes = self.contracted_axes(logits, 1)
        if axes:
            ignore = argument(node, 4, "ignore_index", -100)
            node.target, node.kwargs = ops.vocab_parallel_cross_entropy, {}
            node.args = (logits, labels, axes, ignore, *self.lengths(logits, 1))

    def lengths(self, value: fx.Node, dim: int) -> list[tuple[int, ...]]:
        """How long the ranks' pieces of a dim are, where they are not equal; else nothing. TraceError where
        they are no runs of its entries."""
        if any(sharding_axes(TYPE[value], f) for f in leaves(DIMS[value][dim])[1:]):
            raise TraceError(
                f"a dim whose entries have numbers is cut inside of {dim_size(DIMS[value][dim][:1])} parts | "
                f"at {user_line(self.sizes.current or value)} | give the parts a dim of their own, or leave "
                "these axes out"
            )
        first, *behind = (self.sizes.factor(f, TYPE[value]) for f in leaves(DIMS[value][dim]))
        if not isinstance(first, Pieces):
            return []
        inner = prod(behind)
        return [tuple(length * inner for length in first.lengths)]

    def shape(self, node: fx.Node) -> list:
        return [self.sizes.node(s) for s in self.sizes.shape(node)]

    def view_shape(self, node: fx.Node) -> list:
        """How many rows a rank has after an exchange is data: the rest of what there is."""
        ragged = [any(f.ragged for f in leaves(dim)) for dim in DIMS[node]]
        return [-1 if rows else size for size, rows in zip(self.shape(node), ragged)]

    def contracted_axes(self, value: fx.Node, dim: int) -> tuple[str, ...]:
        """The axes that shard a dim of an operand."""
        return tuple(a for leaf in leaves(DIMS[value][dim]) for a in sharding_axes(TYPE[value], leaf))

    def arange(self, node: fx.Node) -> None:
        if not DIMS[node] or DIMS[node][0] == ():
            return
        axes = [a for leaf in leaves(DIMS[node][0]) for a in sharding_axes(TYPE[node], leaf)]
        (length,) = self.shape(node)
        form = overload(node)
        if not axes:
            return
        start = (
            0 if form == "default" else self.number(node.args[0])
        )  # global numbers, as everything that `numbers` rewrites
        step = self.number(node.args[2]) if form == "start_step" and len(node.args) > 2 else 1
        unequal = self.lengths(node, 0)
        with self.graph.inserting_before(node):
            offset = (
                self.graph.call_function(ops.share_offset, (*unequal, tuple(axes)))
                if unequal
                else self.graph.call_function(ops.axis_offset, (length, tuple(axes)))
            )
        node.target, node.args, node.kwargs = (
            aten.arange.default,
            (length,),
            {**node.kwargs, "dtype": VAL[node].dtype},
        )
        self.after(
            node,
            [(aten.add.Tensor, offset)]
            + ([(aten.mul.Tensor, step)] if step != 1 else [])
            + ([(aten.add.Tensor, start)] if start != 0 else []),
        )

    def after(self, node: fx.Node, steps: list) -> None:
        """Chain ops on a node's result; users see the last."""
        last, users = node, list(node.users)
        for target, value in steps:
            behind = value if last is node and isinstance(value, fx.Node) and value > node else last
            with self.graph.inserting_after(behind):
                new = self.graph.call_function(target, (last, value))
            copy_value(node, new)
            last = new
        for user in users:
            user.replace_input_with(node, last)

    def slice(self, node: fx.Node) -> None:
        x = operand(node, 0)
        rank = len(DIMS[x])
        narrow = op_name(node) == "aten.narrow"
        d = (argument(node, 1) if narrow else argument(node, 1, "dim", 0)) % rank
        whole, local = as_size(VAL[x].shape[d]), self.sizes.dim(DIMS[x][d], TYPE[x])
        if not any(sharding_axes(TYPE[x], f) for f in leaves(DIMS[x][d])):
            return
        length = self.sizes.dim(DIMS[node][d], TYPE[node])
        if length == local:  # all of the dim
            node.target, node.args, node.kwargs = aten.alias.default, (x,), {}
            return
        start, step = (
            (argument(node, 2), 1)
            if narrow
            else (argument(node, 2, "start") or 0, argument(node, 4, "step", 1))
        )
        if step == 1:
            start = as_size(VAL[start] if isinstance(start, fx.Node) else start)
            index = piece_of(
                start + whole if isinstance(start, int) and start < 0 else start,
                as_size(VAL[node].shape[d]),
                whole,
            )
            if index is None:
                raise TraceError(f"{node.name} is no piece of the dim that it cuts ({user_line(node)})")
            start, end = self.sizes.node(index * length), self.sizes.node((index + 1) * length)
        else:
            end = self.sizes.node(local)
        node.target, node.args, node.kwargs = aten.slice.Tensor, (x, d, start, end, step), {}

    def split(self, node: fx.Node) -> None:
        x = operand(node, 0)
        d = argument(node, 2, "dim", 0) % len(DIMS[x])
        lengths = [
            self.sizes.node(self.sizes.dim(dims[d], type_))
            for dims, type_ in zip(DIMS_OF[node], TYPES_OF[node])
        ]
        node.target, node.args, node.kwargs = aten.split_with_sizes.default, (x, lengths, d), {}

    def mean(self, node: fx.Node) -> None:
        x = operand(node, 0)
        gone = roots(RELATION[node].contracted)
        if not any(isinstance(p, Shard) and p.factor.root() in gone for p in TYPE[x].values()):
            return
        count = 1
        for factor in leaves(RELATION[node].contracted):
            count = count * self.sizes.whole(factor.size)
        dims, keep = argument(node, 1, "dim"), argument(node, 2, "keepdim", False)
        dtype = node.kwargs.get("dtype") or VAL[node].dtype
        if overload(node) == "default":
            node.target, node.args, node.kwargs = aten.sum.default, (x,), {"dtype": dtype}
        else:
            node.target, node.args, node.kwargs = aten.sum.dim_IntList, (x, dims, keep), {"dtype": dtype}
        divisor = self.sizes.node(count)
        self.after(node, [(aten.div.Tensor, divisor)])

    def cumsum(self, node: fx.Node) -> None:
        x = operand(node, 0)
        if not DIMS[x]:
            return
        dim, outer, sharded = argument(node, 1, "dim") % len(DIMS[x]), 1, []
        for leaf in leaves(DIMS[x][dim]):
            if sharding_axes(TYPE[x], leaf):
                sharded.append((sharding_axes(TYPE[x], leaf), outer))
            outer = outer * self.sizes.factor(leaf, TYPE[x])
        if len(sharded) > 1:
            raise TraceError(
                "a cumsum along a dim of which two factors are sharded has no parallel form "
                f"({user_line(node)})"
            )
        if sharded:
            ((axes, outer),) = sharded
            RUNS[node] = outer  # the size of what is exchanged: tedfx/analysis/cost.py
            node.target, node.args, node.kwargs = (
                ops.cumsum,
                (x, dim, axes, self.sizes.node(outer), node.kwargs.get("dtype")),
                {},
            )

    def groups(self, node: fx.Node) -> None:
        """Groups of tokens, one per batch coordinate: of a shard by the batch there are as many fewer, and
        the runs before it are local."""
        x, *given, groups, outer, dtype = arguments(node)
        before, local, degree, batch = 1, 1, 1, self.program.batch_factor
        for leaf in leaves(DIMS[x][given[-1]]):
            axes = sharding_axes(TYPE[x], leaf)
            if batch is not None and leaf.root() is batch.root():
                degree = self.plan.roles.mesh.size(axes)
                break
            before, local = before * leaf.size, local * self.sizes.factor(leaf, TYPE[x])
        if batch is None or before != outer or groups % degree:
            raise TraceError(
                "capacity='local': tokens are numbered with the batch behind another dim; put the "
                f"batch first ({user_line(node)})"
            )
        node.args = (x, *given, groups // degree, self.sizes.node(local), dtype)

    def dropout(self, node: fx.Node) -> None:
        x, p = operand(node, 0), argument(node, 1, "p")
        if not argument(node, 2, "train") or p == 0:
            node.target, node.args, node.kwargs = aten.alias.default, (x,), {}
            return
        self.drawing(node, ops.dropout, (x, p))

    def multinomial(self, node: fx.Node) -> None:
        """Without replacement all choices of a row are made of one draw for each of its entries."""
        weights, replacement = operand(node, 0), argument(node, 2, "replacement", False)
        count = argument(node, 1, "num_samples")
        if node.kwargs.get("generator") is not None or not isinstance(count, int):
            return self.draw(node)
        rows, entries = self.factors(node), self.parts(weights, -1, TYPE[weights])
        drawn = (*(rows if replacement else rows[:-1]), entries)
        self.drawing(node, ops.multinomial, (weights, count, replacement), drawn)

    def parts(self, node: fx.Node, d: int, type_) -> tuple[tuple, ...]:
        return tuple(part for f in leaves(DIMS[node][d]) for part in self.place(node, f, type_))

    def place(self, x: fx.Node, factor, type_) -> list[tuple]:
        """Where this rank's part of a factor lies in the whole, as `tedfx/ops/random.py` wants it."""
        axes, size = sharding_axes(type_, factor), self.sizes.factor(factor, type_)
        if factor.root() in self.program.row_numbers:
            numbers, origin, tokens, top_k = self.program.row_numbers[factor.root()]
            if not origin.args[2]:
                origin.args = (*origin.args[:2], self.parts(tokens, 0, TYPE[tokens]))
            return [(numbers, origin.args[2], top_k, NUMBERED)]
        if factor.ragged:
            raise TraceError(
                f"a draw for rows whose number is data has no counter-based form | at {user_line(x)} | "
                "draw for the values that the rows are made of"
            )
        if isinstance(size, Share):  # a piece of what the inputs' own split left
            outer = tuple(a for a in axes if a not in size.axes)
            return [(1, outer)] * bool(outer) + [
                (self.sizes.node(size), size.axes, self.sizes.node(size.args[0]), SHARE)
            ]
        if isinstance(size, Pieces):
            return [(self.sizes.node(size), size.axes, size.lengths, SHARE)]
        return [(self.sizes.node(size), axes)]

    # sizes as numbers ---------------------------------------------------------------------------------------
    def numbers(self, node: fx.Node) -> None:
        node.args = map_aggregate(node.args, self.number)
        node.kwargs = map_aggregate(node.kwargs, self.number)

    def number(self, arg):
        """The global value of a size used as a number; anything else as it is."""
        if isinstance(arg, fx.Node) and isinstance(VAL.get(arg), (torch.SymInt, torch.SymFloat)):
            expr = VAL[arg].node.expr
            if isinstance(VAL[arg], torch.SymFloat):
                return self.float_of(arg)
            return self.sizes.node(self.sizes.whole(expr))
        return arg

    def float_of(self, arg: fx.Node):
        """A float made from sizes: only ``sym_float(size)`` and arithmetic on it."""
        if arg.target is torch.sym_float:
            inner = arg.args[0]
            value = (
                self.sizes.node(self.sizes.whole(VAL[inner].node.expr))
                if isinstance(inner, fx.Node)
                else inner
            )
        elif arg.op == "call_function":
            parts = [
                self.float_of(a)
                if isinstance(a, fx.Node) and isinstance(VAL[a], torch.SymFloat)
                else self.sizes.node(self.sizes.whole(VAL[a].node.expr))
                if isinstance(a, fx.Node)
                else a
                for a in arg.args
            ]
            return self.sizes._call(arg.target, *parts)
        else:
            raise TraceError(f"a number of the form {arg} cannot be written for one rank")
        return value if not isinstance(value, fx.Node) else self.sizes._call(torch.sym_float, value)


# How an op is rewritten for a rank, by its name; the others are the same on shards.
REWRITES: dict[str, Callable[[_Localizer, fx.Node], None]] = {
    **dict.fromkeys(
        (*(f"aten.{name}" for name in REGROUPS), "aten._reshape_copy"),
        _Localizer.view,
    ),
    **dict.fromkeys(("aten.expand", "aten.broadcast_to"), _Localizer.expand),
    **dict.fromkeys(
        (f"aten.{new}{what}" for new in ("", "new_") for what in ("zeros", "ones", "full", "empty")),
        _Localizer.create,
    ),
    "aten.arange": _Localizer.arange,
    **dict.fromkeys(("aten.slice", "aten.narrow"), _Localizer.slice),
    **dict.fromkeys(("aten.split", "aten.split_with_sizes", "aten.tensor_split"), _Localizer.split),
    "aten.mean": _Localizer.mean,
    "aten.embedding": _Localizer.embedding,
    "aten.cross_entropy_loss": _Localizer.cross_entropy,
    "aten.cumsum": _Localizer.cumsum,
    **dict.fromkeys(("group_cumsum", "group_total"), _Localizer.groups),
    "aten.dropout": _Localizer.dropout,
    "aten.multinomial": _Localizer.multinomial,
}
