"""Which tokens a tensor rank keeps between the tensor-parallel regions: a slice of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tedfx.passes.base import Pass, PassResult
from tedfx.placement.factors import Factor
from tedfx.stages.graphs import PlannedGraph


def token_factor(program: PlannedGraph) -> tuple[Factor | None, str]:
    """The factor that tensor axes may cut tokens along: the sequence, else the batch; None, with the reason,
    where neither can be.

    The batch is cut on a tensor axis inside this rank's own share: right only where the tensor axes are minor
    to the batch axes in the mesh.
    """
    if program.sequence_factor is not None:
        return program.sequence_factor, ""
    factor, roles = program.batch_factor, program.roles
    if factor is None or isinstance(factor.size, int):
        return None, "the inputs have no dim of a free size that could be cut"
    names = roles.mesh.names
    batch, tensor = (
        roles.mesh.wide(roles.batch),
        roles.mesh.wide(dict.fromkeys((*roles.tensor, *roles.expert_tensor))),
    )
    if batch and tensor and max(map(names.index, batch)) > min(map(names.index, tensor)):
        return (
            None,
            "the inputs have no sequence, and the batch can only be cut again on axes behind "
            f"{', '.join(batch)} in the mesh",
        )
    return factor, ""


@dataclass(frozen=True)
class SequenceParallel(Pass[PlannedGraph]):
    """Megatron's sequence parallelism (arXiv 2205.05198) for every row-wise stretch of the graph, whatever
    the model calls it.

    On a tensor axis the token factor (the sequence) becomes one that values may be sharded by. `place` then
    does the rest, by its rules:

    1. A partial sum that ends a tensor-parallel region is scattered along the tokens instead of summed
       everywhere (reduce-scatter for all-reduce).
    2. Row-wise ops keep the slice: norms, residual adds, routers, element-wise code. Their parameters are R
       on the axis, so their gradients are summed over it at the boundary.
    3. An op that shards another factor on the axis (column-parallel linears, heads, vocabulary) or needs all
       tokens gathers first (all-gather, whose adjoint is the reduce-scatter); gathers and slices that would
       meet never come about.
    4. Rows for experts across other axes leave from the slice: what `drop_duplicate_tokens` would do has
       happened already.

    Tokens that the ranks do not divide are cut into pieces that differ by one; collectives pad to the larger.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"tensor_plan"})

    def __call__(self, program: PlannedGraph) -> PassResult:
        plan, roles = program.plan, program.roles
        axes = roles.mesh.wide(roles.tensor)
        if not axes:
            return PassResult()
        tokens, reason = token_factor(program)
        if tokens is None:
            return PassResult(matches=len(axes), notes=[f"no sequence parallelism: {reason}"])
        plan.tokens, plan.sequence = tokens, axes
        return PassResult(matches=len(axes), changes=len(axes))
