"""Pending conversions become collectives and local slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from tedfx import ops
from tedfx.analysis.sizes import Pieces, Share, Sizes
from tedfx.errors import CaptureError, ConfigError, TypeCheckError, user_line
from tedfx.graph.facts import CONVERSION, DIMS, LOWERED, TYPE, take_over
from tedfx.graph.nodes import op_name, operand
from tedfx.passes.base import Pass, PassResult
from tedfx.passes.place import convert
from tedfx.placement.factors import leaves
from tedfx.placement.types import I, P, R, Shard, find_dim
from tedfx.rules.base import regroup_barrier
from tedfx.stages.graphs import TypedGraph


@dataclass(frozen=True)
class LowerCollectives(Pass[TypedGraph]):
    """Each `convert` becomes the op of `tedfx/ops/convert.py` for its (source, target), by the table in
    docs/design.md.

    1. Barriers between factorisations vanish: their operand is whole.
    2. A conversion of one axis directly on top of the same conversion of another, with no other user, is one
       op over both axes.
    3. A dropout of a partial sum that is then scattered draws after that instead: on this rank's slice, so
       that its mask is the slice's too.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"collectives"})

    def __call__(self, program: TypedGraph) -> PassResult:
        graph, result, sizes = program.graph_module.graph, PassResult(), Sizes(program)
        order = program.roles.mesh.names
        for node in list(graph.nodes):
            if node.target is regroup_barrier:
                node.replace_all_uses_with(operand(node, 0))
                graph.erase_node(node)
            elif node.target is convert:
                result.matches += 1
                sizes.current = node
                (axis,), source, target = CONVERSION[node]
                if source == P and isinstance(target, Shard):
                    node = self._before_dropout(node)
                fn, axes, extra = self._op(node, axis, source, target, sizes)
                below = operand(node, 0)
                if LOWERED.get(below, (None,))[:2] == (fn, extra) and len(below.users) == 1:
                    axes = tuple(a for a in order if a in axes + LOWERED[below][2])
                    value = operand(below, 0)
                else:
                    below, value = None, below
                with graph.inserting_before(node):
                    new = graph.call_function(fn, (value, axes, *extra))
                take_over(node, new)
                LOWERED[new] = (fn, extra, axes)
                CONVERSION[new] = (axes, source, target)
                node.replace_all_uses_with(new)
                graph.erase_node(node)
                if below is not None:
                    graph.erase_node(below)
                result.changes += 1
        self._check_order(graph, order)
        return result

    @staticmethod
    def _before_dropout(node: fx.Node) -> fx.Node:
        """scatter(dropout(x)) -> dropout(scatter(x)), where nobody else sees the dropout, which stays where
        it stood. The scatter."""
        dropout, type_ = operand(node, 0), TYPE[node]
        if (
            op_name(dropout) != "aten.dropout"
            or len(dropout.users) > 1
            or TYPE[operand(dropout, 0)] != TYPE[dropout]
        ):
            return node
        node.replace_all_uses_with(dropout)
        node.replace_input_with(dropout, operand(dropout, 0))
        dropout.replace_input_with(operand(dropout, 0), node)
        dropout.prepend(node)
        TYPE[dropout] = dict(type_)
        return node

    @staticmethod
    def _check_order(graph: fx.Graph, order) -> None:
        """A factor over two axes lies major-first: gathering the major axis while the minor one stays sharded
        would interleave the pieces."""
        for node in graph.nodes:
            if node.target is ops.all_gather:
                axes, source, _ = CONVERSION[node]
                left = [
                    a
                    for a, p in TYPE[node].items()
                    if p == source and order.index(a) > min(order.index(x) for x in axes)
                ]
                if left:
                    raise TypeCheckError(
                        f"{node.name} gathers {axes} of a factor that stays sharded on the minor axis "
                        f"{left[0]}; gather minor axes first ({user_line(node)})"
                    )

    @staticmethod
    def _op(node: fx.Node, axis: str, source, target, sizes: Sizes):
        axes = (axis,)
        if (source, target) == (P, I):
            return ops.all_reduce, axes, ()
        if (source, target) == (I, R):
            return ops.sum_gradient, axes, ()
        if target == P:
            return ops.partial, axes, (str(source),)
        factor = (source if isinstance(source, Shard) else target).factor
        if factor.root().ragged:  # each rank has another number of rows, which no collective here knows
            reader = op_name(next(iter(node.users), node))
            raise CaptureError(
                f"{reader} would need the rows of all experts on every rank | at {user_line(node)} | "
                "use operators that work on each row by itself between dispatch and combine"
            )
        found = find_dim(DIMS[node], factor)
        if found is None:
            raise TypeCheckError(
                f"{node.name} has no dim with {factor}, which it converts ({user_line(node)})"
            )
        dim, place = found
        outer, inner = (
            sizes.dim(part, TYPE[node])
            for part in (leaves(DIMS[node][dim])[:place], leaves(DIMS[node][dim])[place + 1 :])
        )
        at, split = (
            (dim, sizes.node(outer)),
            TYPE[operand(node, 0) if isinstance(source, Shard) else node],
        )
        local = sizes.factor(factor, split)
        if isinstance(local, Pieces):
            return LowerCollectives._pieces(node, axes, source, target, at, sizes.node(inner), local)
        behind = (
            (sizes.node(inner),) if isinstance(local, Share) and inner != 1 else ()
        )  # a share need not be an equal piece
        if isinstance(source, Shard):
            whole = sizes.factor(factor, TYPE[node])
            return (
                ops.all_gather,
                axes,
                (*at, str(target), sizes.node(whole), *behind)
                if isinstance(local, Share)
                else (*at, str(target)),
            )
        if source == P:
            return ops.reduce_scatter, axes, (*at, *behind)
        return ops.shard, axes, (*at, str(source), *behind)

    @staticmethod
    def _pieces(node: fx.Node, axes, source, target, at, inner, local: Pieces):
        """A factor of parameters that the ranks do not divide."""
        if local.axes != axes:
            raise ConfigError(
                f"a dim of {sum(local.lengths)} is cut over {local.axes}, which do not divide it, and is "
                f"needed whole over {axes[0]!r} alone | at {user_line(node)} | give these axes another role"
            )
        if isinstance(source, Shard):
            return ops.all_gather, axes, (*at, str(target), local.lengths, inner)
        if source == P:
            return ops.reduce_scatter, axes, (*at, inner, local.lengths)
        return ops.shard, axes, (*at, str(source), inner, local.lengths)
