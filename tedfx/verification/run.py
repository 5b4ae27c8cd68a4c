"""What a verification runs, on the single device and on a rank, and how the two are compared.

Both train the same weights on the same global batches, another one in each step: AdamW steps with clipping,
and a learning rate that a scheduler changes. Kept of it: loss and gradient norm (as `clip_grad_norm_` returns
it) of every step, gradients and buffers of the first and the last (of all where they are small), the
parameters after the last, and on each rank a digest of every piece of state it holds, by which replicas are
compared bit by bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tedfx._torch import pytree
from tedfx.dtypes import cast_module
from tedfx.errors import ConfigError
from tedfx.frontends.answers import skippable
from tedfx.graph.draws import draws
from tedfx.optim import ShardedOptimizer
from tedfx.options import Options
from tedfx.placement.roles import MeshShape, Roles
from tedfx.trace.export import trace
from tedfx.trace.global_graph import Trace
from tedfx.trace.precision import cast_model, cast_parameters, parameter_dtypes
from tedfx.verification.authored import as_authored
from tedfx.verification.batches import Batches, split_batch, step_batches
from tedfx.verification.errors import digests
from tedfx.verification.widened import widened

KEPT = 2**24  # elements of gradients over all steps: up to that many those of every step are compared


@dataclass(frozen=True)
class Recipe:
    """How to train: the same on the single device and on every rank. sharded: options of the
    `ShardedOptimizer` that ranks step with; None: torch's own AdamW, where ZeRO's stage lets it. options:
    what ranks ask `parallelize` for; of it the single device has the precision. widen: float32 parts of the
    model are float64, see `tedfx.verification.widened`."""

    steps: int = 5
    learning_rate: float = 1e-3
    max_norm: float = 1.0
    dtype: torch.dtype = torch.float64
    seed: int = 0
    sharded: Mapping[str, Any] | None = None
    options: Options = Options()
    widen: bool = False

    def make(self, factory: Callable[[], Any]) -> tuple[nn.Module, dict[str, Any] | None]:
        """(the model, the global batch if the factory gives one)."""
        torch.manual_seed(self.seed)
        with widened(self.widen):
            made = factory()
        model, batch = made if isinstance(made, tuple) else (made, None)
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"the model factory returned a {type(model).__name__}, not a torch.nn.Module (or a "
                "tuple of one and a dict of inputs)"
            )
        return cast_module(model, self.dtype).train(), batch


@dataclass
class Outcome:
    """What a run is judged by. On ranks other than the first, gradients, buffers and parameters are left
    out. by_itself: the plain model ran, not `parallelize`'s module."""

    losses: list[float]
    norms: list[float]
    gradients: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # by step, from 1 on; so buffers
    buffers: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    digests: dict[tuple, str] = field(default_factory=dict)
    global_loss: bool = True
    batch_index: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    by_itself: bool = True


def rate_of_step(step: int) -> float:
    """Factor of the learning rate: no two steps in a row have the same."""
    return (1.0, 0.25, 2.0, 0.5)[step % 4]


