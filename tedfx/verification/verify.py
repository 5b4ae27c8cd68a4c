"""Proof as a product: the unmodified model on a single device and its ranks on a mesh, in one go, side by
side.

`verify(model_factory, mesh)` makes the model, trains it for a few AdamW steps with clipping on whole global
batches on one device (the library's eager experts), trains `parallelize`'s module on local ranks, and
compares loss and gradient norm of every step, every parameter's gradient and every buffer (of all steps, or
of the first and the last), and every parameter after the steps; replicas must agree bit by bit. Every step
has another batch and another learning rate, so that state that should move shows, and the first step that
differs is named. On the command line: `tedfx verify mixtral --mesh dp=2,ep=2,tp=2`.

An error is the norm of the difference over the larger of the reference's norm and 1e-6 of the total norm.
`TOLERANCES` says what is asked of each dtype; in bfloat16 one rounding is 4e-3 and near-ties may route
elsewhere, so that is a check of scale alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tedfx._version import __version__
from tedfx.dtypes import check_precision
from tedfx.errors import ConfigError
from tedfx.options import Options
from tedfx.placement.roles import MeshShape, Roles
from tedfx.trace.export import trace
from tedfx.trace.precision import cast_parameters, parameter_dtypes
from tedfx.verification import processes
from tedfx.verification.batches import SEQUENCE, Batches, check_batch, make_batch, split_batch
from tedfx.verification.run import Recipe, prepare, train_rank, train_single
from tedfx.verification.verdict import TOLERANCES, WIDENED, Tolerance, VerifyResult, compare
from tedfx.verification.widened import widened


def verify(
    model_factory: Callable[[], nn.Module],
    mesh_shape: Mapping[str, int] | str,
    *,
    roles: Mapping[str, Sequence[str]] | None = None,
    dtype: torch.dtype | None = None,
    steps: int = 5,
    batch: int | Mapping[str, Any] | None = None,
    sequence: int | None = None,
    device: str | None = None,
    backend: str | None = None,
    seed: int = 0,
    timeout: float = 300.0,
    tolerance: Tolerance | None = None,
    widen: bool = False,
    before: Callable[[int], None] | None = None,
    options: Options | None = None,
    **given,
) -> VerifyResult:
    """Compare `parallelize(model_factory(), mesh)` with the model on one device, on ranks that this call
    starts and ends.

    model_factory  makes the single-device model; called with `seed` set. One that draws random numbers
                   (dropout, a noisy router) is compared with `parallelize`'s module on a mesh of one rank:
                   the two draw the same, and torch's generator does not.
    mesh_shape     axis name -> size, or "dp=2,ep=2,tp=2".
    dtype          of the model as it is made: float64, or float32 under precision=.
    steps          AdamW steps, each with another learning rate.
    batch          rows of the global batch (default: 8, or 2 per batch rank), made anew for every step, or
                   the global batch itself as forward's keyword arguments, whose rows are turned from step to
                   step; a factory that returns (model, inputs) gives it as well. Random labels are -100 in
                   about a third of the first half of the rows and in all but one place of the second.
    sequence       tokens of a row of a batch that is made (default: 12, or the least that the trace of these
                   holds for where that is more).
    device         "cpu" or "cuda"; default: cuda where there is a GPU per rank. backend: nccl on cuda, else
                   gloo.
    widen          compute in float64 what a float64 model computes in float32 whatever its dtype, on the
                   single device and on the mesh: what then differs is no rounding
                   (`tedfx.verification.widened`), and the tolerance is `verdict.WIDENED`.
    before         called in each rank first, with its number: a place to break something and see it found.
    options        a `tedfx.Options`; each of its fields is a keyword here as well, as of `parallelize`. The
                   single device's parameters are cast to its precision, and the tolerance is that of this
                   dtype. A budget is for the rows of one rank. With capacity "local" the single device runs
                   the model's own graph with its tokens in as many groups as the mesh has batch coordinates
                   (`tedfx.verification.run.in_groups`). With zero 1 and 2 the mesh steps with
                   `tedfx.optim.ShardedOptimizer`.

    Raises ConfigError and its kin for what cannot be run, RankFailure (one line, naming the rank) for what
    did not end.
    """
    start = time.perf_counter()
    options = Options.collect(options, given, verify)
    shape = MeshShape.of(mesh_shape)
    resolved = Roles.resolve(shape, roles)
    parameters = check_precision(options.precision)
    dtype = dtype or (torch.float64 if parameters is None else torch.float32)
    if widen and (dtype != torch.float64 or parameters is not None):
        raise ConfigError("verify: widen is for a float64 model, without precision=")
    recipe = Recipe(steps=steps, dtype=dtype, seed=seed, options=options, widen=widen)
    tolerance = tolerance or (WIDENED if widen else TOLERANCES.get(parameters or dtype))
    if tolerance is None or steps < 1:
        raise ConfigError(
            f"verify: dtype is one of {', '.join(str(d).removeprefix('torch.') for d in TOLERANCES)} "
            "and steps at least 1"
        )
    device, backend = _place(shape.world, device, backend)
    fork = device == "cpu" and processes.can_fork()
    if fork and options.compile:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the ranks are the parallelism

    model, inputs = recipe.make(model_factory)
    if batch is None:
        batch = inputs or max(8, 2 * shape.size(resolved.batch))
    rows = batch if isinstance(batch, int) else None
    batches: Batches = (
        _made_batches(model, batch, sequence or SEQUENCE, steps, seed) if isinstance(batch, int) else batch
    )
    batch = batches if isinstance(batches, Mapping) else batches[0]
    check_batch(batch, resolved)
    if fork:
        cast = cast_parameters(model, parameter_dtypes(model, options.precision), values=False)
        with cast, widened(widen):
            traced = trace(model, kwargs=_example(batch), device=device)
        least = traced.least("sequence")
        if rows and sequence is None and least > SEQUENCE:
            batches = _made_batches(model, rows, least, steps, seed)
            batch = batches[0]
    example = _example(one_call(batch, options.checkpoint, shape.size(resolved.batch)))
    if fork:
        prepared = [prepare(model, traced, resolved, options, example)]
        source = model
        # The trace of a Function runs its backward. Where torch has a device, or counts one, that started a
        # thread.
        fork = processes.can_fork()
    if not fork:
        traced, prepared, source = None, [], model_factory
        _check_picklable(model_factory)
    call = {"roles": roles, "example_inputs": example}
    ranks = processes.jobs(
        train_rank,
        (source, batches, recipe, shape, call, prepared, before),
        shape.world,
        device,
        backend,
        timeout,
    )
    groups = shape.size(resolved.batch) if options.capacity == "local" else 1
    (single,) = processes.jobs(
        train_single,
        (source, batches, recipe, shape, call, groups, traced),
        1,
        device,
        backend,
        timeout,
        name="the single device",
    )
    reference, *outcomes = processes.run([single, *ranks], fork, timeout)

    name = (
        getattr(model_factory, "model_type", None)
        or getattr(model_factory, "path", None)
        or type(model).__name__
    )
    with_roles = "".join(
        f" {role}={'+'.join(axes) if not isinstance(axes, str) else axes}"
        for role, axes in (roles or {}).items()
    )
    precision = str(dtype).removeprefix("torch.") + (" throughout" if widen else "")
    title = (
        f"{name} on {shape}{with_roles}, {precision}, "
        f"{'compiled' if options.compile else 'eager'}{f', {options}' if str(options) else ''}, "
        f"{shape.world} ranks on {device} ({backend}){'' if reference.by_itself else ', against one rank'}"
    )
    result = compare(title, reference, outcomes, tolerance, steps)
    for made in prepared:
        found = [r.name for r in made.history if r.name in CAPTURING and r.result.changes]
        result.captured = (*["registry"] * bool(made.trace.captured), *found)
    result.notes.append(f"{versions()}; {time.perf_counter() - start:.0f} s")
    return result


CAPTURING = frozenset(
    (
        "capture_sorted",
        "capture_loops",
        "capture_capacity",
        "capture_scattered",
        "capture_choices",
        "capture_dense",
        "stack_experts",
    )
)


def _made_batches(model: nn.Module, rows: int, sequence: int, steps: int, seed: int) -> list[dict]:
    return [make_batch(model, rows, sequence, seed + 1000 * step) for step in range(steps)]


def one_call(batch: Mapping[str, Any], checkpoint: str, ranks: int) -> Mapping[str, Any]:
    """What stands for a rank's call while compiling. A budget counts its bytes; for all else any number of
    rows will do."""
    return split_batch(batch, 0, ranks) if checkpoint.startswith("budget") else batch


def _example(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if value is not None}


def _place(world: int, device: str | None, backend: str | None) -> tuple[str, str]:
    gpus = torch.cuda.device_count()
    if device is None:
        device = "cuda" if gpus >= world or (gpus and backend == "nccl") else "cpu"
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"verify runs on cpu or cuda, not {device!r}")
    if device == "cuda" and not gpus:
        raise ConfigError("device cuda: there is no GPU here; leave it out to run on the CPU")
    backend = backend or ("nccl" if device == "cuda" else "gloo")
    if backend == "nccl" and (device != "cuda" or gpus < world):
        raise ConfigError(
            f"backend nccl needs a GPU per rank: {gpus} here, {world} ranks; use --backend gloo, whose "
            "ranks may share one"
        )
    return device, backend


def _check_picklable(function) -> None:
    import pickle

    try:
        pickle.dumps(function)
    except Exception as error:  # whatever pickle raises
        raise ConfigError(
            f"the model factory cannot be sent to new processes ({error}); pass a top-level function, "
            "or call verify on the CPU in a process that never ran backward"
        ) from None


def versions() -> str:
    import platform

    words = [f"tedfx {__version__}", f"torch {torch.__version__}"]
    try:
        import transformers

        words.append(f"transformers {transformers.__version__}")
    except ImportError:
        pass
    return ", ".join([*words, f"Python {platform.python_version()}"])
