"""No row crosses an expert axis twice because two ranks hold its token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tedfx.graph.facts import RELATION
from tedfx.passes.base import Pass, PassResult
from tedfx.passes.sequence_parallel import token_factor
from tedfx.stages.graphs import PlannedGraph


@dataclass(frozen=True)
class DropDuplicateTokens(Pass[PlannedGraph]):
    """DeepSpeed-TED's duplicate token dropping (arXiv 2303.06318).

    An all-to-all over one axis of rows replicated on another moves every row as often as that axis has ranks.
    Instead each of those ranks sends the rows of its own slice of the tokens. `place` slices tokens and
    expert ids before the dispatch (a slice of *tokens*: a slice of rows sorted by expert would make the
    busiest expert one lane's load) and gathers tokens after the combine; `lower_experts` gathers the rows
    where tensor-parallel experts need them all, and scatters the experts' partial sums to the slices on the
    way back. One exchange of counts serves all of it.

    Where sequence parallelism has cut the tokens already there is nothing left to do, and the note says so.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"tensor_plan"})

    def __call__(self, program: PlannedGraph) -> PassResult:
        plan, roles = program.plan, program.roles
        layers = sum(
            n.op == "call_function" and n in RELATION and RELATION[n].kind == "dispatch"
            for n in program.graph_module.graph.nodes
        )
        batch = roles.mesh.wide(roles.batch)
        axes = tuple(
            a
            for a in plan.axes
            if a in {*roles.tensor, *roles.expert_tensor, *roles.expert} and a not in batch
        )
        travels = any(a in batch for a in roles.mesh.wide(roles.expert))
        if not layers or not axes or not travels:
            return PassResult(matches=layers)
        left = tuple(a for a in axes if a not in plan.sequence)
        if not left:
            return PassResult(
                matches=layers,
                notes=[
                    "nothing to drop: sequence parallelism already sends each token once over "
                    f"{', '.join(axes)}"
                ],
            )
        tokens, reason = token_factor(program)
        if tokens is None:
            return PassResult(matches=layers, notes=[f"duplicates are not dropped: {reason}"])
        plan.tokens, plan.dedup = tokens, left
        return PassResult(matches=layers, changes=layers * len(left))
