"""`parallelize`: from a user's model and a mesh to the module that this rank runs."""

from __future__ import annotations

import inspect
from typing import Any, Mapping, Sequence

import torch
from torch import nn

from tedfx._torch import pytree
from tedfx.compiler import compile_graph, example_sizes, pipeline
from tedfx.errors import ConfigError, TedfxError
from tedfx.frontends import default_frontends
from tedfx.graph.signature import Signature, bind, flatten
from tedfx.ops.autocast import Autocast, region
from tedfx.options import Options
from tedfx.passes.base import Pass
from tedfx.placement.fit import whole_pieces
from tedfx.placement.roles import MeshShape, Roles
from tedfx.ranks import progress
from tedfx.ranks.checks import told
from tedfx.runtime.changes import Changes, fits
from tedfx.runtime.module import ParallelModule, Program
from tedfx.runtime.other_optimizer import remember
from tedfx.runtime.prepared import refuse_prepared
from tedfx.stages.graphs import GlobalGraph, LocalGraph
from tedfx.state.layouts import layouts_of, stack_name
from tedfx.trace.calls import infer_inputs
from tedfx.trace.export import trace
from tedfx.trace.global_graph import Trace
from tedfx.trace.hooks import refuse_hooks
from tedfx.trace.input_sizes import with_room
from tedfx.trace.overlaps import refuse_overlaps
from tedfx.trace.precision import cast_parameters, check_complex, parameter_dtypes


@told("parallelize")
def parallelize(
    model: nn.Module,
    mesh,
    *,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    roles: Mapping[str, Sequence[str]] | None = None,
    traces: Sequence[Trace | LocalGraph] = (),
    options: Options | None = None,
    **given,
) -> ParallelModule:
    """The module that this rank runs: the single-device function of the global batch, on ``mesh``. Collective
    over the mesh.

    model           an unmodified single-device module; it is left as it was found, and its storage is not
                    shared. Rank 0's parameters and buffers count. Made under ``torch.device("meta")`` (on
                    every rank) it has no weights: each rank allocates its share, to be filled by
                    ``init_weights``, ``load_pretrained`` or ``load_state_dict`` of what is returned. The
                    captured graph is then not run against the model, which a warning says.
    mesh            a ``DeviceMesh`` with named axes, any subset of dp, ep, tp (cp and pp of size 1) in any
                    order.
    example_inputs  kwargs (dict) or args (tuple) of one rank's batch; only shapes and dtypes matter. Missing:
                    inferred for models that take token ids.
    roles           role name -> axis names, see ``tedfx/placement/roles.py``; what is not named keeps its
                    default.
    traces          traces (``tedfx.trace.export.trace``) or local graphs made before, used for the
                    signatures, roles and options that they fit.
    options         a ``tedfx.Options``, which says what there is to ask for. Each of its fields is a keyword
                    here as well, and a keyword goes before it:
                    ``parallelize(model, mesh, zero=3, checkpoint="full")``.

    Raises ConfigError (mesh, roles, options, sizes), TraceError (the user's line), CaptureError (an MoE layer
    that is not understood, or a graph that does not train as the model does).
    """
    options = Options.collect(options, given, parallelize)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"parallelize takes a module, not {model!r}"
            + (": make an instance of it first" if isinstance(model, type) else "")
        )
    refuse_prepared(model)
    refuse_hooks(model)
    shape = MeshShape.of(mesh)
    resolved = Roles.resolve(shape, roles)
    passes = pipeline(options, resolved)
    if options.checkpoint.startswith("budget") and example_inputs is None:
        raise ConfigError(
            f"checkpoint={options.checkpoint!r} counts bytes at the sizes of one rank's batch: pass it as "
            "example_inputs"
        )
    if not hasattr(mesh, "device_type"):
        raise ConfigError(
            f"parallelize runs on a torch.distributed DeviceMesh, not on {mesh!r}: "
            f"init_device_mesh('cpu', {shape.sizes}, mesh_dim_names={shape.names})"
        )
    if mesh.get_coordinate() is None:
        ranks = mesh.mesh.flatten().tolist()
        raise ConfigError(
            "this rank is not on the mesh, which has ranks "
            f"{', '.join(map(str, ranks[:8]))}{', ..' * (len(ranks) > 8)}: call parallelize where "
            "mesh.get_coordinate() is not None"
        )
    empty = [p.is_meta for p in model.parameters()]
    if any(empty) and not all(empty):
        here, there = (
            next(n for n, p in model.named_parameters() if p.is_meta is meta) for meta in (True, False)
        )
        raise ConfigError(
            f"parameter {here} is on the meta device and {there} is not: make the whole model under "
            "torch.device('meta'), or none of it"
        )
    _check_finite(model)
    dtypes = parameter_dtypes(model, options.precision)
    check_complex(dtypes, options.zero, options.gradient_dtype)
    builder = _Builder(model, resolved, mesh.device_type, options, passes, list(traces), dtypes)
    with progress.line("tedfx.parallelize", options.progress and mesh.get_rank() == mesh.mesh.flatten()[0]):
        return _parallelized(model, mesh, builder, example_inputs, empty=any(empty))


