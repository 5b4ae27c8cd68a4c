"""The plan: which factor each mesh axis shards."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from tedfx.capture.uncaptured import LEFT, find_uncaptured
from tedfx.decisions.dense_experts import dense_experts
from tedfx.decisions.experts import expert_layout
from tedfx.errors import CaptureError, ConfigError, user_line
from tedfx.graph.facts import DIMS, DIMS_OF, RELATION
from tedfx.graph.nodes import argument
from tedfx.ops.cuts import lengths_of
from tedfx.passes.base import Pass, PassResult
from tedfx.placement.factors import leaves
from tedfx.placement.plan import roots
from tedfx.stages.graphs import PlannedGraph


def _relation_nodes(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and n in RELATION]


@dataclass(frozen=True)
class ShardExperts(Pass[PlannedGraph]):
    """Batch factor over the `batch` axes; each MoE layer's expert factor over the `expert` axes, whether
    tokens are dispatched to its experts or all of them compute all tokens
    (tedfx/decisions/dense_experts.py).

    Experts that the axes do not divide are cut into pieces of the rounded-up quotient, the last ones shorter
    or empty, as DTensor cuts (`tedfx/ops/cuts.py`), with a note.

    Refused: batch axes over 1 where the model fixes the size of its batch; experts in groups of which the
    axes do not divide the number; no MoE layer where expert axes exceed 1.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"plan"})

    def __call__(self, program: PlannedGraph) -> PassResult:
        roles, mesh = program.roles, program.roles.mesh
        plan = program.plan
        result = PassResult()
        batch = mesh.wide(roles.batch)
        if batch and program.batch_factor is None:
            fixed = next(
                (line for line in program.trace.static if line.startswith("batch = ")),
                "no input has a batch dim",
            )
            raise ConfigError(
                f"mesh {mesh} splits the batch over {', '.join(batch)}, but {fixed}: write sizes as "
                "x.shape[0], or take a mesh without these axes"
            )
        if program.batch_factor is not None:
            plan.take(batch, program.batch_factor)
            result.changes += 1
        axes = mesh.wide(roles.expert)
        layers = [n for n in _relation_nodes(program.graph_module.graph) if RELATION[n].kind == "dispatch"]
        dense = dense_experts(program.graph, program.parameter_names, program.trace.inputs)
        result.matches = len(layers) + len(dense)
        if axes and not result.matches:
            wide = [a for a in axes if a not in roles.tensor]
            if wide:
                found = find_uncaptured(program.graph)
                notes = [note for record in program.history for note in record.result.notes]
                left = [note.removeprefix(LEFT) for note in notes if note.startswith(LEFT)]
                if found or left:
                    named = "; ".join(f"{style} at {line}" for style, line in found) or "experts"
                    detail = named + "".join(f" ({why})" for why in left)
                    raise CaptureError(
                        f"UnsupportedMoE: {detail}: this style of mixture is not captured, so it cannot "
                        f"be split over {axes}: write it in a style that is "
                        "captured (docs/captured.md), or leave the expert axes out"
                    )
                raise CaptureError(
                    f"expert axes {axes} of size {mesh.size(axes)}, but no MoE layer was found in the "
                    "model: use those ranks as dp or tp, or see "
                    "docs/captured.md"
                )
        seen: set = set()
        for node in layers:
            experts = leaves(DIMS_OF[node][1][0])[0]
            if experts in seen:
                continue
            seen.add(experts)
            degree = mesh.size(axes)
            count = experts.size
            if not isinstance(count, int):
                raise TypeError(f"{node.name} has {count} experts, which is no number")
            if count % degree:
                if len(leaves(DIMS_OF[node][1][0])) > 1:
                    raise ConfigError(
                        f"{argument(node, 2)} experts in groups cannot be split over expert axes {axes} of "
                        f"size {degree}, which does not divide the {count} groups: take axes that do"
                    )
                lengths = lengths_of(count, [mesh.size((axis,)) for axis in axes])
                result.notes.append(
                    f"{count} experts do not divide by {degree}: {', '.join(map(str, lengths))} on the ranks "
                    f"of {axes}, so that those with fewer wait for the others"
                )
            plan.take(axes, experts)
        for experts in dense:
            degree, count, line = mesh.size(axes), experts.factor.size, user_line(experts.node)
            if isinstance(count, int) and count % degree:
                whole = f"{count} experts that compute all tokens, at {line}, do not divide by {degree}"
                result.notes.append(f"{whole}: whole on {axes}")
                if not layers and experts is dense[-1] and not plan.dense:
                    fits = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
                    raise ConfigError(f"{whole}, the size of expert axes {axes}; sizes that fit: {fits}")
                continue
            if experts.factor not in seen:
                plan.take(axes, experts.factor)
            plan.dense[experts.factor] = experts.met
            plan.routers |= experts.routers
            result.notes.append(f"{count} experts compute all tokens at {line}")
        return result