def objective(output: Any) -> tuple[Tensor, bool]:
    """(loss, whether it is that of the global batch). Without a loss: the sum of squares of the first output,
    rank by rank."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    first = next(
        (x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()), None
    )
    if loss is None and first is not None and first.dim() == 0:
        loss = first
    if loss is not None:
        return loss, True
    if first is None:
        raise ConfigError(
            f"the model's output ({type(output).__name__}) has neither a loss nor another float tensor "
            "to make one of"
        )
    return first.square().sum(), False


# ---- the two runs ------------------------------------------------------------------------------------------


def in_groups(model: nn.Module, batch: Mapping[str, Any], groups: int) -> Callable:
    """The single-device function of `capacity="local"`: the model's own graph, its tokens in groups with a
    capacity each; the model where that is the same."""
    from tedfx.passes.base import run_pipeline
    from tedfx.passes.capture_capacity import CaptureCapacity
    from tedfx.passes.capture_loops import CaptureLoops
    from tedfx.passes.capture_scattered import CaptureScattered
    from tedfx.passes.functionalize import Functionalize
    from tedfx.passes.local_capacity import LocalCapacity
    from tedfx.stages.graphs import GlobalGraph

    traced = trace(model, kwargs=dict(batch))
    grouped = run_pipeline(
        GlobalGraph.of(traced),
        [Functionalize(), CaptureLoops(), CaptureCapacity(), CaptureScattered(), LocalCapacity(groups)],
    )
    return functools.partial(grouped.trace, model) if grouped.history[-1].result.changes else model


def train_reference(
    model: nn.Module,
    batch: Batches,
    recipe: Recipe,
    device: str = "cpu",
    groups: int = 1,
    zeros: Collection[str] = (),
) -> Outcome:
    """The unmodified model on the whole global batch; with `groups`, see `in_groups`. `zeros`: parameters
    whose gradient is zero where the model leaves none, those of experts that its loop skips: the optimizer
    steps them all the same, as it does on the mesh."""
    start = time.perf_counter()
    cast_model(model, recipe.options.precision).to(device)
    batches = _on(device, step_batches(batch, recipe.steps))
    with as_authored(model), widened(recipe.widen):
        call = model if groups == 1 else in_groups(model, batches[0], groups)
        kept = lambda: (
            {
                n: p.grad.detach().cpu().clone()
                for n, p in model.named_parameters(remove_duplicate=False)
                if p.grad is not None
            },
            {n: b.detach().cpu().clone() for n, b in model.named_buffers()},
        )
        outcome = _train(model, batches, recipe, kept, call, zeros=zeros)
    outcome.parameters = {n: p.detach().cpu() for n, p in model.named_parameters(remove_duplicate=False)}
    outcome.seconds = {"run": time.perf_counter() - start}
    return outcome


def train_single(
    rank,
    model,
    batch: Batches,
    recipe: Recipe,
    shape: MeshShape,
    call: Mapping[str, Any],
    groups: int,
    traced: Trace | None,
) -> Outcome:
    """The oracle, in a group of one rank: the unmodified model, or `train_alone` where it draws random
    numbers. Arguments as of `train_rank`; `traced`: what the parent traced."""
    if not isinstance(model, nn.Module):
        model, _ = recipe.make(model)
    if traced is None:
        with cast_parameters(model, parameter_dtypes(model, recipe.options.precision), values=False):
            traced = trace(model, kwargs=dict(call["example_inputs"]), device=rank.device)
    if not any(draws(node) for node in traced.graph_module.graph.nodes):
        return train_reference(model, batch, recipe, rank.device, groups, skippable(traced))
    if groups > 1:
        raise ConfigError(
            "capacity='local' on several batch coordinates of a model that draws random numbers: one rank "
            "has no such groups to compare with; verify with capacity='global', or without draws"
        )
    return train_alone(rank, model, batch, recipe, shape, call, traced)


def train_alone(
    rank,
    model: nn.Module,
    batch: Batches,
    recipe: Recipe,
    shape: MeshShape,
    call: Mapping[str, Any],
    traced: Trace,
) -> Outcome:
    """`parallelize`'s module on a mesh of this one rank, with the axes of `shape`: the oracle of a model that
    draws, since torch's generator has another stream. Of the options it has the precision alone."""
    one = MeshShape(shape.names, (1,) * len(shape.names))
    options = Options(precision=recipe.options.precision)
    prepared = prepare(model, traced, Roles.resolve(one, call["roles"]), options, call["example_inputs"])
    recipe = dataclasses.replace(recipe, options=options)
    outcome = train_rank(rank, model, batch, recipe, one, call, [prepared])
    outcome.by_itself = False
    return outcome


def _on(device, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, dict(batch))
        for batch in batches
    ]


def _train(
    module,
    batches: Sequence[Mapping[str, Any]],
    recipe: Recipe,
    state: Callable[[], tuple[dict, dict]],
    call: Callable | None = None,
    sharded: Mapping[str, Any] | None = None,
    zeros: Collection[str] = (),
) -> Outcome:
    """`state`: (gradients, buffers) by name. `sharded`: the module's optimizer is tedfx's, which ZeRO's
    stages 1 and 2 need, with these options. `zeros`: see `train_reference`."""
    own = (
        None
        if sharded is None
        else ShardedOptimizer(
            module, torch.optim.AdamW, lr=recipe.learning_rate, max_norm=recipe.max_norm, **sharded
        )
    )
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate) if own is None else own
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_of_step)
    small = sum(p.numel() for p in module.parameters()) * recipe.steps <= KEPT
    outcome = Outcome([], [])
    for step, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        loss, outcome.global_loss = objective((call or module)(**batch))
        loss.backward()
        for parameter in map(module.get_parameter, zeros):
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        if small or step in (1, recipe.steps):
            outcome.gradients[step], outcome.buffers[step] = state()
        if own is None:
            norm = torch.nn.utils.clip_grad_norm_(module.parameters(), recipe.max_norm)
            optimizer.step()
        else:
            own.step()
            norm = own.grad_norm
            assert norm is not None  # it clips
        schedule.step()
        outcome.losses.append(float(loss.detach()))
        outcome.norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
    return outcome


