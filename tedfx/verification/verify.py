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
from dataclasses import dataclass, field
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
from tedfx.verification import processes as verify_ranks
from tedfx.verification.run import (
    Batches,
    Outcome,
    Recipe,
    check_batch,
    errors,
    make_batch,
    prepare,
    split_batch,
    train_rank,
    train_reference,
    unequal_replicas,
)
from tedfx.verification.steps import compare_steps, where_they_part, worst


@dataclass(frozen=True)
class Tolerance:
    loss: float
    norm: float
    gradients: float
    parameters: float
    later: float = 1.0  # after the first step the parameters differ as well: how much more is allowed there


TOLERANCES = {
    torch.float64: Tolerance(1e-6, 1e-5, 1e-5, 1e-5),
    torch.float32: Tolerance(1e-5, 1e-4, 1e-4, 1e-3, later=10.0),
    torch.bfloat16: Tolerance(2e-2, 5e-2, 3e-1, 5e-2, later=3.0),
    torch.float16: Tolerance(5e-3, 2e-2, 1e-1, 2e-2, later=5.0),
}


@dataclass(frozen=True)
class Row:
    """One comparison. `reference` and `value` are for reading; `error` is what is judged."""

    quantity: str
    reference: str
    value: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class ParameterError:
    name: str
    shape: tuple[int, ...]
    gradient: float
    parameter: float


@dataclass
class VerifyResult:
    """`ok` is the verdict; `rows` the comparisons; `parameters` all of them, worst gradient first. `str()` is
    the table."""

    title: str
    rows: list[Row]
    parameters: list[ParameterError]
    notes: list[str] = field(default_factory=list)
    shown: int = 5
    first: str = ""  # the first comparison, in the order of the run, that failed

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def __getitem__(self, quantity: str) -> Row:
        return next(row for row in self.rows if row.quantity.startswith(quantity))

    def __str__(self) -> str:
        from tabulate import tabulate

        rows = [
            [
                r.quantity,
                r.reference,
                r.value,
                f"{r.error:.1e}",
                f"{r.tolerance:.0e}",
                "ok" if r.ok else "FAIL",
            ]
            for r in self.rows
        ]
        worst = [
            [p.name, "x".join(map(str, p.shape)), f"{p.gradient:.1e}", f"{p.parameter:.1e}"]
            for p in self.parameters[: self.shown]
        ]
        return "\n".join(
            [
                self.title,
                "",
                tabulate(
                    rows, ["", "single device", "this mesh", "error", "allowed", ""], disable_numparse=True
                ),
                "",
                tabulate(
                    worst, ["worst parameters", "shape", "gradient", "parameter"], disable_numparse=True
                ),
                "",
                *self.notes,
                "verified"
                if self.ok
                else "NOT VERIFIED: "
                + ", ".join(r.quantity for r in self.rows if not r.ok)
                + (f"\nthe first difference: {self.first}" if self.first else ""),
            ]
        )


