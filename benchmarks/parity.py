"""Every model on every mesh against the single device: `make parity`, which writes docs/parity.md.

    python benchmarks/parity.py --out docs/parity.md [--models mixtral,llama] [--meshes "tp=2;ep=2,tp=2"]
    [--dtype float32]

Each model is traced once; each pair is compiled once and its ranks are forked. Exit status 1 where a pair
fails.

    python benchmarks/parity.py --savings --out docs/parity-savings.md

runs the savings instead: four models (one with a capacity) on the meshes that have something to save, each
saving alone, none, and all of them.

    python benchmarks/parity.py --zero --out docs/parity-zero.md

runs ZeRO's stages: 5 steps of `tedfx.optim.ShardedOptimizer` against torch's AdamW on one device, tiled and
not, stage 3 also recomputed and compiled. `--rows FILE` keeps the rows as JSON lines: a run that is cut off
goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
import warnings
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks are forked, and a forked process cannot start CUDA
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from tabulate import tabulate  # noqa: E402

from tedfx.errors import TedfxError  # noqa: E402
from tedfx.verification.verdict import TOLERANCES
from tedfx.verification.verify import versions

MODELS = [
    "mixtral",
    "qwen3_moe",
    "qwen2_moe",
    "olmoe",
    "deepseek_v3",
    "gpt_oss",
    "llama",
    "llama tied",
    "plain",
    "plain_boolean",
    "plain_stacked",
]
DENSE = {"llama", "llama tied"}
MESHES = ["dp=2", "tp=2", "ep=2", "tp=4", "dp=2,tp=2", "dp=2,ep=2", "ep=2,tp=2", "dp=2,ep=2,tp=2"]
MESHES += ["tp=2 expert=tp", "tp=4 expert=tp", "ep=2,tp=2 expert=ep+tp", "dp=1,ep=2,tp=2", "tp=2,ep=2"]

PLAIN = {"dedup": False, "sequence_parallel": False, "algebra": False}
SAVINGS = {
    "defaults": {},
    "none, TED's own order": PLAIN,
    "dedup alone": PLAIN | {"dedup": True},
    "algebra alone": PLAIN | {"algebra": True},
    "sequence parallelism alone": PLAIN | {"sequence_parallel": True},
    "defaults, comm": {"checkpoint": "comm"},
    "defaults, full": {"checkpoint": "full"},
    "defaults, selective": {"checkpoint": "selective"},
}
SAVED_MODELS = ["mixtral", "deepseek_v3", "gpt_oss", "capacity_gshard"]
SAVED_MESHES = ["ep=2,tp=2", "dp=2,ep=2,tp=2", "tp=2", "tp=2 expert=tp", "ep=2,tp=2 expert=ep+tp"]

TILE = 500  # elements: cuts stacks of experts on every mesh, and matrices where their shares are larger
STAGES = {
    f"{stage}, {name}": {"zero": stage, "sharded": {"tile": tile}}
    for stage in range(4)
    for name, tile in (("tiled", TILE), ("untiled", None))
}
STAGES |= {
    "3, untiled, comm": {"zero": 3, "sharded": {"tile": None}, "checkpoint": "comm"},
    "3, untiled, compiled (aot_eager)": {"zero": 3, "sharded": {"tile": None}, "compile": "aot_eager"},
}


STAGED = (
    "The mesh steps with `tedfx.optim.ShardedOptimizer` over AdamW, the single device with "
    f"`torch.optim.AdamW`. Tiled: {TILE} elements are updated at a time, so that stacks of experts are "
    "cut on every mesh; untiled: every parameter whole. "
    "Compiled is `torch.compile(fullgraph=True)` with the backend aot_eager: forward and backward as "
    "the partitioner cuts them, without inductor's kernels, whose compilation takes minutes per rank on "
    "a CPU."
)


@dataclasses.dataclass(frozen=True)
class Set:
    """What a run goes through: a column of `switches` where there is more than one."""

    flag: str
    out: str
    models: list[str]
    meshes: list[str]
    column: str
    switches: dict[str, dict]
    steps: int = 3


EVERYTHING = Set("", "docs/parity.md", MODELS, MESHES, "", {"defaults": {}})
SETS = [
    Set("savings", "docs/parity-savings.md", SAVED_MODELS, SAVED_MESHES, "savings", SAVINGS),
    Set(
        "zero",
        "docs/parity-zero.md",
        ["mixtral", "deepseek_v3"],
        ["ep=2,tp=2", "dp=2,ep=2,tp=2"],
        "stage",
        STAGES,
        steps=5,
    ),
]


@dataclasses.dataclass
class Line:
    model: str
    mesh: str
    switches: str
    verdict: str
    errors: list[float]
    seconds: float

    @property
    def ok(self) -> bool:
        return self.verdict == "ok"


def make_case(model: str, mesh: str, dtype: str, switches: dict, steps: int):
    from tests.parity.cases import case

    axes, _, roles = mesh.partition(" ")
    roles = {
        role: tuple(names.split("+")) for role, _, names in (word.partition("=") for word in roles.split())
    }
    name, _, tied = model.partition(" ")
    return case(
        name,
        axes,
        roles=roles,
        overrides={"tie_word_embeddings": True} if tied else {},
        dtype=dtype,
        steps=steps,
        **switches,
    )


def applies(model: str, mesh: str) -> bool:
    """A dense model has no expert axes."""
    return model not in DENSE or not any(word in mesh for word in ("ep=", "expert="))


def run(model: str, mesh: str, dtype: str, name: str, which: Set) -> Line:
    from tests.parity.cases import verified

    start = time.perf_counter()
    try:
        result = verified(make_case(model, mesh, dtype, which.switches[name], which.steps))
        verdict = (
            "ok" if result.ok else "FAIL: " + ", ".join(row.quantity for row in result.rows if not row.ok)
        )
        errors = [row.error for row in result.rows[:4]]
    except (TedfxError, TimeoutError, RuntimeError) as error:
        verdict, errors = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", []
    return Line(model, mesh, name, verdict, errors, time.perf_counter() - start)


def write(lines: list[Line], which: Set, dtype: str, path: Path) -> None:
    tolerance = TOLERANCES[getattr(torch, dtype)]
    failed = [line for line in lines if not line.ok]
    columns = ["loss", "gradient norm", "gradients", "parameters"]
    limits = [tolerance.loss, tolerance.norm, tolerance.gradients, tolerance.parameters]
    worst = [
        [name, f"{limit:.0e}", f"{found[0]:.1e}", found[1]]
        for i, (name, limit) in enumerate(zip(columns, limits))
        if (found := _worst(lines, i))
    ]
    several, seconds = bool(which.column), sum(line.seconds for line in lines)
    pairs = [
        [
            line.model,
            line.mesh,
            *[line.switches] * several,
            *(f"{e:.1e}" for e in line.errors),
            *[""] * (4 - len(line.errors)),
            line.verdict,
        ]
        for line in lines
    ]
    text = [
        "# Parity",
        "",
        "Written by "
        f"{f'`python benchmarks/parity.py --{which.flag}`' if which.flag else '`make parity` (`benchmarks/parity.py`)'}. "
        ""
        f"{versions()}, {dtype}, gloo ranks on the CPU, {seconds / 60:.0f} minutes.",
        "",
        "Each pair trains the unmodified model on the whole global batch on one device (eager experts) "
        "and `tedfx.parallelize`'s module on local ranks, in the same "
        f"run: {which.steps} AdamW steps with clipping, each with the rows on other ranks and another "
        "learning rate. Loss, gradient norm as `clip_grad_norm_` returns it, every parameter's "
        "gradient (here of the "
        "first step; those of the others, and buffers, are part of the verdict), every parameter after "
        "the last step, replicas bit by bit. The auxiliary loss is on where the model has one; 30% of "
        "the labels in the first half of the rows are -100, and all but one in the second half. An "
        "error is the norm of the difference over the larger of the reference's norm and 1e-6 of the "
        "total norm; of gradients and parameters the worst one counts. "
        "The models compute some steps in float32 whatever their dtype (softmax, norms, the loss), "
        "which is where the errors come from.",
        "",
        *([STAGED, ""] if which.flag == "zero" else []),
        f"{len(lines) - len(failed)} of {len(lines)} pairs pass.",
        "",
        tabulate(
            worst, ["worst of all", "allowed", "error", "where"], tablefmt="github", disable_numparse=True
        ),
        "",
        tabulate(
            pairs,
            ["model", "mesh", *[which.column] * several, *columns, "verdict"],
            tablefmt="github",
            disable_numparse=True,
        ),
        "",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text))


def _worst(lines: list[Line], index: int):
    found = [(line.errors[index], f"{line.model} on {line.mesh}") for line in lines if line.errors]
    return max(found, default=None)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="default docs/parity.md, docs/parity-savings.md or docs/parity-zero.md"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--savings", action="store_true", help="each saving alone, none and all")
    only.add_argument("--zero", action="store_true", help="ZeRO's stages, tiled and not, after 5 steps")
    parser.add_argument(
        "--rows", type=Path, help="JSON lines: rows that the file has are taken from it, the others added"
    )
    parser.add_argument("--models", help="comma-separated; `llama tied` has tied embeddings")
    parser.add_argument("--meshes", help="semicolon-separated; roles after a blank: `ep=2,tp=2 expert=ep+tp`")
    parser.add_argument("--dtype", default="float64", choices=["float64", "float32"])
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    which = next((each for each in SETS if getattr(args, each.flag)), EVERYTHING)
    models = args.models.split(",") if args.models else which.models
    meshes = [m.strip() for m in args.meshes.split(";")] if args.meshes else which.meshes
    out = args.out or Path(which.out)
    pairs = [
        (model, mesh, name)
        for model in models
        for mesh in meshes
        if applies(model, mesh)
        for name in which.switches
    ]
    done = (
        [Line(**json.loads(line)) for line in args.rows.read_text().splitlines()]
        if args.rows and args.rows.exists()
        else []
    )
    done, lines = {(line.model, line.mesh, line.switches): line for line in done}, []
    for number, (model, mesh, name) in enumerate(pairs, 1):
        before = done.get((model, mesh, name))
        lines.append(before or run(model, mesh, args.dtype, name, which))
        if args.rows and not before:
            with args.rows.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(lines[-1])) + "\n")
        worst = f"worst gradient {lines[-1].errors[2]:.1e}, " if lines[-1].errors else ""
        print(
            f"[{number}/{len(pairs)}] {model} on {mesh}, {name}: {lines[-1].verdict} "
            f"({worst}{lines[-1].seconds:.0f} s)",
            flush=True,
        )
    write(lines, which, args.dtype, out)
    failed = [line for line in lines if not line.ok]
    print(f"{len(lines) - len(failed)} of {len(lines)} pairs pass; written to {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
