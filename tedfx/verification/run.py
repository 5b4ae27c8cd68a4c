"""What a verification runs, on the single device and on a rank, and how the two are compared.

Both train the same weights on the same global batches, another one in each step: AdamW steps with clipping,
and a learning rate that a scheduler changes. Kept of it: loss and gradient norm (as `clip_grad_norm_` returns
it) of every step, gradients and buffers of the first and the last (of all where they are small), the
parameters after the last, and on each rank a digest of every piece of state it holds, by which replicas are
compared bit by bit.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import inspect
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tedfx._torch import pytree
from tedfx.dtypes import cast_module, widest
from tedfx.errors import ConfigError
from tedfx.graph.signature import Path
from tedfx.optim import ShardedOptimizer
from tedfx.options import Options
from tedfx.placement.roles import MeshShape, Roles
from tedfx.trace.input_sizes import is_batch
from tedfx.trace.precision import cast_model, parameter_dtypes

IGNORED = -100  # a label that does not count
KEPT = 2**24  # elements of gradients over all steps: up to that many those of every step are compared


@dataclass(frozen=True)
class Recipe:
    """How to train: the same on the single device and on every rank. sharded: options of the
    `ShardedOptimizer` that ranks step with; None: torch's own AdamW, where ZeRO's stage lets it. options:
    what ranks ask `parallelize` for; of it the single device has the precision."""

    steps: int = 5
    learning_rate: float = 1e-3
    max_norm: float = 1.0
    dtype: torch.dtype = torch.float64
    seed: int = 0
    sharded: Mapping[str, Any] | None = None
    options: Options = Options()

    def make(self, factory: Callable[[], Any]) -> tuple[nn.Module, dict[str, Any] | None]:
        """(the model, the global batch if the factory gives one)."""
        torch.manual_seed(self.seed)
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
    out."""

    losses: list[float]
    norms: list[float]
    gradients: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # by step, from 1 on; so buffers
    buffers: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    digests: dict[tuple, str] = field(default_factory=dict)
    global_loss: bool = True
    batch_index: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


# ---- the global batch --------------------------------------------------------------------------------------


