"""The plan: which factor each mesh axis shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from tedfx.capture.uncaptured import LEFT, find_uncaptured
from tedfx.decisions.dense_experts import dense_experts
from tedfx.decisions.experts import expert_layout
from tedfx.errors import CaptureError, ConfigError, user_line
from tedfx.graph.facts import DIMS, DIMS_OF, RELATION
from tedfx.graph.nodes import argument, op_name, operands
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


_GROUPED = 8  # elements that grouped kernels take at a time (16 bytes in bfloat16: tedfx/ops/experts.py)


def _stays_whole(
    count: int, axes: Sequence[str], degree: int, of_experts: bool, filled: str | None = None
) -> str:
    """Why a factor of `count` that `degree` ranks do not divide is better left whole; "" where it is cut.
    `of_experts`: it is one of an expert's own; `filled`: an op that cannot do with an empty piece of it.

    A rank that holds a piece has count / largest times fewer weights than one that holds all of them. It
    multiplies all tokens with it; ranks that hold all of the weights may take a slice of the tokens each, and
    then do 1 / degree of the work, where the largest piece is largest / count of it. So with unequal pieces
    the slowest rank does degree * largest / count times more. The cut is made where it saves no less than
    that: count / largest >= degree * largest / count, which holds for equal pieces, for two ranks, and
    otherwise where the ranks are few beside what they share.
    """
    if len(axes) > 1:
        return "pieces that are not equal are pieces over one axis"
    lengths = lengths_of(count, [degree])
    largest = max(lengths)
    if largest**2 * degree > count**2:
        work, saved = degree * largest / count, count / largest
        return f"pieces of {largest} are {work:.1f} times an equal one's work and save a factor {saved:.1f}"
    if filled and not min(lengths):
        return f"some pieces would be empty, and it meets {filled}, which takes no empty dim"
    if of_experts and count % _GROUPED == 0 and any(length % _GROUPED for length in lengths):
        return f"grouped kernels take multiples of {_GROUPED}, and {largest} is none"
    return ""


@dataclass(frozen=True)
class ShardTensors(Pass[PlannedGraph]):
    """Column / row regions over the `tensor` axes (over `expert_tensor` inside experts), grown from weights.

    A factor is a candidate when some weight of two or more dims carries it and no op needs it whole (softmax
    over it, a slice across it): a shard of it then runs from the ops that produce it (column-parallel) to
    those that contract it (row-parallel), and each contraction closes with one reduction. Cost: elements
    reduced per element of weight split. Candidates are taken in order of that cost, unless a value would
    carry two factors on one axis, or the factor twice (the weight of `x + linear(x)`).

    A factor that the degree does not divide is cut into pieces of the rounded-up quotient, the last ones
    shorter or empty, as DTensor cuts (`tedfx/ops/cuts.py`), with a note. It stays replicated, with a note of
    what that costs, where `_stays_whole` says that this is better.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"plan"})
    provides: ClassVar[frozenset[str]] = frozenset({"tensor_plan"})

    def __call__(self, program: PlannedGraph) -> PassResult:
        graph, plan, roles = program.graph_module.graph, program.plan, program.roles
        result, parameters = PassResult(), program.parameter_names
        nodes = _relation_nodes(graph)
        blocked, cost, values, together, filled = set(), {}, {}, {}, {}
        if program.batch_factor is not None:
            blocked |= roots([program.batch_factor])
        for node in nodes:
            relation = RELATION[node]
            for factors in relation.whole.values():
                blocked |= roots(factors)
            blocked |= roots(leaves(relation.run)[1:])
            outs = relation.results
            if relation.filled:
                met = [d for n in operands(node) for d in DIMS[n]] + [d for dims in outs for d in dims]
                filled.update(dict.fromkeys(roots(f for d in met for f in d), op_name(node)))
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
                inside |= expert_layout(node, plan)[1]
                blocked |= roots(DIMS_OF[node][1][0]) | roots(DIMS_OF[node][0][0])
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
            uneven = f"{factor.name or 'a factor'} of size {factor.size} does not divide by {degree}: "
            why = (
                _stays_whole(factor.size, axes, degree, factor in inside, filled.get(factor))
                if factor.size % degree
                else ""
            )
            if why:
                result.notes.append(
                    f"{uneven}replicated over {axes}, with {values[factor]:.0f} weight elements and their "
                    f"products whole on each rank, since {why}"
                )
                continue
            if any(plan.shards(a, other) for a in axes for other in together.get(factor, ())):
                continue
            plan.take(axes, factor)
            result.changes += bool(axes)
            if factor.size % degree:
                lengths = ", ".join(map(str, lengths_of(factor.size, [degree])))
                result.notes.append(f"{uneven}{lengths} on the ranks of {axes}")
        return result

    @staticmethod
    def _meet(together: dict, dims) -> set:
        """Which factors a value carries together; those that it carries twice are returned."""
        carried = Counter(f.root() for dim in dims for f in leaves(dim))
        for factor in carried:
            together.setdefault(factor, set()).update(carried.keys() - {factor})
        return {factor for factor, times in carried.items() if times > 1}