def verify(
    model_factory: Callable[[], nn.Module],
    mesh_shape: Mapping[str, int] | str,
    *,
    roles: Mapping[str, Sequence[str]] | None = None,
    dtype: torch.dtype | None = None,
    steps: int = 5,
    batch: int | Mapping[str, Any] | None = None,
    sequence: int = 12,
    device: str | None = None,
    backend: str | None = None,
    seed: int = 0,
    timeout: float = 300.0,
    tolerance: Tolerance | None = None,
    before: Callable[[int], None] | None = None,
    options: Options | None = None,
    **given,
) -> VerifyResult:
    """Compare `parallelize(model_factory(), mesh)` with the model on one device, on ranks that this call
    starts and ends.

    model_factory  makes the single-device model; called with `seed` set. Dropout must be 0: the two draw
                   differently.
    mesh_shape     axis name -> size, or "dp=2,ep=2,tp=2".
    dtype          of the model as it is made: float64, or float32 under precision=.
    steps          AdamW steps, each with another learning rate.
    batch          rows of the global batch (default: 8, or 2 per batch rank), made anew for every step, or
                   the global batch itself as forward's keyword arguments, whose rows are turned from step to
                   step; a factory that returns (model, inputs) gives it as well. Random labels are -100 in
                   about a third of the first half of the rows and in all but one place of the second.
    device         "cpu" or "cuda"; default: cuda where there is a GPU per rank. backend: nccl on cuda, else
                   gloo.
    before         called in each rank first, with its number: a place to break something and see it found.
    options        a `tedfx.Options`; each of its fields is a keyword here as well, as of `parallelize`. The
                   single device's parameters are cast to its precision, and the tolerance is that of this
                   dtype. A budget is for the rows of one rank. With capacity "local" the single device runs
                   the model's own graph with its tokens in as many groups as the mesh has batch coordinates
                   (`verify_run.in_groups`). With zero 1 and 2 the mesh steps with
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
    recipe = Recipe(steps=steps, dtype=dtype, seed=seed, options=options)
    tolerance = tolerance or TOLERANCES.get(parameters or dtype)
    if tolerance is None or steps < 1:
        raise ConfigError(
            f"verify: dtype is one of {', '.join(str(d).removeprefix('torch.') for d in TOLERANCES)} "
            "and steps at least 1"
        )
    device, backend = _place(shape.world, device, backend)
    fork = device == "cpu" and verify_ranks.can_fork()
    if fork and options.compile:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the ranks are the parallelism

    model, inputs = recipe.make(model_factory)
    _check_dropout(model)
    if batch is None:
        batch = inputs or max(8, 2 * shape.size(resolved.batch))
    if isinstance(batch, int):
        batches: Batches = [make_batch(model, batch, sequence, seed + 1000 * step) for step in range(steps)]
        batch = batches[0]
    else:
        batches = batch
    check_batch(batch, resolved)

    example = _example(one_call(batch, options.checkpoint, shape.size(resolved.batch)))
    if fork:
        with cast_parameters(model, parameter_dtypes(model, options.precision), values=False):
            traced = trace(model, kwargs=_example(batch), device=device)
        prepared = [prepare(model, traced, resolved, options, example)]
        source = model
        # The trace of a Function runs its backward. Where torch has a device, or counts one, that started a
        # thread.
        fork = verify_ranks.can_fork()
    if not fork:
        prepared, source = [], model_factory
        _check_picklable(model_factory)
    ranks = verify_ranks.jobs(
        train_rank,
        (source, batches, recipe, shape, {"roles": roles, "example_inputs": example}, prepared, before),
        shape.world,
        device,
        backend,
        timeout,
    )
    single = verify_ranks.Job(
        "the single device",
        _reference,
        (source, batches, recipe, device, shape.size(resolved.batch) if options.capacity == "local" else 1),
    )
    reference, *outcomes = verify_ranks.run([single, *ranks], fork, timeout)

    name = (
        getattr(model_factory, "model_type", None)
        or getattr(model_factory, "path", None)
        or type(model).__name__
    )
    with_roles = "".join(
        f" {role}={'+'.join(axes) if not isinstance(axes, str) else axes}"
        for role, axes in (roles or {}).items()
    )
    title = (
        f"{name} on {shape}{with_roles}, {str(dtype).removeprefix('torch.')}, "
        f"{'compiled' if options.compile else 'eager'}{f', {options}' if str(options) else ''}, "
        f"{shape.world} ranks on {device} ({backend})"
    )
    result = compare(title, reference, outcomes, tolerance, steps)
    result.notes.append(f"{versions()}; {time.perf_counter() - start:.0f} s")
    return result


def compare(
    title: str, reference: Outcome, outcomes: Sequence[Outcome], tolerance: Tolerance, steps: int
) -> VerifyResult:
    """The verdict on the ranks' outcomes, given the single device's."""
    first = outcomes[0]
    losses = (
        first.losses
        if first.global_loss
        else [sum(values) for values in zip(*{o.batch_index: o.losses for o in outcomes}.values())]
    )
    gradients = errors(first.gradients[1], reference.gradients[1])
    parameters = errors(first.parameters, reference.parameters)
    table = [
        ParameterError(n, tuple(reference.parameters[n].shape), gradients.get(n, 0.0), parameters[n])
        for n in reference.parameters
    ]
    seen = compare_steps(reference, first, losses, tolerance)
    different = unequal_replicas(outcomes)
    shown = {"loss": (reference.losses, losses), "gradient norm": (reference.norms, first.norms)}

    def row(kind: str, quantity: str, later: bool) -> list[Row]:
        found = worst(
            seen, kind, lambda step: step > 1 if later else step == 1 or kind in ("parameters", "buffers")
        )
        if found is None:
            return [] if later or kind == "buffers" else [Row(quantity, "", "", float("inf"), 0.0)]
        its, mine = (
            (f"{values[found.step - 1]:.10g}" for values in shown[kind])
            if kind in shown
            else ("", found.name)
        )
        return [
            Row(
                quantity,
                its,
                mine if not later else f"{mine} (step {found.step})",
                found.error,
                found.allowed,
            )
        ]

    rows = [
        *row("loss", "loss", False),
        *row("gradient norm", "gradient norm", False),
        *row("gradients", "gradients, worst", False),
        *row("parameters", f"parameters after {steps} AdamW step{'s' if steps > 1 else ''}, worst", False),
        *row("loss", "later losses, worst", True),
        *row("gradient norm", "later gradient norms, worst", True),
        *row("gradients", "later gradients, worst", True),
        *row("buffers", "buffers, worst", False),
        Row(
            "replicas, bit by bit",
            "",
            f"{len(different)} differ: {different[0]}" if different else "all equal",
            float(len(different)),
            0.0,
        ),
    ]
    # Tied names are on the mesh alone; any other name there that the model lacks would be a bug.
    return VerifyResult(
        title, rows, sorted(table, key=lambda p: (-p.gradient, -p.parameter)), first=where_they_part(seen)
    )


def _reference(rank_model, batch, recipe: Recipe, device: str, groups: int) -> Outcome:
    model = rank_model if isinstance(rank_model, nn.Module) else recipe.make(rank_model)[0]
    return train_reference(model, batch, recipe, device, groups)


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


def _check_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        p = (
            getattr(module, "p", None)
            if isinstance(module, nn.modules.dropout._DropoutNd)
            else getattr(module, "attention_dropout", None)
        )
        if isinstance(p, (int, float)) and p > 0:
            raise ConfigError(
                f"{name} has dropout {p}: a single device draws other masks than a mesh; verify with "
                "dropout 0"
            )


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


__all__ = [
    "TOLERANCES",
    "ParameterError",
    "Row",
    "Tolerance",
    "VerifyResult",
    "compare",
    "verify",
    "versions",
]
