"""What runs a call of a user's model: a compilation per kind of call, and the program that a ParallelModule
takes of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from tedfx._torch import pytree
from tedfx.compiler import compile_graph, example_sizes
from tedfx.errors import ConfigError, TedfxError
from tedfx.frontends import default_frontends
from tedfx.graph.signature import Signature, flatten
from tedfx.ops.autocast import Autocast, region
from tedfx.options import Options
from tedfx.passes.base import Pass
from tedfx.placement.fit import whole_pieces
from tedfx.placement.roles import Roles
from tedfx.ranks import progress
from tedfx.runtime.changes import Changes, fits
from tedfx.runtime.program import Program
from tedfx.stages.graphs import GlobalGraph, LocalGraph
from tedfx.state.layouts import layouts_of, stack_name
from tedfx.state.parameters import ParameterLayout
from tedfx.trace.export import trace
from tedfx.trace.global_graph import Trace
from tedfx.trace.input_sizes import with_room
from tedfx.trace.precision import cast_parameters


class Compilations:
    """Of one model, by kind of call: made at first use, from a trace or a compilation made before where one
    fits (`traces`). dtypes: of parameters, by the user's names."""

    def __init__(
        self,
        model,
        roles: Roles,
        device: str,
        options: Options,
        passes: Sequence[Pass],
        traces: Sequence[Trace | LocalGraph],
        dtypes: Mapping[str, torch.dtype],
    ):
        self.model, self.roles, self.device = model, roles, torch.device(device)
        self.options, self.passes, self.traces, self.dtypes = options, passes, traces, dtypes
        self.frozen = {
            name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad
        }
        self.done: dict = {}
        self.changes = Changes(model)
        self.number_inputs = frozenset(
            n for f in default_frontends() if f.applies(model) for n in f.number_inputs
        )

    def compile(
        self,
        call: Mapping[str, Any],
        training: bool,
        around: Autocast | None = None,
        attributes: tuple = (),
        summed: Mapping[str, tuple[str, ...]] | None = None,
    ) -> LocalGraph:
        """`summed`: over which axes the gradients of parameters are summed (`Setting`), after the first."""
        key = (tuple(sorted((str(k), _kind(v)) for k, v in _leaves(call))), training, around, attributes)
        if key not in self.done:
            for ready in self.traces:
                if (
                    isinstance(ready, LocalGraph)
                    and self._same(ready)
                    and self._sums(ready, summed)
                    and self._holds(ready.trace, call, training, around)
                ):
                    self.changes.watch(ready.trace.observed, training == self.model.training)
                    self.done[key] = ready
                    return ready
            traced = next(
                (
                    t
                    for t in self.traces
                    if isinstance(t, Trace)
                    and self._holds(t, call, training, around)
                    and self._freezes_alike(t)
                ),
                None,
            )
            if traced is None:
                was, flags = self.model.training, [(m, m.training) for m in self.model.modules()]
                progress.now("trace")
                try:
                    if was != training:
                        self.model.train(training)
                    with (
                        cast_parameters(self.model, self.dtypes, values=False),
                        region(around, self.device.type),
                    ):
                        traced = with_room(
                            call, lambda roomy: trace(self.model, kwargs=roomy, device=self.device)
                        )
                finally:
                    for module, flag in flags:
                        module.training = flag
            self.changes.watch(traced.observed, training == self.model.training)
            trainable = {p for p, name in traced.parameters.items() if name not in self.frozen}
            whole = GlobalGraph.of(
                traced,
                self.roles,
                trainable,
                example=example_sizes(traced, call),
                options=self.options,
                model=self.model,
                dtypes=self.dtypes,
                summed=summed,
            )
            with region(None, self.device.type):
                self.done[key] = compile_graph(whole, self.passes)
        return self.done[key]

    def _same(self, ready: LocalGraph) -> bool:
        """Whether a graph made before is for these roles, passes and options, and trains what this
        model trains."""
        mine = (self.roles, tuple(map(str, self.passes)), self.options.graph())
        its = (ready.roles, tuple(record.text for record in ready.history), ready.options.graph())
        setting = ready.setting
        return its == mine and not setting.trained & self.frozen and setting.untrained <= self.frozen

    def _sums(self, ready: LocalGraph, summed: Mapping[str, tuple[str, ...]] | None) -> bool:
        return summed is None or all(
            summed[layout.name] == layout.reduce_axes
            for layout in layouts_of(self.model, ready, self.frozen)
            if layout.name in summed
        )

    def _holds(self, traced: Trace, call, training: bool, around: Autocast | None) -> bool:
        """Whether a trace is of such a call, and of the model as it is now."""
        as_it_is = fits(self.model, traced.observed, traced.training == self.model.training)
        return _fits(traced, call, training, self.dtypes, around) and as_it_is

    def _freezes_alike(self, traced: Trace) -> bool:
        return traced.frozen == self.frozen & set(traced.parameters.values())


