"""Programs against the oracle: the plain module trained on one device, in float64, for a few different steps.

`verdicts(runs)` takes (program, mesh) pairs and says of each one what became of it:

parity    losses, gradients and returned tensors of every step, and parameters and buffers after the last,
          agree to `TOLERANCE`
refused   `parallelize` or a call raised a TedfxError of one line, on all ranks
silent    something differs
crash     any other exception, a hang, or ranks of which only some refuse
invalid   the plain module itself fails: a mistake in the grammar

Each program is traced, compiled and checked once, here. The ranks are forked from this process, a few
programs at a time, and call `parallelize` with that compilation; so a program costs one trace.
"""

from __future__ import annotations

import multiprocessing
import random
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy
import torch
import torch._dynamo.config
from torch.distributed.device_mesh import init_device_mesh

import tests.fuzz.grammar  # noqa: F401  it fills the tables
from tedfx import parallelize
from tedfx.errors import TedfxError, TypeCheckError, user_line
from tedfx.options import Options
from tedfx.placement.roles import MeshShape, Roles
from tedfx.trace.export import trace
from tedfx.verification import processes as verify_ranks
from tedfx.verification.batches import split_batch
from tedfx.verification.errors import digests, errors
from tedfx.verification.run import prepare, unequal_replicas
from tests.fuzz.program import LOSSES, PIECES, Program, without

MESHES = {
    "dp2xtp2": (("dp", "tp"), (2, 2)),
    "ep2": (("ep",), (2,)),
    "ep2xtp2": (("ep", "tp"), (2, 2)),
    "dp2": (("dp",), (2,)),
    "tp2": (("tp",), (2,)),
}
TOLERANCE = 1e-6
RATES = (0.05, 0.02, 0.08, 0.01, 0.05)
CHUNK = 32  # programs per set of forked ranks
ENOUGH = 300  # programs that draw every kind
SHARE_OF_PARITY = 0.6
PATIENCE = 20.0  # seconds that a rank may take for a program before it counts as hanging


@dataclass
class Verdict:
    program: str  # the line that repeats it
    seed: int
    mesh: str
    outcome: str
    line: str = ""
    trace: str = ""
    kinds: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.outcome:8} {self.mesh:8} {self.program}" + (f"\n    {self.line}" if self.line else "")


Run = tuple[Program, str]


def default_runs(seeds: Sequence[int]) -> list[Run]:
    """Odd seeds have a mixture and run on ep2, even ones on dp2 x tp2, every twentieth of them on both."""
    runs = []
    for seed in seeds:
        program = Program(seed)
        runs += [
            (program, mesh)
            for mesh in ("dp2xtp2", "ep2")
            if (mesh == "ep2") == program.expert or (program.mixture and seed % 20 < 2)
        ]
    return runs


# ---- one training run, on a single device or a rank --------------------------------------------------------


def train(program: Program, module, model, trained, index: int = 0, count: int = 1) -> dict[str, Any]:
    """Losses, gradients and returned tensors by step, of rows `index` of `count`; `trained` is the model
    itself or its parallel module."""
    random.seed(program.seed)
    numpy.random.seed(program.seed)
    rng = random.Random(program.seed)
    # An expert that is skipped for want of tokens has no gradient on one device and one of zeros on ranks,
    # which AdamW tells apart.
    steps, adam = rng.choice((3, 3, 4)), rng.random() < 0.5 and "continue" not in program.source
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = (
        torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
        if adam
        else torch.optim.SGD(parameters, lr=0.1)
    )
    plain = trained is model
    found: dict[str, Any] = {"losses": [], "gradients": [], "outputs": []}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATES[step] * (0.2 if adam else 1.0)
        optimizer.zero_grad()
        output = trained(**split_batch(module.batch(step), index, count))
        loss = output["loss"] if isinstance(output, dict) else output
        loss.backward()
        gradients = (
            {n: p.grad for n, p in trained.named_parameters(remove_duplicate=False) if p.grad is not None}
            if plain
            else trained.gather_gradients()
        )
        found["losses"].append(float(loss.detach()))
        found["gradients"].append({n: g.detach().clone() for n, g in gradients.items()})
        found["outputs"].append(
            {k: v.detach().clone() for k, v in output.items() if k != "loss"}
            if isinstance(output, dict)
            else {}
        )
        optimizer.step()
        module.between(model, trained, step)
    state = dict(trained.named_parameters(remove_duplicate=False)) if plain else trained.gather_parameters()
    found["parameters"] = {n: p.detach().clone() for n, p in state.items()}
    found["buffers"] = {n: b.detach().clone() for n, b in trained.named_buffers()}
    return found


