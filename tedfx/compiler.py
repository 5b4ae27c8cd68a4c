"""The pipeline from a trace to the graph of one rank. It reads like the table of contents."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Mapping, Sequence

import torch
from torch import fx, nn

from tedfx._torch import pytree
from tedfx.errors import ConfigError
from tedfx.graph.signature import flatten
from tedfx.options import Options
from tedfx.passes.annotate import Annotate
from tedfx.passes.base import Pass, run_pipeline
from tedfx.passes.batch_collectives import BatchCollectives
from tedfx.passes.capture_capacity import CaptureCapacity
from tedfx.passes.capture_loops import CaptureLoops, find_uncaptured
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
from tedfx.placement.derived import solve, symbol_of
from tedfx.placement.factors import Factor, as_size
from tedfx.placement.plan import Plan
from tedfx.placement.roles import Roles
from tedfx.trace.call_check import CallRules
from tedfx.trace.export import Trace


def default_passes(options: Options | None = None, **given) -> list[Pass]:
    """The passes of `parallelize`, in order, made for these options or keywords of `tedfx.Options`."""
    options = Options.collect(options, given, default_passes)
    compiled = bool(options.compile)
    return [
        Functionalize(),
        SimplifyMasks(),
        CaptureLoops(),
        CaptureCapacity(),
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


@dataclass
class Compilation:
    """One call signature on its way from the global graph to the graph of a rank. Passes change it in place.

    trace          the single-device graph and how its placeholders relate to the model
    roles          mesh shape and the axes of each role
    trainable      placeholder names of parameters that require gradients
    graph_module   the graph as it stands
    plan           which factors each axis shards (after `shard_experts`)
    passes         the pipeline that it went through, as text
    example        one rank's size per symbol, where an example was given; `hints` stand for the others
    options        what was asked for: outputs to keep, where and how gradients are summed, the passes
    pieces         factors of inputs that an op refined, and the op's line
    row_numbers    factor of routed rows -> their numbers, where something draws for each row
                   (`passes/row_numbers.py`)
    model          the user's module, for `check_capture`, which lets go of it; None where there are no
                   weights
    dtypes         the dtype of each of its parameters as traced; empty: the model's own
    call           what a call must satisfy by itself
    """

    trace: Trace
    roles: Roles
    trainable: set[str]
    graph_module: fx.GraphModule = None
    plan: Plan | None = None
    batch_factor: Factor | None = None
    sequence_factor: Factor | None = None
    shardable: list[Factor] = field(default_factory=list)
    uses_seed: bool = False
    row_numbers: dict = field(default_factory=dict, repr=False)
    size_sources: dict = field(default_factory=dict)
    pieces: dict[Factor, str] = field(default_factory=dict)
    history: list = field(default_factory=list)
    options: Options = Options()
    example: dict = field(default_factory=dict)
    output_names: list[str] = field(default_factory=list)
    passes: tuple[str, ...] = ()
    model: nn.Module | None = field(default=None, repr=False)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict, repr=False)
    call: CallRules = field(init=False, repr=False)

    def __post_init__(self):
        """Work on a copy: one trace serves any number of meshes."""
        self.call = CallRules(self.trace, self.roles.mesh.size(self.roles.batch))
        source = self.trace.graph_module
        self.trained, self.untrained = (
            {name for p, name in self.trace.parameters.items() if (p in self.trainable) is which}
            for which in (True, False)
        )
        graph = fx.Graph()
        result = graph.graph_copy(source.graph, {})
        old = next(iter(source.graph.find_nodes(op="output")))
        new = graph.output(result)
        new.meta.update(old.meta)
        self.output_names = self._name_outputs()
        new.args = (tuple(self._keep(new.args[0])),)
        graph.eliminate_dead_code()
        self.graph_module = fx.GraphModule(source, graph)
        self.trace = replace(
            self.trace,
            graph_module=self.graph_module,
            mutated_buffers=list(self.trace.mutated_buffers),
            limits=self.call.limits,
        )

    def _name_outputs(self) -> list[str]:
        """A name per leaf of the model's output: ``loss``, ``logits``, ``router_logits[0]``."""
        spec = self.trace.out_spec
        tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
        names = [""] * spec.num_leaves
        for path, index in pytree.tree_flatten_with_path(tree)[0]:
            keys = [getattr(k, "key", getattr(k, "idx", getattr(k, "name", None))) for k in path]
            names[index] = "".join(f"[{k!r}]" if i else str(k) for i, k in enumerate(keys)) or "output"
        return names

    def _keep(self, values):
        """Outputs that were not asked for become None, and what only they need is dropped."""
        if self.outputs is None:
            return values
        base = [n.split("[")[0] for n in self.output_names]
        for name in self.outputs:
            if name not in base:
                raise ConfigError(
                    f"outputs={self.outputs!r}: the model's outputs are {', '.join(dict.fromkeys(base))}"
                )
        lead = len(values) - len(base)
        return [v if i < lead or base[i - lead] in self.outputs else None for i, v in enumerate(values)]

    outputs = property(lambda self: self.options.outputs)
    zero = property(lambda self: self.options.zero)
    bucket_bytes = property(lambda self: self.options.bucket_bytes)
    gradient_dtype = property(lambda self: self.options.gradient_dtype)

    # what passes on the global graph read and extend
    parameters = property(lambda self: self.trace.parameters)
    buffers = property(lambda self: self.trace.buffers)
    constants = property(lambda self: self.trace.constants)
    inputs = property(lambda self: self.trace.inputs)
    mutated_buffers = property(lambda self: self.trace.mutated_buffers)

    @property
    def hints(self) -> dict:
        """A nominal value per size symbol, for comparing sizes: not the example's, so that the plan is the
        same for every call signature."""
        found = {}
        for node in self.trace.graph_module.graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                for size in value.shape:
                    symbol = symbol_of(size)
                    if symbol is not None and (symbol not in found or symbol == as_size(size)):
                        found[symbol] = solve(size, 8 if symbol == self.trace.sizes.get("batch") else 2048)
        return found

    @property
    def parameter_names(self) -> set[str]:
        return set(self.trace.parameters) | set(getattr(self.trace, "stacked", {}))

    def is_batch_input(self, node: fx.Node) -> bool:
        """Whether dim 0 of an input placeholder is the batch."""
        if node.name not in self.trace.inputs:
            return False
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return False
        batch = self.trace.extents.get("batch")
        return batch is not None and as_size(value.shape[0]) == batch

    def find_uncaptured(self) -> list:
        return find_uncaptured(self.graph_module.graph)


def example_sizes(trace: Trace, call: Mapping[str, Any]) -> dict:
    """One rank's size per symbol of the inputs, from a call of that rank."""
    leaves, found = flatten(call), {}
    for node in trace.graph_module.graph.find_nodes(op="placeholder"):
        value = leaves.get(trace.inputs.get(node.name))
        if isinstance(value, torch.Tensor):
            for size, actual in zip(node.meta["val"].shape, value.shape):
                if symbol_of(size) is not None:
                    found[symbol_of(size)] = int(actual)
    return found


def compile_trace(compilation: Compilation, passes: Sequence[Pass] | None = None) -> Compilation:
    """Run the pipeline, by default that of its options; after every pass from `place` on, check the types."""

    def verify(program, p):
        if program.plan is not None and any("types" in q.provides for q in passes[: passes.index(p) + 1]):
            check_types(program, p.name)

    passes = list(pipeline(compilation.options, compilation.roles) if passes is None else passes)
    run_pipeline(compilation, passes, compilation.history, verify=verify)
    compilation.passes = tuple(map(str, passes))
    return compilation