class Placing:
    """`(signature, flat, training) -> Program` of a module with these layouts: what `ParallelModule` asks for
    at the first call of a kind."""

    def __init__(self, made: Compilations, layouts: Iterable[ParameterLayout]):
        self.made, self.layouts = made, {layout.name: layout for layout in layouts}
        self.summed = {layout.name: layout.reduce_axes for layout in self.layouts.values()}

    def __call__(self, signature: Signature, flat: dict, training: bool) -> Program:
        made = self.made
        compilation = made.compile(
            _unflatten(flat), training, signature.autocast, signature.attributes, self.summed
        )
        trace_, graph = compilation.trace, compilation.graph_module.graph
        placeholders = [n.name for n in graph.nodes if n.op == "placeholder"]
        names = {
            p: trace_.parameters.get(p) or stack_name(trace_.stacked[p])
            for p in placeholders
            if p in trace_.parameters or p in trace_.stacked
        }
        for layout in layouts_of(made.model, compilation, made.frozen):
            mine = self.layouts.get(layout.name)
            if (
                mine is not None
                and layout.name in names.values()
                and (mine.shards, mine.reduce_axes, mine.view)
                != (layout.shards, layout.reduce_axes, layout.view)
            ):
                raise TedfxError(
                    f"parameter {layout.name} is placed as {mine.shards} but this call "
                    f"({signature}) wants {layout.shards}: pass this call as example_inputs"
                )
        parameters = [names[p] for p in placeholders if p in names]
        if any(constant.is_meta for constant in trace_.constants.values()):
            raise ConfigError(
                "the model holds a tensor on the meta device that is neither parameter nor buffer: "
                "register it as a buffer, or make it with device='cpu'"
            )
        return Program(
            compilation.graph_module,
            parameters,
            [trace_.buffers[p] for p in placeholders if p in trace_.buffers],
            [trace_.constants[p].to(made.device) for p in placeholders if p in trace_.constants],
            [trace_.inputs[p] for p in placeholders if p in trace_.inputs],
            trace_.out_spec,
            mutated_buffers=list(trace_.mutated_buffers),
            uses_seed=compilation.uses_seed,
            output_names=compilation.setting.output_names,
            call=compilation.setting.call,
            groups=groups_of(compilation),
            history=compilation.history,
            compilation=compilation,
            fits=whole_pieces(graph, trace_.inputs, compilation.pieces),
        )


def groups_of(compilation: LocalGraph) -> list[tuple[str, ...]]:
    """All axes tuples that the local graph communicates over."""
    found, mesh = {}, compilation.roles.mesh

    def visit(arg):
        if isinstance(arg, (tuple, list)):
            if len(arg) > 1 and all(isinstance(a, str) and a in mesh.names for a in arg):
                found[tuple(arg)] = None
            else:
                for item in arg:
                    visit(item)

    for node in compilation.graph_module.graph.nodes:
        visit(node.args)
        for value in node.kwargs.values():
            visit((value,) if not isinstance(value, (tuple, list)) else [value])
    wide = mesh.wide(compilation.roles.batch)
    if len(wide) > 1:
        found[wide] = None
    return list(found)


def _leaves(call):
    return [
        (tuple(str(k) for k in path), leaf)
        for path, leaf in pytree.tree_flatten_with_path(dict(call))[0]
        if leaf is not None
    ]


def _kind(leaf) -> str:
    return f"{leaf.dtype}[{leaf.dim()}]" if isinstance(leaf, torch.Tensor) else repr(leaf)


def _fits(
    traced: Trace, call, training: bool, dtypes: Mapping[str, torch.dtype], around: Autocast | None
) -> bool:
    if (traced.training, traced.autocast) != (training, around):
        return False
    nodes = {n.name: n for n in traced.graph_module.graph.find_nodes(op="placeholder")}
    names = {**traced.parameters, **{p: sources[0] for p, sources in traced.stacked.items()}}
    if any(nodes[p].meta["val"].dtype != dtypes.get(name) for p, name in names.items() if p in nodes):
        return False
    mine = flatten(call)
    tensors = {path for path, leaf in mine.items() if isinstance(leaf, torch.Tensor)}
    if tensors != set(traced.inputs.values()):
        return False
    values = {path: leaf for path, leaf in mine.items() if not isinstance(leaf, torch.Tensor)}
    if {k: v for k, v in traced.values.items() if v is not None} != values:
        return False
    return all(
        nodes[p].meta["val"].dtype == mine[path].dtype and nodes[p].meta["val"].dim() == mine[path].dim()
        for p, path in traced.inputs.items()
    )


def _unflatten(flat: Mapping[tuple, Any]) -> dict[str, Any]:
    """A call from its leaves by path (dicts and lists)."""
    root: dict = {}
    for path, leaf in flat.items():
        place = root
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = leaf

    def finish(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        tree = {k: finish(v) for k, v in tree.items()}
        return [tree[i] for i in range(len(tree))] if tree and all(isinstance(k, int) for k in tree) else tree

    return {name: finish(tree) for name, tree in root.items()}