def _rank(rank, mesh: str, jobs: list, careful: bool) -> list[dict[str, Any]]:
    """Every program on one rank."""
    names, shape = MESHES[mesh]
    device_mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    outcomes = []
    for program, module, compilation in jobs:
        try:
            model = module.make()
            pm = parallelize(
                model,
                device_mesh,
                example_inputs=split_batch(module.batch(0), 0, _rows(mesh)),
                traces=[compilation],
                check_timeout=PATIENCE / 2,
            )
            index, count = pm.batch_coordinate
            outcome = train(program, module, model, pm, index, count)
            outcome["digests"], outcome["batch"] = digests(pm), index
            if rank.index:
                outcome["gradients"] = outcome["parameters"] = None
        except TedfxError as error:
            outcome = {"refused": str(error)}
        except Exception as error:  # a crash is a verdict
            if careful:
                raise
            outcome = {"crash": _line(error), "trace": traceback.format_exc()}
        outcomes.append(outcome)
    return outcomes


def _rows(mesh: str) -> int:
    names, shape = MESHES[mesh]
    return int(numpy.prod([n for name, n in zip(names, shape) if name != "tp"], initial=1))


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:300]} | at {user_line(error)}"


def what_is_lacking(found: Sequence[Verdict]) -> list[str]:
    """What `ENOUGH` programs must show besides parity or refusal.

    Refusing everything would pass that property; so would a grammar whose kinds are never drawn.
    """
    parity = [v for v in found if v.outcome == "parity"]
    lacking = []
    if len(parity) < SHARE_OF_PARITY * len(found):
        lacking.append(f"{len(parity)} of {len(found)} runs reach parity")
    reached = {kind for v in found if v.outcome in ("parity", "refused") for kind in v.kinds}
    left_out = without()
    wanted = {p.name for t in (PIECES, LOSSES) for p in t.values() if not {p.name, p.group} & left_out}
    if wanted - reached:
        lacking.append(f"never drawn, or never right: {', '.join(sorted(wanted - reached))}")
    return lacking


# ---- many programs -----------------------------------------------------------------------------------------


def verdicts(runs: Sequence[Run], chunk: int = CHUNK) -> list[Verdict]:
    """A verdict per run, in order. This process must be able to fork
    (`tedfx.verification.processes.can_fork`)."""
    torch.set_num_threads(1)
    torch._dynamo.config.fake_tensor_cache_enabled = (
        False  # programs have little in common: without it a trace takes a quarter less
    )
    made: dict[int, Verdict] = {}
    for mesh in dict.fromkeys(mesh for _, mesh in runs):
        mine = [i for i, (_, m) in enumerate(runs) if m == mesh]
        for first in range(0, len(mine), chunk):
            made.update(_chunk([(i, runs[i][0]) for i in mine[first : first + chunk]], mesh))
    return [made[i] for i in range(len(runs))]


def judged(runs: Sequence[Run], jobs: int) -> Iterator[tuple[Program, Verdict]]:
    """Each program with its verdict, in order: `jobs` processes take a chunk at a time."""
    chunks = [runs[first : first + CHUNK] for first in range(0, len(runs), CHUNK)]
    if min(jobs, len(chunks)) <= 1:
        every = map(verdicts, chunks)
    else:
        executor = ProcessPoolExecutor(min(jobs, len(chunks)), multiprocessing.get_context("spawn"))
        every = executor.map(_verdicts, [[(p.seed, p.keep, p.frame, m) for p, m in c] for c in chunks])
    for chunk, found in zip(chunks, every):
        yield from zip((program for program, _ in chunk), found)


def _verdicts(chunk: list[tuple]) -> list[Verdict]:
    warnings.filterwarnings("ignore")
    return verdicts([(Program(seed, keep, frame), mesh) for seed, keep, frame, mesh in chunk])


def _chunk(programs: list[tuple[int, Program]], mesh: str) -> dict[int, Verdict]:
    found, ready = {}, {}
    for i, program in programs:
        found[i] = verdict = Verdict(
            program.title, program.seed, mesh, "", kinds=tuple(program.kinds), groups=tuple(program.groups)
        )
        start = time.perf_counter()
        prepared = _prepare(program, mesh, verdict)
        if prepared is not None:
            ready[i] = (program, *prepared)
        verdict.seconds = time.perf_counter() - start
    start = time.perf_counter()
    jobs = [(program, module, compilation) for program, module, _, compilation in ready.values()]
    outcomes = _on_ranks(mesh, jobs) if jobs else []
    each = (time.perf_counter() - start) / max(len(ready), 1)
    for (i, (_, _, reference, _)), ranks in zip(ready.items(), outcomes):
        found[i].seconds += each
        found[i].outcome, found[i].line, found[i].trace = judge(reference, ranks)
    return found