def make_batch(model: nn.Module, size: int, sequence: int, seed: int) -> dict[str, Tensor]:
    """Random token ids, and labels of which the first half of the rows keeps about 70% and the second half
    one in all.

    So over two batch ranks one has a single valid label, and over four or more some have none. A model that
    scores a row as a whole has a label per row, all valid (a number where it has one score), and padding at
    the end of every other row where it knows a padding id.
    """
    inputs = inspect.signature(model.forward).parameters
    if "input_ids" not in inputs:
        raise ConfigError(
            f"{type(model).__name__}.forward takes no input_ids: pass batch={{name: tensor}}, or let "
            "the factory return (model, inputs): the global batch"
        )
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(0, _vocabulary(model), (size, sequence), generator=generator)
    if "labels" not in inputs:
        return {"input_ids": ids}
    scores = _scores(model, ids[:2]) if inputs["labels"].default is not inspect.Parameter.empty else None
    if scores is not None and scores.dim() == 2:
        classes, padding = scores.shape[1], getattr(getattr(model, "config", None), "pad_token_id", None)
        labels = (
            torch.randint(0, classes, (size,), generator=generator)
            if classes > 1
            else torch.randn(size, generator=generator).to(scores.dtype)
        )
        if padding is None:
            return {"input_ids": ids, "labels": labels}
        ids[::2, sequence - sequence // 4 :] = padding
        masks = {"attention_mask": (ids != padding).long()} if "attention_mask" in inputs else {}
        return {"input_ids": ids, **masks, "labels": labels}
    known = ids if scores is None or scores.dim() < 2 else ids % scores.shape[-1]
    labels = torch.where(torch.rand(size, sequence, generator=generator) < 0.3, IGNORED, known)
    if size > 1:
        half = (size + 1) // 2
        labels[half:] = IGNORED
        labels[half, sequence // 2] = known[half, sequence // 2]
    return {"input_ids": ids, "labels": labels}


@torch.no_grad()
def _scores(model: nn.Module, ids: Tensor) -> Tensor | None:
    """What the model gives without labels: scores of tokens [rows, sequence, classes] or of rows [rows,
    classes]. A copy runs, so that nothing of the model moves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a process whose other threads have worked cannot be forked
    try:
        output = copy.deepcopy(model).eval()(input_ids=ids)
    # it may need more than ids; the labels are then those of tokens, and what is wrong shows where the model
    # is run
    except Exception:
        return None
    finally:
        torch.set_num_threads(threads)
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return (
        named
        if isinstance(named, Tensor)
        else next(
            (x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()), None
        )
    )


def _vocabulary(model: nn.Module) -> int:
    with contextlib.suppress(AttributeError, NotImplementedError):
        return model.get_input_embeddings().num_embeddings
    return min((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=2)


def split_batch(
    batch: Mapping[str, Any], index: int, count: int, inputs: Collection[Path] | None = None
) -> dict[str, Any]:
    """The share of batch coordinate `index` of `count`: rows of what has a batch dim. Scalars, positions of
    shape [S], masks of shape [S, S] are global and stay.

    inputs: paths of the inputs with a batch dim, where a trace has decided; else as the sizes say.
    """
    leaves, spec = pytree.tree_flatten(dict(batch))
    paths = [
        tuple(getattr(k, "key", getattr(k, "idx", getattr(k, "name", None))) for k in path)
        for path, _ in pytree.tree_flatten_with_path(dict(batch))[0]
    ]
    cut = is_batch(batch) if inputs is None else [path in inputs for path in paths]
    return pytree.tree_unflatten(
        [x.chunk(count)[index] if is_cut else x for x, is_cut in zip(leaves, cut)], spec
    )


Batches = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def step_batches(batch: Batches, steps: int) -> list[Mapping[str, Any]]:
    """The global batch of each step: as given, one for each, or one whose rows are another rank's in every
    step. Rows of size 1 stay."""
    if not isinstance(batch, Mapping):
        return [batch[i % len(batch)] for i in range(steps)]
    leaves, spec = pytree.tree_flatten(dict(batch))
    rows = is_batch(batch)
    return [
        spec.unflatten([x.roll(step, 0) if row else x for x, row in zip(leaves, rows)])
        for step in range(steps)
    ]


def rate_of_step(step: int) -> float:
    """Factor of the learning rate: no two steps in a row have the same."""
    return (1.0, 0.25, 2.0, 0.5)[step % 4]


def check_batch(batch: Mapping[str, Any], roles: Roles) -> None:
    mesh, axes = roles.mesh, roles.mesh.wide(roles.batch)
    count = mesh.size(roles.batch)
    rows = {x.shape[0] for x, is_cut in zip(pytree.tree_leaves(dict(batch)), is_batch(batch)) if is_cut}
    for size in sorted(rows):
        if size % count:
            over = ", ".join(f"{a}={mesh.size((a,))}" for a in axes)
            raise ConfigError(
                f"a batch of {size} cannot be split over the batch axes {over} ({count} ranks): use a "
                f"multiple of {count}, such as {-(-size // count) * count}"
            )


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


@contextlib.contextmanager
def as_authored(model: nn.Module):
    """The model in its authors' own form (Hugging Face: eager experts), as every frontend that knows it
    says."""
    from tedfx.frontends import default_frontends

    with contextlib.ExitStack() as stack:
        for frontend in default_frontends():
            if frontend.applies(model):
                stack.enter_context(frontend.reference(model))
        yield


def in_groups(model: nn.Module, batch: Mapping[str, Any], groups: int) -> Callable:
    """The single-device function of `capacity="local"`: the model's own graph, its tokens in groups with a
    capacity each; the model where that is the same."""
    from tedfx.passes.base import run_pipeline
    from tedfx.passes.capture_capacity import CaptureCapacity
    from tedfx.passes.functionalize import Functionalize
    from tedfx.passes.local_capacity import LocalCapacity
    from tedfx.stages.graphs import GlobalGraph
    from tedfx.trace.export import trace

    traced = trace(model, kwargs=dict(batch))
    grouped = run_pipeline(
        GlobalGraph.of(traced), [Functionalize(), CaptureCapacity(), LocalCapacity(groups)]
    )
    return functools.partial(grouped.trace, model) if grouped.history[-1].result.changes else model


def train_reference(
    model: nn.Module, batch: Batches, recipe: Recipe, device: str = "cpu", groups: int = 1
) -> Outcome:
    """The unmodified model on the whole global batch; with `groups`, see `in_groups`."""
    start = time.perf_counter()
    cast_model(model, recipe.options.precision).to(device)
    batches = _on(device, step_batches(batch, recipe.steps))
    with as_authored(model):
        call = model if groups == 1 else in_groups(model, batches[0], groups)
        kept = lambda: (
            {
                n: p.grad.detach().cpu().clone()
                for n, p in model.named_parameters(remove_duplicate=False)
                if p.grad is not None
            },
            {n: b.detach().cpu().clone() for n, b in model.named_buffers()},
        )
        outcome = _train(model, batches, recipe, kept, call)
    outcome.parameters = {n: p.detach().cpu() for n, p in model.named_parameters(remove_duplicate=False)}
    outcome.seconds = {"run": time.perf_counter() - start}
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
) -> Outcome:
    """`state`: (gradients, buffers) by name. `sharded`: the module's optimizer is tedfx's, which ZeRO's
    stages 1 and 2 need, with these options."""
    if sharded is not None:
        optimizer = ShardedOptimizer(
            module, torch.optim.AdamW, lr=recipe.learning_rate, max_norm=recipe.max_norm, **sharded
        )
    else:
        optimizer = torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad], lr=recipe.learning_rate
        )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_of_step)
    small = sum(p.numel() for p in module.parameters()) * recipe.steps <= KEPT
    outcome = Outcome([], [])
    for step, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        loss, outcome.global_loss = objective((call or module)(**batch))
        loss.backward()
        if small or step in (1, recipe.steps):
            outcome.gradients[step], outcome.buffers[step] = state()
        norm = (
            None
            if sharded is not None
            else torch.nn.utils.clip_grad_norm_(module.parameters(), recipe.max_norm)
        )
        optimizer.step()
        schedule.step()
        norm = optimizer.grad_norm if sharded is not None else norm
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
    start = time.perf_counter()
    with on_mesh(rank, model, shape, recipe.options, prepared, **call) as pm:
        built = time.perf_counter()
        index, count = pm.batch_coordinate
        rows = next(iter(pm.programs.values())).call.batch_inputs
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


def digests(module: nn.Module) -> dict[tuple, str]:
    """{(name, coordinates on the axes that shard it): digest of the bits} of this rank's parameters,
    gradients and buffers."""
    found = {}
    for name, p in module.named_parameters():
        coordinate = p.device_mesh.get_coordinate()
        where = lambda placements: tuple(
            (axis, at)
            for axis, at, placed in zip(p.device_mesh.mesh_dim_names, coordinate, placements)
            if placed.is_shard()
        )  # noqa: B023, E731
        found[name, where(p.placements)] = _digest(p.detach().to_local())
        if p.grad is not None:
            found[f"gradient of {name}", where(p.grad.placements)] = _digest(p.grad.to_local())
    found.update(((name, ()), _digest(b.detach())) for name, b in module.named_buffers())
    return found


def _digest(tensor: Tensor) -> str:
    bits = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(bits.numpy().tobytes(), digest_size=16).hexdigest()


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
    trace,
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
        for placeholder, name in trace.parameters.items()
        if model.get_parameter(name).requires_grad
    }
    return compile_graph(
        GlobalGraph.of(
            trace,
            roles,
            trainable,
            example=example_sizes(trace, example or {}),
            options=options,
            model=model if check else None,
            dtypes=parameter_dtypes(model, options.precision),
        )
    )


# ---- comparing ---------------------------------------------------------------------------------------------


def relative(actual: float, expected: float) -> float:
    error = abs(actual - expected) / max(abs(expected), 1e-30)
    return error if error == error else float("inf")


def errors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Per name: norm of the difference over the larger of the reference's norm and 1e-6 of the total norm.

    A tensor that one side lacks counts as zero there.
    """
    norms = {name: widest(e).norm() for name, e in expected.items()}
    total = float(torch.stack(list(norms.values())).norm()) if norms else 0.0
    found = {}
    for name in {**expected, **actual}:
        a, e = actual.get(name), expected.get(name)
        difference = (widest(a) if e is None else widest(e) if a is None else widest(a) - widest(e)).norm()
        error = float(difference / max(float(norms.get(name, 0.0)), 1e-6 * total, 1e-300))
        found[name] = error if error == error else float("inf")
    return found


def unequal_replicas(outcomes: Sequence[Outcome]) -> list[str]:
    """Names of state that two ranks hold the same piece of with different bits."""
    first: dict[tuple, str] = {}
    different = {}
    for outcome in outcomes:
        for key, digest in outcome.digests.items():
            if first.setdefault(key, digest) != digest:
                different[key[0]] = None
    return list(different)
