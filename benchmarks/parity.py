"""Every model on every mesh against the single device: `make parity`, which writes docs/parity.md.

    python benchmarks/parity.py --out docs/parity.md [--models mixtral,llama] [--meshes "tp=2;ep=2,tp=2"] [--dtype float32]

Each model is traced once; each pair is compiled once and its ranks are forked. Exit status 1 where a pair fails.

    python benchmarks/parity.py --savings --out docs/parity-savings.md

runs the savings instead: four models (one with a capacity) on the meshes that have something to save, each saving alone, none, and all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from tedfx.verify import TOLERANCES, versions  # noqa: E402

MODELS = ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "deepseek_v3", "gpt_oss", "llama", "llama tied", "plain", "plain_boolean", "plain_stacked"]
DENSE = {"llama", "llama tied"}
MESHES = ["dp=2", "tp=2", "ep=2", "tp=4", "dp=2,tp=2", "dp=2,ep=2", "ep=2,tp=2", "dp=2,ep=2,tp=2"]
MESHES += ["tp=2 expert=tp", "tp=4 expert=tp", "ep=2,tp=2 expert=ep+tp", "dp=1,ep=2,tp=2", "tp=2,ep=2"]

PLAIN = {"dedup": False, "sequence_parallel": False, "algebra": False}
SAVINGS = {
    "defaults": {}, "none, TED's own order": PLAIN, "dedup alone": PLAIN | {"dedup": True}, "algebra alone": PLAIN | {"algebra": True},
    "sequence parallelism alone": PLAIN | {"sequence_parallel": True}, "defaults, comm": {"checkpoint": "comm"}, "defaults, full": {"checkpoint": "full"},
    "defaults, selective": {"checkpoint": "selective"},
}  # fmt: skip
SAVED_MODELS = ["mixtral", "deepseek_v3", "gpt_oss", "capacity_gshard"]
SAVED_MESHES = ["ep=2,tp=2", "dp=2,ep=2,tp=2", "tp=2", "tp=2 expert=tp", "ep=2,tp=2 expert=ep+tp"]


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


def make_case(model: str, mesh: str, dtype: str, switches: str):
    from tests.parity.cases import case

    axes, _, roles = mesh.partition(" ")
    roles = {role: tuple(names.split("+")) for role, _, names in (word.partition("=") for word in roles.split())}
    name, _, tied = model.partition(" ")
    return case(name, axes, roles=roles, overrides={"tie_word_embeddings": True} if tied else {}, dtype=dtype, **SAVINGS[switches])


def applies(model: str, mesh: str) -> bool:
    """A dense model has no expert axes."""
    return model not in DENSE or not any(word in mesh for word in ("ep=", "expert="))


def run(model: str, mesh: str, dtype: str, switches: str) -> Line:
    from tests.parity.cases import verified

    start = time.perf_counter()
    try:
        result = verified(make_case(model, mesh, dtype, switches))
        verdict = "ok" if result.ok else "FAIL: " + ", ".join(row.quantity for row in result.rows if not row.ok)
        errors = [row.error for row in result.rows[:4]]
    except (TedfxError, TimeoutError, RuntimeError) as error:
        verdict, errors = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", []
    return Line(model, mesh, switches, verdict, errors, time.perf_counter() - start)


def write(lines: list[Line], dtype: str, seconds: float, path: Path) -> None:
    tolerance = TOLERANCES[getattr(torch, dtype)]
    failed = [line for line in lines if not line.ok]
    columns = ["loss", "gradient norm", "gradients", "parameters"]
    limits = [tolerance.loss, tolerance.norm, tolerance.gradients, tolerance.parameters]
    worst = [[name, f"{limit:.0e}", f"{found[0]:.1e}", found[1]] for i, (name, limit) in enumerate(zip(columns, limits)) if (found := _worst(lines, i))]
    several = len({line.switches for line in lines}) > 1
    pairs = [[line.model, line.mesh, *[line.switches] * several, *(f"{e:.1e}" for e in line.errors), *[""] * (4 - len(line.errors)), line.verdict] for line in lines]
    text = [
        "# Parity",
        "",
        f"Written by {'`python benchmarks/parity.py --savings`' if several else '`make parity` (`benchmarks/parity.py`)'}. {versions()}, {dtype}, gloo ranks on the CPU, {seconds / 60:.0f} minutes.",
        "",
        "Each pair trains the unmodified model on the whole global batch on one device (eager experts) and `tedfx.parallelize`'s module on local ranks, in the same "
        "run: loss, gradient norm as `clip_grad_norm_` returns it, every parameter's gradient, every parameter after 3 AdamW steps with clipping, replicas bit by "
        "bit. The auxiliary loss is on where the model has one; 30% of the labels in the first half of the rows are -100, and all but one in the second half. An "
        "error is the norm of the difference over the larger of the reference's norm and 1e-6 of the total norm; of gradients and parameters the worst one counts. "
        "The models compute some steps in float32 whatever their dtype (softmax, norms, the loss), which is where the errors come from.",
        "",
        f"{len(lines) - len(failed)} of {len(lines)} pairs pass.",
        "",
        tabulate(worst, ["worst of all", "allowed", "error", "where"], tablefmt="github", disable_numparse=True),
        "",
        tabulate(pairs, ["model", "mesh", *["savings"] * several, *columns, "verdict"], tablefmt="github", disable_numparse=True),
        "",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text))


def _worst(lines: list[Line], index: int):
    found = [(line.errors[index], f"{line.model} on {line.mesh}") for line in lines if line.errors]
    return max(found, default=None)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default docs/parity.md, with --savings docs/parity-savings.md")
    parser.add_argument("--savings", action="store_true", help="each saving alone, none and all")
    parser.add_argument("--models", help="comma-separated; `llama tied` has tied embeddings")
    parser.add_argument("--meshes", help="semicolon-separated; roles after a blank: `ep=2,tp=2 expert=ep+tp`")
    parser.add_argument("--dtype", default="float64", choices=["float64", "float32"])
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    models = args.models.split(",") if args.models else SAVED_MODELS if args.savings else MODELS
    meshes = [m.strip() for m in args.meshes.split(";")] if args.meshes else SAVED_MESHES if args.savings else MESHES
    out = args.out or Path("docs/parity-savings.md" if args.savings else "docs/parity.md")
    pairs = [(model, mesh, name) for model in models for mesh in meshes if applies(model, mesh) for name in (SAVINGS if args.savings else ["defaults"])]
    start, lines = time.perf_counter(), []
    for number, (model, mesh, name) in enumerate(pairs, 1):
        lines.append(run(model, mesh, args.dtype, name))
        worst = f"worst gradient {lines[-1].errors[2]:.1e}, " if lines[-1].errors else ""
        print(f"[{number}/{len(pairs)}] {model} on {mesh}, {name}: {lines[-1].verdict} ({worst}{lines[-1].seconds:.0f} s)", flush=True)
    write(lines, args.dtype, time.perf_counter() - start, out)
    failed = [line for line in lines if not line.ok]
    print(f"{len(lines) - len(failed)} of {len(lines)} pairs pass; written to {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