def _parallelized(model: nn.Module, mesh, builder: _Builder, example_inputs, empty: bool) -> ParallelModule:
    call = _example(model, example_inputs)
    around = Autocast.around(mesh.device_type)
    first = builder.compile(call, model.training, around)
    progress.now("place the weights")
    refuse_overlaps(model, first.trace.mutated_buffers)
    layouts = layouts_of(model, first, builder.frozen)

    state = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    persistent = set(model.state_dict().keys())
    buffers = dict(model.named_buffers())
    pm = ParallelModule(
        layouts,
        lambda name: state[name].detach().to(builder.dtypes[name]),
        buffers,
        mesh,
        builder.program,
        builder.roles.batch,
        axis_groups=_groups(first, builder.roles.mesh),
        input_names=[
            n
            for n, p in inspect.signature(model.forward).parameters.items()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ],
        var_keyword=any(
            p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values()
        ),
        number_inputs=builder.number_inputs,
        non_persistent=[name for name in buffers if name not in persistent],
        origin=model,
        empty=empty,
        options=builder.options,
    )
    builder.attach(pm, layouts)
    for module in pm.modules():
        module.training = model.training
    pm.roles = builder.roles
    flat = flatten(call)
    pm._program(
        Signature.of(flat, model.training, True, around), flat
    )  # so that there is a graph to look at before the first call
    remember(pm, model)
    return pm


def _check_finite(model: nn.Module) -> None:
    """ConfigError for a parameter that holds nan or inf. One pass over the values."""
    for name, weight in model.named_parameters():
        if not weight.is_meta and not (fine := weight.detach().isfinite()).all():
            bad = int((~fine).sum())
            raise ConfigError(
                f"parameter {name} has {bad} of {weight.numel()} values that are nan or inf: every loss "
                "would be; initialise or load the weights before parallelize"
            )


def _example(model: nn.Module, given) -> dict[str, Any]:
    if given is None:
        return infer_inputs(model)
    names = [
        n for n, p in inspect.signature(model.forward).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    if isinstance(given, Mapping):
        return bind((), given, names)
    if isinstance(given, (tuple, list)):
        return bind(given, {}, names)
    raise ConfigError(
        f"example_inputs is a {type(given).__name__}; pass a dict of keyword arguments or a tuple of "
        "positional ones"
    )


class _Builder:
    """Compiles a program per call signature; keeps what `parallelize` was told."""

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
        self.module: ParallelModule | None = None
        self.layouts: dict = {}

    def attach(self, module: ParallelModule, layouts) -> None:
        module._changes = self.changes
        self.module, self.layouts = module, {layout.name: layout for layout in layouts}

    def compile(
        self, call: Mapping[str, Any], training: bool, around: Autocast | None = None, attributes: tuple = ()
    ) -> LocalGraph:
        key = (tuple(sorted((str(k), _kind(v)) for k, v in _leaves(call))), training, around, attributes)
        if key not in self.done:
            for ready in self.traces:
                if (
                    isinstance(ready, LocalGraph)
                    and self._same(ready)
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

    def _holds(self, traced: Trace, call, training: bool, around: Autocast | None) -> bool:
        """Whether a trace is of such a call, and of the model as it is now."""
        as_it_is = fits(self.model, traced.observed, traced.training == self.model.training)
        return _fits(traced, call, training, self.dtypes, around) and as_it_is

    def _freezes_alike(self, traced: Trace) -> bool:
        return traced.frozen == self.frozen & set(traced.parameters.values())

    def program(self, signature, flat: dict, training: bool) -> Program:
        """What `ParallelModule` asks for at the first call of a signature."""
        compilation = self.compile(_unflatten(flat), training, signature.autocast, signature.attributes)
        trace_, graph = compilation.trace, compilation.graph_module.graph
        placeholders = [n.name for n in graph.nodes if n.op == "placeholder"]
        stacked = getattr(trace_, "stacked", {})
        names = {
            p: trace_.parameters.get(p) or stack_name(stacked[p])
            for p in placeholders
            if p in trace_.parameters or p in stacked
        }
        if self.module is not None:
            for layout in layouts_of(self.model, compilation, self.frozen):
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
            [trace_.constants[p].to(self.device) for p in placeholders if p in trace_.constants],
            [trace_.inputs[p] for p in placeholders if p in trace_.inputs],
            trace_.out_spec,
            mutated_buffers=list(trace_.mutated_buffers),
            uses_seed=compilation.uses_seed,
            output_names=compilation.setting.output_names,
            call=compilation.setting.call,
            groups=_groups(compilation, self.roles.mesh),
            history=compilation.history,
            compilation=compilation,
            fits=whole_pieces(compilation.graph_module.graph, compilation.trace.inputs, compilation.pieces),
        )


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

    def finish(tree):
        if not isinstance(tree, dict):
            return tree
        tree = {k: finish(v) for k, v in tree.items()}
        return [tree[i] for i in range(len(tree))] if tree and all(isinstance(k, int) for k in tree) else tree

    return finish(root)


def _groups(compilation: LocalGraph, mesh: MeshShape) -> list[tuple[str, ...]]:
    """All axes tuples that the local graph communicates over."""
    found: dict = {}

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
