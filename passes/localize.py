"""Sizes and operators as one rank has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from tedfx.passes.base import Pass, PassResult
from torch import fx

from tedfx import ops
from tedfx.analysis.sizes import Share, Sizes
from tedfx.errors import TraceError, user_line
from tedfx.ops.random import NUMBERED, SHARE
from tedfx.placement.factors import as_size, leaves
from tedfx.placement.plan import roots
from tedfx.placement.types import Shard, sharding_axes
from tedfx.rules import op_name
from tedfx.rules.base import argument
from tedfx.rules.views import piece_of, reads_bits
from tedfx.stages.graphs import LocalGraph, TypedGraph

aten = torch.ops.aten
VIEWS = {
    "aten.view",
    "aten.reshape",
    "aten._unsafe_view",
    "aten.flatten",
    "aten.unflatten",
    "aten.squeeze",
    "aten._reshape_copy",
}
SIZED = {
    "aten.zeros",
    "aten.ones",
    "aten.full",
    "aten.empty",
    "aten.new_zeros",
    "aten.new_ones",
    "aten.new_full",
    "aten.new_empty",
}


@dataclass(frozen=True)
class Localize(Pass[TypedGraph]):
    """Rewrite what depends on sizes, from dims and types alone.

    1. Views, expands, creations, pieces: their literal and symbolic sizes become local ones.
    2. A range over a sharded dim keeps global numbers: local range plus this coordinate's offset. A mean over
       a sharded dim becomes a sum over the global count.
    3. A vocabulary that is sharded: embedding and cross-entropy in their parallel forms. A running sum along
       a sharded dim: the ranks' totals.
    4. Draws (dropout) become counter-based: a hash of (seed, site, global index), so that replicas agree and
       shards differ.
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
            if node.op != "call_function" or "relation" not in node.meta:
                continue
            before, self.sizes.current = (node.target, node.args, node.kwargs), node
            self.visit(node)
            self.numbers(node)
            self.result.matches += 1
            self.result.changes += (node.target, node.args, node.kwargs) != before
        self.graph.eliminate_dead_code()
        for node in self.graph.nodes:
            if "dims" in node.meta and "type" in node.meta:
                node.meta["local_shape"] = self.sizes.shape(node)
        self.result.next = self.program.then(
            LocalGraph,
            size_sources={str(s): (n.name, d) for s, (n, d) in self.sizes.sources.items()},
            uses_seed=self.seed is not None,
        )
        return self.result

    # one node -----------------------------------------------------------------------------------------------
    def visit(self, node: fx.Node) -> None:
        name = op_name(node)
        if name in VIEWS and not reads_bits(node):
            if name not in ("aten.view", "aten._unsafe_view"):
                node.target = aten.reshape.default
            node.args, node.kwargs = (node.args[0], self.view_shape(node)), {}
        elif name in ("aten.expand", "aten.broadcast_to"):
            node.target, node.args, node.kwargs = aten.expand.default, (node.args[0], self.shape(node)), {}
        elif name in SIZED:
            at = 1 if name.startswith("aten.new_") else 0
            node.args = (*node.args[:at], self.shape(node), *node.args[at + 1 :])
        elif name == "aten.arange":
            self.arange(node)
        elif name in ("aten.slice", "aten.narrow"):
            self.slice(node)
        elif name in ("aten.split", "aten.split_with_sizes", "aten.tensor_split"):
            self.split(node)
        elif name == "aten.mean":
            self.mean(node)
        elif name == "aten.embedding":
            axes = self.contracted_axes(node, node.args[0], 0)
            if axes:
                padding = argument(node, 2, "padding_idx", -1)
                node.target, node.kwargs = ops.vocab_parallel_embedding, {}
                node.args = (
                    node.args[0],
                    node.args[1],
                    axes,
                    None if padding is None or padding < 0 else padding,
                )
        elif name == "aten.cross_entropy_loss":
            axes = self.contracted_axes(node, node.args[0], 1)
            if axes:
                node.target, node.kwargs, ignore = (
                    ops.vocab_parallel_cross_entropy,
                    {},
                    argument(node, 4, "ignore_index", -100),
                )
                node.args = (node.args[0], node.args[1], axes, ignore)
        elif name == "aten.cumsum":
            self.cumsum(node)
        elif name in ("group_cumsum", "group_total"):
            self.groups(node)
        elif name == "aten.dropout":
            self.dropout(node)
        elif (
            isinstance(node.target, torch._ops.OpOverload)
            and torch.Tag.nondeterministic_seeded in node.target.tags
            and name != "aten.scaled_dot_product_attention"
        ):
            raise TraceError(
                f"{name} draws random numbers and has no counter-based form, so replicas would not "
                "agree; remove it or use dropout "
                f"({user_line(node)})"
            )

    def shape(self, node: fx.Node) -> list:
        return [self.sizes.node(s) for s in self.sizes.shape(node)]

    def view_shape(self, node: fx.Node) -> list:
        """How many rows a rank has after an exchange is data: the rest of what there is."""
        ragged = [any(f.ragged for f in leaves(dim)) for dim in node.meta["dims"]]
        return [-1 if rows else size for size, rows in zip(self.shape(node), ragged)]

    def contracted_axes(self, node: fx.Node, operand: fx.Node, dim: int) -> tuple[str, ...]:
        found: list[str] = []
        for leaf in leaves(operand.meta["dims"][dim]):
            found += sharding_axes(operand.meta["type"], leaf)
        return tuple(found)

    def arange(self, node: fx.Node) -> None:
        if not node.meta["dims"] or node.meta["dims"][0] == ():
            return
        axes = [a for leaf in leaves(node.meta["dims"][0]) for a in sharding_axes(node.meta["type"], leaf)]
        (length,) = self.shape(node)
        overload = node.target._overloadname
        if not axes:
            return
        start = (
            0 if overload == "default" else self.number(node.args[0])
        )  # global numbers, as everything that `numbers` rewrites
        step = self.number(node.args[2]) if overload == "start_step" and len(node.args) > 2 else 1
        with self.graph.inserting_before(node):
            offset = self.graph.call_function(ops.axis_offset, (length, tuple(axes)))
        node.target, node.args, node.kwargs = (
            aten.arange.default,
            (length,),
            {**node.kwargs, "dtype": node.meta["val"].dtype},
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
        for target, operand in steps:
            with self.graph.inserting_after(
                last
                if last is not node
                else (operand if isinstance(operand, fx.Node) and operand > node else node)
            ):
                new = self.graph.call_function(target, (last, operand))
            new.meta.update({k: v for k, v in node.meta.items() if k != "relation"})
            last = new
        for user in users:
            user.replace_input_with(node, last)

    def slice(self, node: fx.Node) -> None:
        x = node.args[0]
        rank = len(x.meta["dims"])
        narrow = op_name(node) == "aten.narrow"
        d = (node.args[1] if narrow else argument(node, 1, "dim", 0)) % rank
        whole, local = as_size(x.meta["val"].shape[d]), self.sizes.dim(x.meta["dims"][d], x.meta["type"])
        if not any(sharding_axes(x.meta["type"], f) for f in leaves(x.meta["dims"][d])):
            return
        length = self.sizes.dim(node.meta["dims"][d], node.meta["type"])
        if length == local:  # all of the dim
            node.target, node.args, node.kwargs = aten.alias.default, (x,), {}
            return
        start, step = (
            (node.args[2], 1) if narrow else (argument(node, 2, "start") or 0, argument(node, 4, "step", 1))
        )
        if step == 1:
            start = as_size(start.meta["val"] if isinstance(start, fx.Node) else start)
            index = piece_of(
                start + whole if isinstance(start, int) and start < 0 else start,
                as_size(node.meta["val"].shape[d]),
                whole,
            )
            start, end = self.sizes.node(index * length), self.sizes.node((index + 1) * length)
        else:
            end = self.sizes.node(local)
        node.target, node.args, node.kwargs = aten.slice.Tensor, (x, d, start, end, step), {}

    def split(self, node: fx.Node) -> None:
        x = node.args[0]
        d = argument(node, 2, "dim", 0) % len(x.meta["dims"])
        lengths = [
            self.sizes.node(self.sizes.dim(dims[d], type_))
            for dims, type_ in zip(node.meta["dims_of"], node.meta["types_of"])
        ]
        node.target, node.args, node.kwargs = aten.split_with_sizes.default, (x, lengths, d), {}

    def mean(self, node: fx.Node) -> None:
        x = node.args[0]
        gone = roots(node.meta["relation"].contracted)
        if not any(isinstance(p, Shard) and p.factor.root() in gone for p in x.meta["type"].values()):
            return
        count = 1
        for factor in leaves(node.meta["relation"].contracted):
            count = count * self.sizes.whole(factor.size)
        dims, keep = argument(node, 1, "dim"), argument(node, 2, "keepdim", False)
        dtype = node.kwargs.get("dtype") or node.meta["val"].dtype
        if node.target._overloadname == "default":
            node.target, node.args, node.kwargs = aten.sum.default, (x,), {"dtype": dtype}
        else:
            node.target, node.args, node.kwargs = aten.sum.dim_IntList, (x, dims, keep), {"dtype": dtype}
        divisor = self.sizes.node(count)
        self.after(node, [(aten.div.Tensor, divisor)])

    def cumsum(self, node: fx.Node) -> None:
        x = node.args[0]
        if not x.meta["dims"]:
            return
        dim, outer, sharded = argument(node, 1, "dim") % len(x.meta["dims"]), 1, []
        for leaf in leaves(x.meta["dims"][dim]):
            if sharding_axes(x.meta["type"], leaf):
                sharded.append((sharding_axes(x.meta["type"], leaf), outer))
            outer = outer * self.sizes.factor(leaf, x.meta["type"])
        if len(sharded) > 1:
            raise TraceError(
                "a cumsum along a dim of which two factors are sharded has no parallel form "
                f"({user_line(node)})"
            )
        if sharded:
            ((axes, outer),) = sharded
            node.meta["runs"] = outer  # the size of what is exchanged: tedfx/analysis/cost.py
            node.target, node.args, node.kwargs = (
                ops.cumsum,
                (x, dim, axes, self.sizes.node(outer), node.kwargs.get("dtype")),
                {},
            )

    def groups(self, node: fx.Node) -> None:
        """Groups of tokens, one per batch coordinate: of a shard by the batch there are as many fewer, and
        the runs before it are local."""
        x, *given, groups, outer, dtype = node.args
        before, local, degree, batch = 1, 1, 1, self.program.batch_factor.root()
        for leaf in leaves(x.meta["dims"][given[-1]]):
            axes = sharding_axes(x.meta["type"], leaf)
            if leaf.root() is batch:
                degree = self.plan.roles.mesh.size(axes)
                break
            before, local = before * leaf.size, local * self.sizes.factor(leaf, x.meta["type"])
        if before != outer or groups % degree:
            raise TraceError(
                "capacity='local': tokens are numbered with the batch behind another dim; put the "
                f"batch first ({user_line(node)})"
            )
        node.args = (x, *given, groups // degree, self.sizes.node(local), dtype)

    def dropout(self, node: fx.Node) -> None:
        x, p = node.args[0], argument(node, 1, "p")
        if not argument(node, 2, "train") or p == 0:
            node.target, node.args, node.kwargs = aten.alias.default, (x,), {}
            return
        factors = [self.parts(node, d, node.meta["type"]) for d in range(len(node.meta["dims"]))]
        if self.seed is None:
            placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
            with self.graph.inserting_after(placeholders[-1]):
                self.seed = self.graph.placeholder("seed")
            self.seed.meta["val"] = torch.empty((), dtype=torch.int64, device="meta")
        node.target, node.kwargs, node.args = ops.dropout, {}, (x, p, self.seed, self.sites, tuple(factors))
        self.sites += 1

    def parts(self, node: fx.Node, d: int, type_) -> tuple[tuple, ...]:
        return tuple(part for f in leaves(node.meta["dims"][d]) for part in self.place(node, f, type_))

    def place(self, x: fx.Node, factor, type_) -> list[tuple]:
        """Where this rank's part of a factor lies in the whole, as `tedfx/ops/random.py` wants it."""
        axes, size = sharding_axes(type_, factor), self.sizes.factor(factor, type_)
        if factor.root() in self.program.row_numbers:
            numbers, origin, tokens, top_k = self.program.row_numbers[factor.root()]
            if not origin.args[2]:
                origin.args = (*origin.args[:2], self.parts(tokens, 0, tokens.meta["type"]))
            return [(numbers, origin.args[2], top_k, NUMBERED)]
        if factor.ragged:
            raise TraceError(
                f"dropout of rows whose number is data has no counter-based form | at {user_line(x)} | "
                "drop out the values that the rows are made of"
            )
        if isinstance(size, Share):  # a piece of what the inputs' own split left
            outer = tuple(a for a in axes if a not in size.axes)
            return [(1, outer)] * bool(outer) + [
                (self.sizes.node(size), size.axes, self.sizes.node(size.args[0]), SHARE)
            ]
        return [(self.sizes.node(size), axes)]

    # sizes as numbers ---------------------------------------------------------------------------------------
    def numbers(self, node: fx.Node) -> None:
        node.args = fx.node.map_aggregate(node.args, self.number)
        node.kwargs = fx.node.map_aggregate(node.kwargs, self.number)

    def number(self, arg):
        """The global value of a size used as a number; anything else as it is."""
        if isinstance(arg, fx.Node) and isinstance(arg.meta.get("val"), (torch.SymInt, torch.SymFloat)):
            expr = arg.meta["val"].node.expr
            if isinstance(arg.meta["val"], torch.SymFloat):
                return self.float_of(arg)
            return self.sizes.node(self.sizes.whole(expr))
        return arg

    def float_of(self, arg: fx.Node):
        """A float made from sizes: only ``sym_float(size)`` and arithmetic on it."""
        if arg.target is torch.sym_float:
            inner = arg.args[0]
            value = (
                self.sizes.node(self.sizes.whole(inner.meta["val"].node.expr))
                if isinstance(inner, fx.Node)
                else inner
            )
        elif arg.op == "call_function":
            parts = [
                self.float_of(a)
                if isinstance(a, fx.Node) and isinstance(a.meta["val"], torch.SymFloat)
                else self.sizes.node(self.sizes.whole(a.meta["val"].node.expr))
                if isinstance(a, fx.Node)
                else a
                for a in arg.args
            ]
            return self.sizes._call(arg.target, *parts)
        else:
            raise TraceError(f"a number of the form {arg} cannot be written for one rank")
        return value if not isinstance(value, fx.Node) else self.sizes._call(torch.sym_float, value)