@dataclass(frozen=True)
class ShardTensors(Pass[PlannedGraph]):
    """Column / row regions over the `tensor` axes (over `expert_tensor` inside experts), grown from weights.

    A factor is a candidate when some weight of two or more dims carries it, its size divides by the degree,
    and no op needs it whole (softmax over it, a slice across it): a shard of it then runs from the ops that
    produce it (column-parallel) to those that contract it (row-parallel), and each contraction closes with
    one reduction. Cost: elements reduced per element of weight split. Candidates are taken in order of that
    cost, unless a value would carry two factors on one axis, or the factor twice (the weight of `x +
    linear(x)`). What is not taken stays replicated, with a note where only divisibility failed.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"plan"})
    provides: ClassVar[frozenset[str]] = frozenset({"tensor_plan"})

    def __call__(self, program: PlannedGraph) -> PassResult:
        graph, plan, roles = program.graph_module.graph, program.plan, program.roles
        result, parameters = PassResult(), program.parameter_names
        nodes = _relation_nodes(graph)
        blocked, cost, values, together = set(), {}, {}, {}
        if program.batch_factor is not None:
            blocked |= roots([program.batch_factor])
        for node in nodes:
            relation = RELATION[node]
            for factors in relation.whole.values():
                blocked |= roots(factors)
            outs = relation.results
            for factor in roots(relation.contracted):
                cost[factor] = cost.get(factor, 0.0) + sum(plan.elements(o) for o in outs)
            for dims in outs:
                blocked |= self._meet(together, dims)
        for node in graph.nodes:
            if node.op == "placeholder" and node in DIMS:
                blocked |= self._meet(together, DIMS[node])
                if node.name in parameters and len(DIMS[node]) >= 2:
                    for factor in roots(f for d in DIMS[node] for f in d):
                        values[factor] = values.get(factor, 0.0) + plan.elements(DIMS[node])
        inside: set = set()
        for node in nodes:
            if RELATION[node].kind == "dispatch":
                experts, met = expert_layout(node, plan)
                inside |= met
                blocked |= {experts.root()} | roots(DIMS_OF[node][0][0])
        inside |= set().union(*plan.dense.values())
        blocked |= plan.dense.keys()
        candidates = sorted(
            (f for f in values if f not in blocked and isinstance(f.size, int) and f.size > 1),
            key=lambda f: (cost.get(f, 0.0) / values[f], f.uid),
        )
        for factor in candidates:
            axes = roles.mesh.wide(roles.expert_tensor if factor in inside else roles.tensor)
            if not axes:
                # planned without a mesh axis: the layout of fused weights must not depend on the mesh
                axes = ()
            taken = program.shardable
            if any(other in together.get(factor, ()) for other in taken):
                continue
            taken.append(factor)
            result.matches += 1
            degree = roles.mesh.size(axes)
            if factor.size % degree:
                result.notes.append(
                    f"{factor.name or 'a factor'} of size {factor.size} does not divide by {degree}: "
                    f"replicated over {axes}, with {values[factor]:.0f} weight elements and their products "
                    "whole on each rank"
                )
                continue
            if any(plan.shards(a, other) for a in axes for other in together.get(factor, ())):
                continue
            plan.take(axes, factor)
            result.changes += bool(axes)
        return result

    @staticmethod
    def _meet(together: dict, dims) -> set:
        """Which factors a value carries together; those that it carries twice are returned."""
        carried = Counter(f.root() for dim in dims for f in leaves(dim))
        for factor in carried:
            together.setdefault(factor, set()).update(carried.keys() - {factor})
        return {factor for factor, times in carried.items() if times > 1}
