"""Every Hugging Face family with experts against the single device: docs/models.md.

    python benchmarks/zoo.py --out docs/models.md [--families dbrx jamba] [--meshes "ep=2,tp=2;tp=2 expert=tp"]
    [--jobs 2] [--rows FILE]

The families are those folders of the installed transformers whose modeling file has a class of experts; each
is built tiny, with random weights, from its own config (tedfx/verification/tiny_config.py), with the head of
the first task that it has, and its text model where the family is of several kinds of input. Eager, float64
throughout (`tedfx.verification.widened`), three training steps; a family that is refused or differs stands in the table with its line. `--rows FILE`
keeps the rows as JSON lines: a run that is cut off goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks are forked, and a forked process cannot start CUDA
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tabulate import tabulate  # noqa: E402

MESHES = ["ep=2,tp=2", "dp=2,ep=2", "tp=2 expert=tp"]
EXPERTS = re.compile(r"^class \w*(?:Experts|MoE|Moe|SparseMLP)\w*\(", re.M)
COUNTS = re.compile(r"num_(?:local_)?experts|n_routed_experts|moe_num_experts")
STEPS = 3


def families() -> list[str]:
    """Folders of transformers' models whose modeling file has a class of experts, and counts them."""
    import transformers

    found = []
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = file.read_text()
        if COUNTS.search(text) and EXPERTS.search(text):
            found.append(file.parent.name)
    return found


def model_types(family: str) -> list[str]:
    """The family's model types that some auto class builds and that take token ids (else pixels), those with
    the first heads of `HEADS` first; of one class for several types, the text's own."""
    from transformers import CONFIG_MAPPING

    from tedfx.verification.heads import HEADS, heads_of

    found = []
    for name in CONFIG_MAPPING.keys():
        try:
            config = CONFIG_MAPPING[name]
        except (AttributeError, ImportError):  # a type whose class this release does not have
            continue
        if config.__module__.split(".")[-2] != family or re.search(
            r"audio|vision|encoder|talker|code_pred", name
        ):
            continue
        heads = heads_of(config)
        if heads:
            found.append((list(HEADS).index(heads[0]), not name.endswith("_text"), name))
    return [name for *_, name in sorted(found)][:1]


STYLES = {
    "registry": "registry",
    "capture_sorted": "sorted rows",
    "capture_loops": "loop",
    "capture_capacity": "capacity",
    "capture_dense": "gathered weights or all experts",
    "capture_choices": "experts choose",
    "stack_experts": "soft gate",
}


def run(model_type: str, mesh: str) -> dict:
    """One row, in this process."""
    warnings.filterwarnings("ignore")
    from tedfx.errors import TedfxError
    from tedfx.verification.models import ByType
    from tedfx.verification.verify import verify, versions

    start = time.perf_counter()
    row: dict = {"type": model_type, "mesh": mesh}
    try:
        made = ByType(model_type)
        axes, _, roles = mesh.partition(" ")
        given = dict([part.split("=") for part in roles.split()])
        result = verify(
            made,
            axes,
            roles={k: v.split("+") for k, v in given.items()} or None,
            steps=STEPS,
            device="cpu",
            timeout=200,
            widen=True,
        )
        row |= {
            "outcome": "parity" if result.ok else "differs",
            "error": max(r.error for r in result.rows),
            "line": "" if result.ok else result.first,
            "style": ", ".join(STYLES[name] for name in result.captured),
        }
    except TedfxError as error:
        row |= {"outcome": type(error).__name__, "line": " ".join(str(error).split())}
    except Exception as error:  # the benchmark's answer for what should not happen
        row |= {"outcome": "crash", "line": f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]}
    return row | {"seconds": round(time.perf_counter() - start), "versions": versions()}


def in_process(model_type: str, mesh: str, limit: int) -> dict:
    """`run` in a process of its own, that ends."""
    command = [sys.executable, __file__, "--one", model_type, mesh]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"type": model_type, "mesh": mesh, "outcome": "slow", "line": f"no answer in {limit} s"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return {"type": model_type, "mesh": mesh, "outcome": "crash", "line": done.stderr[-600:]}


def table(rows: list[dict], meshes: list[str]) -> str:
    by = {(r["family"], r["mesh"]): r for r in rows}
    lines = []
    for family in sorted({r["family"] for r in rows}):
        mine = [by.get((family, mesh)) for mesh in meshes]
        cells = [
            f"{r['error']:.0e}" if r and r["outcome"] == "parity" else r["outcome"] if r else "" for r in mine
        ]
        why = next((r["line"] for r in mine if r and r["outcome"] != "parity"), "")
        lines.append(
            [
                family,
                next(r["type"] for r in mine if r),
                next((r["style"] for r in mine if r and r.get("style")), ""),
                *cells,
                re.sub(r"\S*/(?=transformers/)", "", why).replace("|", "/")[:200],
            ]
        )
    return tabulate(
        lines,
        ["family", "model type", "experts", *meshes, "the line, where it is not right"],
        tablefmt="github",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--families", nargs="+")
    parser.add_argument("--meshes", default=";".join(MESHES))
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    parser.add_argument("--limit", type=int, default=240, help="seconds for one mesh")
    parser.add_argument("--rows", help="a file of rows, to go on from")
    parser.add_argument("--out", help="a page to write")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(*args.one)))
        return 0
    meshes, rows = args.meshes.split(";"), []
    if args.rows and os.path.exists(args.rows):
        rows = [json.loads(line) for line in Path(args.rows).read_text().splitlines()]
    done = {(r["family"], r["mesh"]) for r in rows}
    todo = [
        (family, name, mesh)
        for family in args.families or families()
        for name in model_types(family) or [""]
        for mesh in meshes
        if (family, mesh) not in done
    ]

    def each(job):
        family, name, mesh = job
        row = (
            {"type": "-", "mesh": mesh, "outcome": "no class", "line": "no auto class builds it"}
            if not name
            else in_process(name, mesh, args.limit)
        )
        row["family"] = family
        print(family, mesh, row["outcome"], row.get("error", ""), row["line"][:150], flush=True)
        if args.rows:
            with open(args.rows, "a") as file:
                file.write(json.dumps(row) + "\n")
        return row

    with ThreadPoolExecutor(args.jobs) as threads:
        rows += threads.map(each, todo)
    rows = [row for row in rows if row["mesh"] in meshes]
    right = Counter(r["family"] for r in rows if r["outcome"] == "parity")
    whole = [family for family, n in right.items() if n == len(meshes)]
    text = table(rows, meshes)
    summary = f"{len(whole)} of {len({r['family'] for r in rows})} families train on all {len(meshes)} meshes as on one device"
    print(text, summary, sep="\n")
    if args.out:
        with_what = sorted({row["versions"] for row in rows if "versions" in row})
        Path(args.out).write_text(page(text, summary, ";\n".join(with_what)))
    return 0


def page(text: str, summary: str, made_with: str) -> str:
    return f"""# Families of Hugging Face transformers

{summary}.

Each family that has a class of experts, with a tiny random config, eager, {STEPS} training steps in float64
(also where the classes compute in float32 whatever their dtype), against the unmodified model with its
authors' eager experts. A number is the worst error of losses, gradient norms, gradients, buffers and
parameters. Experts: how the family writes them, by what captured them ("registry": an experts function of the
library). Written by `python benchmarks/zoo.py --out docs/models.md`
with {made_with}.

{text}
"""


if __name__ == "__main__":
    sys.exit(main())
