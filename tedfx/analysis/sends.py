"""What each operator of a local graph sends, forward and backward: its own collective and its adjoint's (the
table in docs/design.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from tedfx import ops
from tedfx.analysis.communication import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    GATHER_PARAMETERS,
    SCATTER_GRADIENTS,
    Communication,
    Size,
)
from tedfx.analysis.local_names import LocalSizes
from tedfx.graph.facts import DIMS, IN_GRAPH, LOCAL_SHAPE, RUNS, VAL
from tedfx.graph.nodes import arguments, function, operand
from tedfx.ops.cuts import Cut
from tedfx.ops.properties import argument, properties
from tedfx.placement.factors import leaves
from tedfx.placement.roles import MeshShape


@dataclass(frozen=True)
class Counting:
    """What a count needs to know beside the node: the mesh, and a rank's sizes by name."""

    mesh: MeshShape
    sizes: LocalSizes

    def make(
        self,
        node: fx.Node,
        op: str,
        axes,
        phase: str,
        elements: Size,
        dtype: torch.dtype,
        ragged: bool = False,
    ) -> list[Communication]:
        """A collective over those of `axes` that have more than one rank; none where none has."""
        axes = self.mesh.wide(axes)
        if not axes:
            return []
        return [Communication(node.name, op, axes, self.mesh.size(axes), phase, elements, dtype, ragged)]


def _dtype(node: fx.Node) -> torch.dtype:
    """Of a node, or of the value that it moves."""
    while not isinstance(VAL.get(node), torch.Tensor):
        node = operand(node, 0)
    return VAL[node].dtype


def _ragged(node: fx.Node) -> bool:
    return any(f.ragged for dim in DIMS.get(node) or () for f in leaves(dim))


def _cross_entropy(node: fx.Node, counting: Counting, reached: bool) -> list[Communication]:
    """A maximum per row, then the sum of exponentials and the label's logit, packed; at least in float32."""
    logits = operand(node, 0)
    rows, dtype = counting.sizes(LOCAL_SHAPE[logits][0]), _dtype(logits)
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    axes = argument(node, "axes")
    return counting.make(node, ALL_REDUCE, axes, "forward", rows, wide) + counting.make(
        node, ALL_REDUCE, axes, "forward", 2 * rows, wide
    )


def _exchange_counts(node: fx.Node, counting: Counting, reached: bool) -> list[Communication]:
    counts = operand(node, 0)
    if LOCAL_SHAPE.get(counts) is not None:
        experts = counting.sizes.elements(counts)
    else:  # an item of route(ids, num_experts, ..)
        experts = arguments(operand(counts, 0))[1]
    return counting.make(node, ALL_GATHER, argument(node, "axes"), "forward", experts, torch.int64)


def _all_to_all(node: fx.Node, counting: Counting, reached: bool) -> list[Communication]:
    axes, made = argument(node, "axes"), []
    for phase in ("forward", "backward") if reached else ("forward",):
        made += counting.make(
            node, ALL_TO_ALL, axes, phase, counting.sizes.elements(node), _dtype(operand(node, 0)), True
        )
    return made


def _cumsum(node: fx.Node, counting: Counting, reached: bool) -> list[Communication]:
    """The totals of this rank's runs."""
    x, dim, axes = arguments(node)[:3]
    made = []
    for phase in ("forward", "backward") if reached else ("forward",):
        made += counting.make(
            node,
            ALL_GATHER,
            axes,
            phase,
            _totals(counting, x, dim, counting.sizes(RUNS[node])),
            _dtype(node),
        )
    return made


def _cumsum_batched(node: fx.Node, counting: Counting, reached: bool) -> list[Communication]:
    values, axes, dims, outers, dtype = arguments(node)
    return counting.make(
        node,
        ALL_GATHER,
        axes,
        "forward",
        sum(_totals(counting, *each) for each in zip(values, dims, outers)),
        dtype,
    )


def _totals(counting, x, dim, runs):
    shape = [counting.sizes(size) for size in LOCAL_SHAPE[x]]
    return prod(shape[:dim]) * runs * prod(shape[dim + 1 :])


def _all_reduce_batched(node: fx.Node, counting: Counting, reached: bool) -> list[Communication]:
    values, axes = arguments(node)
    return counting.make(
        node, ALL_REDUCE, axes, "forward", sum(counting.sizes.elements(v) for v in values), _dtype(values[0])
    )


def _gather_parameters(node: fx.Node, counting: Counting, reached: bool) -> list[Communication]:
    """The row of this rank's shares; in a compiled graph its adjoint scatters rows of all ranks."""
    rows, axes, cuts, _, summed_in = arguments(node)
    row, dtype = sum(Cut(*cut).at(lambda axes: 0).width for cut in cuts), _dtype(rows[0])
    made = counting.make(node, GATHER_PARAMETERS, axes, "forward", row, dtype)
    if reached and IN_GRAPH[node]:
        made += counting.make(
            node,
            SCATTER_GRADIENTS,
            axes,
            "backward",
            row * counting.mesh.size(axes),
            summed_in or dtype,
        )
    return made


# Ops whose amount is that of no operand (`Moves.operand` is "other").
OTHER: dict[Callable, Callable[[fx.Node, Counting, bool], list[Communication]]] = {
    ops.all_reduce_batched: _all_reduce_batched,
    ops.vocab_parallel_cross_entropy: _cross_entropy,
    ops.exchange_counts: _exchange_counts,
    ops.exchange_lanes: _exchange_counts,
    ops.all_to_all_single: _all_to_all,
    ops.gather_parameters: _gather_parameters,
    ops.cumsum: _cumsum,
    ops.cumsum_batched: _cumsum_batched,
}


def sent(node: fx.Node, counting: Counting, reached: bool) -> list[Communication]:
    """The collectives of a node in forward and, where a cotangent arrives (`reached`), in backward: what its
    op says that it moves (`tedfx/ops/properties.py`)."""
    what, made = properties(node.target) if node.op == "call_function" else None, []
    if what is None:
        return made
    other = OTHER.get(function(node))
    if other is not None:
        return other(node, counting, reached)
    for phase, moves in (("forward", what.forward), ("backward", what.backward if reached else None)):
        if moves is not None and all(argument(node, name) in values for name, values in moves.when.items()):
            value = node if moves.operand == "out" else operand(node, 0)
            made += counting.make(
                node,
                moves.collective,
                argument(node, "axes"),
                phase,
                counting.sizes.elements(value),
                _dtype(value),
                _ragged(value),
            )
    return made