def _prepare(program: Program, mesh: str, verdict: Verdict):
    """(the program's module, the oracle, the compilation), or None with the verdict filled."""
    try:
        module = program.load()
        model = module.make()
        reference = train(program, module, model, model)
        if not all(torch.isfinite(torch.tensor(reference["losses"]))):
            raise ValueError(f"losses {reference['losses']}")
    except Exception as error:
        verdict.outcome, verdict.line, verdict.trace = "invalid", _line(error), traceback.format_exc()
        return None
    try:
        model, example = module.make(), split_batch(module.batch(0), 0, _rows(mesh))
        roles = Roles.resolve(MeshShape.of(dict(zip(*MESHES[mesh]))))
        compilation = prepare(model, trace(model, kwargs=example), roles, Options(), example, check=True)
    except TypeCheckError as error:  # of tedfx's own passes, no refusal
        verdict.outcome, verdict.line, verdict.trace = "crash", _line(error), traceback.format_exc()
        return None
    except TedfxError as error:
        verdict.outcome, verdict.line = (
            ("refused", str(error))
            if "\n" not in str(error)
            else ("crash", f"a refusal of several lines: {error}")
        )
        return None
    except Exception as error:
        verdict.outcome, verdict.line, verdict.trace = "crash", _line(error), traceback.format_exc()
        return None
    return module, reference, compilation


def _on_ranks(mesh: str, jobs: list) -> list[list[dict]]:
    """Per job the outcomes of its ranks. Where ranks get out of step, each job runs again on ranks of its
    own."""
    world = int(numpy.prod(MESHES[mesh][1]))
    patience = PATIENCE + 2.0 * len(jobs)
    try:
        results = verify_ranks.run(
            verify_ranks.jobs(_rank, (mesh, jobs, len(jobs) == 1), world, "cpu", "gloo", patience),
            True,
            patience,
        )
    except verify_ranks.RankFailure as failure:
        if len(jobs) == 1:
            return [[{"crash": str(failure), "trace": failure.trace}]]
        return [_on_ranks(mesh, [job])[0] for job in jobs]
    return [list(ranks) for ranks in zip(*results)]


# ---- the verdict -------------------------------------------------------------------------------------------


def judge(reference: dict, ranks: list[dict]) -> tuple[str, str, str]:
    """(outcome, line, traceback) of what the ranks did, given the single device's."""
    crashed = next((r for r in ranks if "crash" in r), None)
    if crashed is not None:
        return "crash", crashed["crash"], crashed["trace"]
    refused = [r["refused"] for r in ranks if "refused" in r]
    if refused:
        if len(refused) < len(ranks):
            return "crash", f"{len(refused)} of {len(ranks)} ranks refuse: {refused[0]}", ""
        return (
            ("refused", refused[0], "")
            if "\n" not in refused[0]
            else ("crash", f"a refusal of several lines: {refused[0]}", "")
        )
    different = _differences(reference, ranks)
    return ("silent", "; ".join(different[:4]), "") if different else ("parity", "", "")


def _differences(reference: dict, ranks: list[dict]) -> list[str]:
    first, found = ranks[0], []
    for step, loss in enumerate(reference["losses"]):
        for rank, outcome in enumerate(ranks):
            error = abs(outcome["losses"][step] - loss) / max(abs(loss), 1e-3)
            if not error <= TOLERANCE:
                found.append(
                    f"step {step + 1}: loss {outcome['losses'][step]:.10g} on rank {rank}, {loss:.10g} "
                    "on one device"
                )
                break
        found += [
            f"step {step + 1}: gradient of {name} off by {error:.1e}"
            for name, error in _worst(first["gradients"][step], reference["gradients"][step])
        ]
        found += [
            f"step {step + 1}: output {name} {words}"
            for name, words in _outputs(
                reference["outputs"][step], [(r["batch"], r["outputs"][step]) for r in ranks]
            )
        ]
    found += [
        f"parameter {name} after the last step off by {error:.1e}"
        for name, error in _worst(first["parameters"], reference["parameters"])
    ]
    for rank, outcome in enumerate(ranks):
        found += [
            f"buffer {name} after the last step off by {error:.1e} on rank {rank}"
            for name, error in _worst(outcome["buffers"], reference["buffers"])
        ]
    found += [
        f"replicas of {name} differ"
        for name in unequal_replicas([SimpleNamespace(digests=r["digests"]) for r in ranks])
    ]
    return found


def _worst(actual: dict, expected: dict) -> list[tuple[str, float]]:
    wrong = {name: error for name, error in errors(actual, expected).items() if not error <= TOLERANCE}
    return sorted(wrong.items(), key=lambda item: -item[1])[:1]


def _outputs(expected: dict, ranks: list[tuple[int, dict]]) -> list[tuple[str, str]]:
    """Returned tensors: "rows_.." are cut along the batch, others are the same everywhere."""
    found = []
    for name, value in expected.items():
        if name.startswith("rows_"):
            pieces = {batch: outputs[name] for batch, outputs in reversed(ranks)}
            candidates = [torch.cat([pieces[i] for i in sorted(pieces)])]
        else:
            candidates = [outputs[name] for _, outputs in ranks]
        for actual in candidates:
            if actual.shape != value.shape or actual.dtype != value.dtype:
                found.append(
                    (
                        name,
                        f"is {actual.dtype}{list(actual.shape)}, {value.dtype}{list(value.shape)} on "
                        "one device",
                    )
                )
            elif not (error := errors({name: actual}, {name: value})[name]) <= TOLERANCE:
                found.append((name, f"off by {error:.1e}"))
            else:
                continue
            break
    return found
