"""One call signature on its way from the global graph to the graph of a rank: a class for each stage.

    GlobalGraph   the model's graph                     functionalize .. local_capacity, annotate
    PlannedGraph  .. with factors, and a plan to fill   shard_experts .. collective_algebra, place
    TypedGraph    .. with a type for every value        lower_collectives, lower_experts, localize
    LocalGraph    the graph that one rank runs          batch_collectives, checkpoint, gather_parameters

A stage has the fields that its passes may read and set, and no others. Its passes change it in place; the
last of them makes the next stage (`then`), which takes the graph over, so the stage before is not to be used
any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import sympy
import torch
from torch import fx, nn

from tedfx.graph.facts import VAL
from tedfx.options import Options
from tedfx.placement.factors import Factor
from tedfx.placement.plan import Plan
from tedfx.placement.roles import MeshShape, Roles
from tedfx.placement.sizes import as_size, solve, symbol_of
from tedfx.stages.history import PassRecord
from tedfx.stages.setting import Setting, asked_for, name_outputs
from tedfx.trace.call_check import CallRules
from tedfx.trace.global_graph import Trace

__all__ = ["GlobalGraph", "LocalGraph", "PlannedGraph", "Stage", "TypedGraph"]

Next = TypeVar("Next", bound="Stage")


@dataclass(kw_only=True)
class Stage:
    """What all stages have.

    setting    what the graph is compiled for
    trace      the graph, and how its placeholders and outputs relate to the model, as passes have left them
    trainable  names of the placeholders of parameters that require gradients
    history    a record per pass so far
    """

    name: ClassVar[str]

    setting: Setting
    trace: Trace
    trainable: set[str]
    history: list[PassRecord] = field(default_factory=list)

    @property
    def graph_module(self) -> fx.GraphModule:
        return self.trace.graph_module

    @property
    def graph(self) -> fx.Graph:
        return self.trace.graph_module.graph

    @property
    def roles(self) -> Roles:
        return self.setting.roles

    @property
    def options(self) -> Options:
        return self.setting.options

    @property
    def parameter_names(self) -> set[str]:
        """Names of the placeholders of parameters, single and stacked."""
        return {*self.trace.parameters, *self.trace.stacked}

    def then(self, stage: type[Next], **made: Any) -> Next:
        """The next stage: what it has in common with this one, and what the pass made for it."""
        common = {f.name for f in fields(self)} & {f.name for f in fields(stage)}
        return stage(**{name: getattr(self, name) for name in common}, **made)


@dataclass(kw_only=True)
class GlobalGraph(Stage):
    """The model's graph on a single device, with a copy of the trace's tables that passes may change.

    model   the user's module, for `check_capture`; None where there are no weights
    dtypes  the dtype of each of its parameters as traced; empty: the model's own
    """

    name = "global"

    model: nn.Module | None = field(default=None, repr=False)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        trace: Trace,
        roles: Roles | None = None,
        trainable: Iterable[str] | None = None,
        *,
        options: Options = Options(),
        example: Mapping[sympy.Symbol, int] | None = None,
        model: nn.Module | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
        summed: Mapping[str, tuple[str, ...]] | None = None,
    ) -> GlobalGraph:
        """A copy of a trace, which may serve any number of meshes, less the outputs that were not asked for.

        roles: a single rank by default. trainable: names of placeholders; by default what the trace did not
        find frozen. summed: see `Setting`. ConfigError for an output that the model has not."""
        roles = Roles.resolve(MeshShape.of("dp=1")) if roles is None else roles
        if trainable is None:
            trainable = {p for p, name in trace.parameters.items() if name not in trace.frozen}
        trainable, names = set(trainable), name_outputs(trace.out_spec)
        call = CallRules(trace, roles.mesh.size(roles.batch))
        trained = frozenset(name for p, name in trace.parameters.items() if p in trainable)
        setting = Setting(
            roles=roles,
            options=options,
            example=dict(example or {}),
            call=call,
            output_names=names,
            trained=trained,
            untrained=frozenset(trace.parameters.values()) - trained,
            summed=summed,
        )
        own = replace(
            trace,
            graph_module=_copy(trace.graph_module, names, options),
            parameters=dict(trace.parameters),
            stacked=dict(trace.stacked),
            mutated_buffers=list(trace.mutated_buffers),
            limits=call.limits,
        )
        return cls(setting=setting, trace=own, trainable=trainable, model=model, dtypes=dict(dtypes or {}))

    def hints(self) -> dict[sympy.Symbol, int]:
        """A nominal value per size symbol, for comparing sizes: not the example's, so that the plan is the
        same for every call signature."""
        found = {}
        for node in self.graph.find_nodes(op="placeholder"):
            value = VAL.get(node)
            if isinstance(value, torch.Tensor):
                for size in value.shape:
                    symbol = symbol_of(size)
                    if symbol is not None and (symbol not in found or symbol == as_size(size)):
                        found[symbol] = solve(size, 8 if symbol == self.trace.sizes.get("batch") else 2048)
        return found

    def is_batch_input(self, node: fx.Node) -> bool:
        """Whether dim 0 of an input placeholder is the batch."""
        if node.name not in self.trace.inputs:
            return False
        value = VAL[node]
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return False
        batch = self.trace.extents.get("batch")
        return batch is not None and as_size(value.shape[0]) == batch


@dataclass(kw_only=True)
class _Planned(Stage):
    """What stages have from `annotate` on.

    plan          which factors each axis shards
    batch_factor  that of the batch; None where the inputs have none
    pieces        factors of inputs that an op refined, and the op's line
    shardable     factors that tensor axes of a fitting size would shard, whatever the mesh
    """

    plan: Plan
    batch_factor: Factor | None = None
    pieces: dict[Factor, str] = field(default_factory=dict)
    shardable: list[Factor] = field(default_factory=list)


@dataclass(kw_only=True)
class PlannedGraph(_Planned):
    """The global graph with the factors of every dim (`annotate`), while the plan is made.

    sequence_factor  that of the sequence; None where the inputs have none
    """

    name = "planned"

    sequence_factor: Factor | None = None


@dataclass(kw_only=True)
class TypedGraph(_Planned):
    """The global graph with a type for every value, and conversions between them (`place`).

    row_numbers  factor of routed rows -> their numbers, where something draws for each row
                 (`passes/row_numbers.py`)
    """

    name = "typed"

    row_numbers: dict[Factor, tuple] = field(default_factory=dict, repr=False)


@dataclass(kw_only=True)
class LocalGraph(_Planned):
    """The graph that every rank runs, with local sizes (`localize`).

    size_sources  size symbol, by name -> (placeholder, dim) whose local size it is
    uses_seed     whether the last placeholder is the seed of what the graph draws
    """

    name = "local"

    size_sources: dict[str, tuple[str, int]] = field(default_factory=dict)
    uses_seed: bool = False


def _copy(source: fx.GraphModule, names: list[str], options: Options) -> fx.GraphModule:
    """A copy of a graph, less what only the outputs need that were not asked for."""
    graph = fx.Graph()
    result = graph.graph_copy(source.graph, {})
    (old,) = source.graph.find_nodes(op="output")
    new = graph.output(result)
    new.meta.update(old.meta)
    assert isinstance(result, (tuple, list)), result
    new.args = (asked_for(result, names, options.outputs),)
    graph.eliminate_dead_code()
    return fx.GraphModule(source, graph)
