"""`parallelize`: from a user's model and a mesh to the module that this rank runs."""

from __future__ import annotations

import inspect
from typing import Any, Mapping, Sequence

from torch import nn

from tedfx.calls import Compilations, Placing, groups_of
from tedfx.compiler import pipeline
from tedfx.errors import ConfigError
from tedfx.graph.signature import bind
from tedfx.ops.autocast import Autocast
from tedfx.options import Options
from tedfx.placement.roles import MeshShape, Roles
from tedfx.ranks import progress
from tedfx.ranks.meeting import told
from tedfx.runtime.module import ParallelModule
from tedfx.runtime.other_optimizer import remember
from tedfx.runtime.prepared import refuse_prepared
from tedfx.stages.graphs import LocalGraph
from tedfx.state.layouts import layouts_of
from tedfx.trace.calls import infer_inputs
from tedfx.trace.global_graph import Trace
from tedfx.trace.hooks import refuse_hooks
from tedfx.trace.overlaps import refuse_overlaps
from tedfx.trace.precision import check_complex, parameter_dtypes


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
    made = Compilations(model, resolved, mesh.device_type, options, passes, list(traces), dtypes)
    with progress.line("tedfx.parallelize", options.progress and mesh.get_rank() == mesh.mesh.flatten()[0]):
        return _parallelized(model, mesh, made, example_inputs, empty=any(empty))


def _parallelized(model: nn.Module, mesh, made: Compilations, example_inputs, empty: bool) -> ParallelModule:
    call = _example(model, example_inputs)
    around = Autocast.around(mesh.device_type)
    first = made.compile(call, model.training, around)
    progress.now("place the weights")
    refuse_overlaps(model, first.trace.mutated_buffers)
    layouts = layouts_of(model, first, made.frozen)

    state = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    persistent, buffers = set(model.state_dict().keys()), dict(model.named_buffers())
    takes = inspect.signature(model.forward).parameters.values()
    pm = ParallelModule(
        layouts,
        lambda name: state[name].detach().to(made.dtypes[name]),
        buffers,
        mesh,
        Placing(made, layouts),
        made.roles.batch,
        axis_groups=groups_of(first),
        input_names=_input_names(model),
        var_keyword=any(p.kind is p.VAR_KEYWORD for p in takes),
        number_inputs=made.number_inputs,
        non_persistent=[name for name in buffers if name not in persistent],
        origin=model,
        empty=empty,
        roles=made.roles,
        changes=made.changes,
        options=made.options,
    )
    pm.train(model.training)
    pm.make_ready(call, model.training, around)  # so that there is a graph to look at before the first call
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
    if isinstance(given, Mapping):
        return bind((), given, _input_names(model))
    if isinstance(given, (tuple, list)):
        return bind(given, {}, _input_names(model))
    raise ConfigError(
        f"example_inputs is a {type(given).__name__}; pass a dict of keyword arguments or a tuple of "
        "positional ones"
    )


def _input_names(model: nn.Module) -> list[str]:
    """The arguments of forward that a call may give by place."""
    parameters = inspect.signature(model.forward).parameters
    return [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
