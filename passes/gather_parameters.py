"""ZeRO-3: parameters lie in shares over the data axes, and are gathered where a layer is about to use
them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from tedfx import ops
from tedfx.analysis.layers import layers
from tedfx.errors import ConfigError
from tedfx.graph.emit import insert
from tedfx.graph.facts import (
    DIFFERENTIABLE,
    IN_GRAPH,
    LOCAL_SHAPE,
    PARAMETER,
    REGION,
    TYPE,
    VAL,
    copy_provenance,
    copy_value,
)
from tedfx.options import Options
from tedfx.passes.base import Pass, PassResult
from tedfx.stages.graphs import LocalGraph
from tedfx.state.layouts import placed_on_first
from tedfx.state.parameters import Placed


@dataclass(frozen=True)
class GatherParameters(Pass[LocalGraph]):
    """Stage 3 of ZeRO (arXiv 1910.02054): each parameter that the data axes replicate is an input of the
    graph in this rank's share (`tedfx.runtime.state_dict.parameters.Placed.share`).

    bucket_bytes   whole parameters that one gather makes, at most; a larger parameter goes alone.
    compiled       the graph is to be compiled: see 3.

    1. A unit is a recompute region, or what a layer has outside of them, or a use outside of all layers. The
       parameters that a unit uses are gathered by it, in order of first use, in buckets of equal axes and
       dtype: `gather_parameters` stands before the bucket's first user. A parameter of several units is
       gathered in each.
    2. A gather belongs to the region of its users: recompute gathers again, and backward's adjoint sends each
       rank the sum of its share. What a policy promises of recompute is about collectives of activations;
       gathers of parameters are counted by their own name.
    3. Outside of regions whole parameters are saved for backward as a note of what to gather again
       (`tedfx/runtime/gathers.py`). A compiler sees no such notes: there a gather becomes a region of its
       own, so that backward repeats it instead of keeping what it made.
    """

    bucket_bytes: int = Options.gather_bytes
    compiled: bool = False

    requires: ClassVar[frozenset[str]] = frozenset({"regions"})
    provides: ClassVar[frozenset[str]] = frozenset({"parameter_shares"})

    def check_compiled(self, compiled: bool) -> None:
        # Who scatters the gradients, the graph or the boundary, would be settled in two ways.
        if compiled != self.compiled:
            raise ConfigError(
                f"compile={compiled} and passes= with GatherParameters(compiled={self.compiled}): make them "
                f"by tedfx.default_passes(compile={compiled}, ..)"
            )

    def __call__(self, program: LocalGraph) -> PassResult:
        graph, result = program.graph_module.graph, PassResult()
        layer, position = layers(graph), {node: i for i, node in enumerate(graph.nodes)}
        names = program.parameter_names
        buckets: dict[tuple, list[list]] = {}
        shares: dict[fx.Node, Placed] = {}
        for node in graph.find_nodes(op="placeholder"):
            if node.name not in names or node not in TYPE:
                continue
            placed = placed_on_first(program, node, 3)
            if placed.cut is None:
                continue
            result.matches += 1
            shares[node] = placed
            units: dict = {}
            for user in node.users:
                if user.op != "output":
                    units.setdefault(self._unit(user, node, layer), []).append(user)
            for unit, users in units.items():
                users.sort(key=position.get)
                buckets.setdefault((unit, placed.reduce_axes, VAL[node].dtype), []).append(
                    [position[users[0]], node, users, placed]
                )
        regions = 1 + max((REGION[n] for n in graph.nodes if n in REGION), default=-1)
        order = []
        for (unit, axes, _), members in buckets.items():
            for group in self._filled(sorted(members, key=lambda m: m[0])):
                order.append((group[0][0], unit, axes, group))
        for number, (_, unit, axes, group) in enumerate(sorted(order, key=lambda o: o[0])):
            region = unit if isinstance(unit, int) else None
            if region is None and self.compiled:
                region, regions = regions, regions + 1
            self._gather(program, number, axes, group, region)
            result.changes += 1
        for node, placed in shares.items():
            LOCAL_SHAPE[node] = placed.share.shape
        return result

    @staticmethod
    def _unit(user: fx.Node, parameter: fx.Node, layer: dict):
        return REGION.get(user, layer.get(user) or parameter.name)

    def _filled(self, members: list[list]) -> list[list[list]]:
        groups, size = [], 0
        for member in members:
            mine = member[3].whole.numel * VAL[member[1]].dtype.itemsize
            if not groups or size + mine > self.bucket_bytes:
                groups.append([])
                size = 0
            groups[-1].append(member)
            size += mine
        return groups

    def _gather(self, program: LocalGraph, number: int, axes, group: list[list], region: int | None) -> None:
        graph = program.graph_module.graph
        first, parameters = group[0][2][0], [node for _, node, _, _ in group]
        with graph.inserting_before(first):
            cuts = tuple(tuple(placed.common_cut) for *_, placed in group)
            gather = insert(
                graph,
                ops.gather_parameters,
                parameters,
                axes,
                cuts,
                number,
                program.options.gradient_dtype,
                like=first,
            )
        IN_GRAPH[gather] = (
            self.compiled
        )  # whether backward scatters the gradients there, or leaves it to the boundary
        DIFFERENTIABLE[gather] = any(DIFFERENTIABLE.get(p) for p in parameters)
        after = gather
        for index, (_, node, users, _) in enumerate(group):
            with graph.inserting_after(after):
                whole = after = graph.call_function(operator.getitem, (gather, index))
            copy_value(node, whole)
            copy_provenance(gather, whole)
            PARAMETER[whole] = True
            for user in users:
                user.replace_input_with(node, whole)
            if region is not None:
                REGION[whole] = region
        if region is not None:
            REGION[gather] = region
