"""Factors for every value of the global graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tedfx.dtypes import has_gradient
from tedfx.errors import user_line
from tedfx.graph.draws import drawn
from tedfx.graph.facts import DIFFERENTIABLE, DIMS, RELATION, VAL
from tedfx.graph.nodes import argument, is_tensor, operands
from tedfx.passes.base import Pass, PassResult
from tedfx.placement.factors import Factor
from tedfx.placement.plan import Plan
from tedfx.placement.sizes import as_size
from tedfx.rules import Annotator, Relation, rule_for
from tedfx.stages.graphs import GlobalGraph, PlannedGraph

_CUTS_GRADIENT = ("detach",)


@dataclass(frozen=True)
class Annotate(Pass[GlobalGraph]):
    """Walk the graph once; each op's rule relates the factors of its operands to those of its outputs.

    1. Inputs: each size symbol is one factor, each static size a fresh one. The dims that the trace marks as
       batch carry the batch factor.
    2. Parameters, buffers, constants: a fresh factor per dim; uses refine and unify them.
    3. Ops: `Annotator.annotate` with the op's rule; where factorisations do not agree a `regroup_barrier` is
       inserted.
    4. Outputs: dim 0 of the batch's size carries the batch factor.
    5. `differentiable`: a float or complex value with a differentiable operand, down from the parameters that
       require gradients.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"functional", "row_losses"})
    provides: ClassVar[frozenset[str]] = frozenset({"factors"})
    gives = PlannedGraph

    def __call__(self, program: GlobalGraph) -> PassResult:
        graph, trace = program.graph_module.graph, program.trace
        tensor = program.roles.mesh.size(program.roles.tensor)
        ctx = Annotator(graph, tensor)
        result = PassResult()
        learned = set(program.trainable)
        states = set(trace.parameters) | set(trace.buffers) | set(trace.constants)
        batch: Factor | None = None
        pieces: dict[Factor, str] = {}
        for node in graph.nodes:  # input symbols first, so that batch comes before sequence
            if node.op == "placeholder" and node.name not in states and is_tensor(node):
                for d, size in enumerate(VAL[node].shape):
                    size = as_size(size)
                    if d == 0 and program.is_batch_input(node):
                        batch = batch or Factor(size, "B")
                        if not isinstance(size, int):
                            ctx.give(size, batch)
                    elif not isinstance(size, int):
                        ctx.give(size, Factor(size, str(size)))
        for node in list(graph.nodes):
            if node.op == "placeholder":
                DIFFERENTIABLE[node] = node.name in learned
                if is_tensor(node):
                    state, dims = node.name in states, []
                    for d, size in enumerate(VAL[node].shape):
                        if d == 0 and not state and program.is_batch_input(node):
                            dims.append((batch,))
                        else:
                            dims.append(ctx.dim_of(size, node.name if state else ""))
                    DIMS[node] = dims
                    RELATION[node] = Relation(out=dims)
            elif node.op == "call_function" and self._has_tensor(node):
                result.matches += 1
                DIFFERENTIABLE[node] = self._differentiable(node)
                ctx.annotate(node, rule_for(node))
                self._pieces(pieces, node, ctx)
            elif node.op == "output":
                self._rows(node, ctx, batch, len(trace.mutated_buffers))
            elif node.op != "call_function":
                raise AssertionError(f"unexpected node {node.op} {node.target}")
        # of a size that the model's pairs refined, the part that a shard cuts
        extent = trace.extents.get("sequence")
        sequence = None if extent is None else ctx.symbols.get(extent)
        result.next = program.then(
            PlannedGraph,
            plan=Plan(program.roles, hints=program.hints()),
            batch_factor=batch and batch.leaves()[0],
            sequence_factor=sequence and sequence.leaves()[0],
            pieces=pieces,
        )
        result.changes, result.notes = ctx.barriers, ctx.notes
        return result

    @staticmethod
    def _pieces(pieces: dict[Factor, str], node: fx.Node, ctx: Annotator) -> None:
        """An op that takes neighbours of an input's dim together: its line, for who calls with a number of
        rows that does not fit."""
        for factor in ctx.given.values():
            if len(factor.leaves()) > 1 and factor.leaves()[0] not in pieces:
                pieces[factor.leaves()[0]] = user_line(node)

    @staticmethod
    def _rows(output: fx.Node, ctx: Annotator, batch: Factor | None, written: int) -> None:
        """A returned tensor whose dim 0 is as long as the batch is the batch's rows, also where an op without
        a rule lost the factor."""
        given = list(argument(output, 0))
        for i, value in enumerate(given):
            if batch is None or i < written or not is_tensor(value) or not VAL[value].dim():
                continue
            rows = ctx.dim_of(VAL[value].shape[0])
            if any(f.root() is batch.root() for f in rows) and not any(
                f.root() is batch.root() for dim in ctx.dims(value) for f in dim
            ):
                ctx.node, ctx._replaced = output, {}
                given[i] = ctx.barrier(value, 0, rows)
        output.args = (tuple(given),)

    @staticmethod
    def _has_tensor(node: fx.Node) -> bool:
        value = VAL.get(node)
        return isinstance(value, torch.Tensor) or (
            isinstance(value, (tuple, list)) and any(isinstance(v, torch.Tensor) for v in value)
        )

    @staticmethod
    def _differentiable(node: fx.Node) -> bool:
        value = VAL[node]
        values = (
            [value] if isinstance(value, torch.Tensor) else [v for v in value if isinstance(v, torch.Tensor)]
        )
        if (
            isinstance(node.target, torch._ops.OpOverload)
            and node.target._schema.name.split("::")[1] in _CUTS_GRADIENT
        ) or drawn(node) is not None:  # torch gives its operands gradients of zero
            return False
        if not any(has_gradient(v.dtype) for v in values):
            return False
        sources = operands(node) or [n for n in node.all_input_nodes]
        return any(DIFFERENTIABLE.get(n, False) for n in sources)