def train_rank(
    rank,
    model,
    batch: Batches,
    recipe: Recipe,
    shape: MeshShape,
    call: Mapping[str, Any],
    prepared=(),
    before=None,
) -> Outcome:
    """One rank's part. `model`: the module, or what makes it. `call`: `parallelize`'s roles and
    example_inputs.

    `prepared`: what the parent already compiled. `before`: called first with the rank's number.
    """
    if before is not None:
        before(rank.index)
    if not isinstance(model, nn.Module):
        model, _ = recipe.make(model)
    torch.manual_seed(recipe.seed)  # draws are a function of it
    start = time.perf_counter()
    with widened(recipe.widen), on_mesh(rank, model, shape, recipe.options, prepared, **call) as pm:
        built = time.perf_counter()
        index, count = pm.batch_coordinate
        rules = next(iter(pm.programs.values())).call
        assert rules is not None  # what `parallelize` compiles has them
        rows = rules.batch_inputs
        local = _on(
            pm.device, [split_batch(each, index, count, rows) for each in step_batches(batch, recipe.steps)]
        )
        sharded = {} if recipe.sharded is None and recipe.options.zero in (1, 2) else recipe.sharded
        kept = lambda: (
            _on_first(rank, pm.gather_gradients()),
            _on_first(rank, {n: b.detach().clone() for n, b in pm.named_buffers()}),
        )
        outcome = _train(pm, local, recipe, kept, sharded=sharded)
    outcome.parameters = _on_first(rank, pm.gather_parameters())
    outcome.batch_index = index
    outcome.digests = digests(pm)
    if outcome.global_loss:
        outcome.digests.update(
            {(f"loss of step {i + 1}", ()): value.hex() for i, value in enumerate(outcome.losses)}
        )
    outcome.digests.update(
        {(f"gradient norm of step {i + 1}", ()): value.hex() for i, value in enumerate(outcome.norms)}
    )
    outcome.seconds = {"build": built - start, "run": time.perf_counter() - built}
    return outcome


def _on_first(rank, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.cpu() for name, t in tensors.items()} if rank.index == 0 else {}


@contextlib.contextmanager
def on_mesh(rank, model: nn.Module, shape: MeshShape, options: Options, prepared=(), **call):
    """This rank's ParallelModule on a new mesh. `call`: more of `parallelize`'s own keywords."""
    from torch.distributed.device_mesh import init_device_mesh

    from tedfx.api import parallelize

    mesh = init_device_mesh(rank.device, shape.sizes, mesh_dim_names=shape.names)
    if "check_timeout" not in options.given:
        options = options.replace(check_timeout=rank.timeout / 2)
    yield parallelize(model, mesh, options=options, traces=prepared, **call)


# ---- compile once, fork the ranks --------------------------------------------------------------------------


def prepare(
    model: nn.Module,
    traced: Trace,
    roles: Roles,
    options: Options,
    example: Mapping[str, Any] | None = None,
    check: bool = False,
):
    """The compilation that every rank would make, made once: the graph is the same on all of them. `example`:
    one rank's call. `check`: with the capture check, which runs the model here."""
    from tedfx.compiler import compile_graph, example_sizes
    from tedfx.stages.graphs import GlobalGraph

    trainable = {
        placeholder
        for placeholder, name in traced.parameters.items()
        if model.get_parameter(name).requires_grad
    }
    return compile_graph(
        GlobalGraph.of(
            traced,
            roles,
            trainable,
            example=example_sizes(traced, example or {}),
            options=options,
            model=model if check else None,
            dtypes=parameter_dtypes(model, options.precision),
        )
    )


def unequal_replicas(outcomes: Sequence[Outcome]) -> list[str]:
    """Names of state that two ranks hold the same piece of with different bits."""
    first: dict[tuple, str] = {}
    different = {}
    for outcome in outcomes:
        for key, digest in outcome.digests.items():
            if first.setdefault(key, digest) != digest:
                different[key[0]] = None
    return list(different)
