"""The pipeline from a trace to the graph of one rank. It reads like the table of contents."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import torch
from torch import fx

from tedfx.errors import ContractError
from tedfx.graph.signature import flatten
from tedfx.options import Options
from tedfx.passes.annotate import Annotate
from tedfx.passes.base import Pass, check_contracts, run_pipeline
from tedfx.passes.batch_collectives import BatchCollectives
from tedfx.passes.capture_capacity import CaptureCapacity
from tedfx.passes.capture_choices import CaptureChoices
from tedfx.passes.capture_dense import CaptureDense
from tedfx.passes.capture_loops import CaptureLoops
from tedfx.passes.capture_scattered import CaptureScattered
from tedfx.passes.capture_sorted import CaptureSorted
from tedfx.passes.check_capture import CheckCapture
from tedfx.passes.check_types import check_types
from tedfx.passes.checkpoint import Checkpoint
from tedfx.passes.collective_algebra import CollectiveAlgebra
from tedfx.passes.drop_duplicate_tokens import DropDuplicateTokens
from tedfx.passes.expand_attention import ExpandAttention
from tedfx.passes.functionalize import Functionalize
from tedfx.passes.gather_parameters import GatherParameters
from tedfx.passes.local_capacity import LocalCapacity
from tedfx.passes.localize import Localize
from tedfx.passes.lower_collectives import LowerCollectives
from tedfx.passes.lower_experts import LowerExperts
from tedfx.passes.place import Place
from tedfx.passes.sequence_parallel import SequenceParallel
from tedfx.passes.shard import ShardExperts, ShardTensors
from tedfx.passes.simplify_masks import SimplifyMasks
from tedfx.passes.split_losses import SplitLosses
from tedfx.passes.stack_experts import StackExperts
from tedfx.placement.roles import Roles
from tedfx.placement.sizes import symbol_of
from tedfx.stages.graphs import GlobalGraph, LocalGraph, Stage, TypedGraph
from tedfx.trace.global_graph import Trace


def default_passes(options: Options | None = None, **given) -> list[Pass]:
    """The passes of `parallelize`, in order, made for these options or keywords of `tedfx.Options`."""
    options = Options.collect(options, given, default_passes)
    compiled = bool(options.compile)
    return [
        Functionalize(),
        SimplifyMasks(),
        CaptureSorted(),
        CaptureLoops(),
        CaptureCapacity(),
        CaptureScattered(),
        CaptureChoices(),
        CaptureDense(),
        StackExperts(),
        ExpandAttention(),
        SplitLosses(),
        CheckCapture(options.check),
        *[LocalCapacity()] * (options.capacity == "local"),
        Annotate(),
        ShardExperts(),
        ShardTensors(),
        *[SequenceParallel()] * options.sequence_parallel,
        *[DropDuplicateTokens()] * options.dedup,
        *[CollectiveAlgebra()] * options.algebra,
        Place(),
        LowerCollectives(),
        LowerExperts(),
        Localize(),
        *[BatchCollectives()] * options.algebra,
        Checkpoint(options.checkpoint, decide_again=not compiled),
        *[GatherParameters(options.gather_bytes, compiled)] * (options.zero == 3),
    ]


def pipeline(options: Options, roles: Roles) -> list[Pass]:
    """The user's passes as they are, or `default_passes`. ConfigError where an option cannot hold on this
    mesh, or a pass was made for a graph that is compiled and this one is not, or the other way round."""
    options.check_mesh(roles)
    passes = default_passes(options) if options.passes is None else list(options.passes)
    for p in passes:
        p.check_compiled(bool(options.compile))
    return passes


def example_sizes(trace: Trace, call: Mapping[str, Any]) -> dict:
    """One rank's size per symbol of the inputs, from a call of that rank."""
    leaves, found = flatten(call), {}
    for node in trace.graph_module.graph.find_nodes(op="placeholder"):
        path = trace.inputs.get(node.name)
        value = None if path is None else leaves.get(path)
        if isinstance(value, torch.Tensor):
            for size, actual in zip(node.meta["val"].shape, value.shape):
                if symbol_of(size) is not None:
                    found[symbol_of(size)] = int(actual)
    return found


def compile_graph(program: GlobalGraph, passes: Sequence[Pass] | None = None) -> LocalGraph:
    """Run the pipeline, by default that of its options; from `place` on check the types after every pass.

    ContractError where the passes do not fit each other, or do not end with a local graph."""

    fine: dict[fx.Node, tuple[list, list]] = {}

    def verify(program: Stage, p: Pass) -> None:
        if isinstance(program, (TypedGraph, LocalGraph)):
            check_types(program, p.name, fine)

    passes = list(pipeline(program.options, program.roles) if passes is None else passes)
    end = check_contracts(passes)
    if end is not LocalGraph:
        raise ContractError(f"the passes end with a {end.name} graph, and a rank runs a local one")
    return run_pipeline(program, passes, verify=verify)
