"""`tedfx verify` on the GPUs of this machine, on record: python benchmarks/verify_gpus.py --out
docs/verify-2xH100.md

Every model on every mesh, eager and compiled, each by the command that its section names: meshes of one axis
where there are two GPUs, of two axes and PPMoE's and folded roles where there are four. Several commands
share the GPUs at a time (`--jobs`): nothing here is timed. Exit status 1 where one is not verified. A model
is a word or a factory with options of `tedfx verify` behind it, a mesh likewise.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch

# (dtype, compiled): what is compiled runs in float32, the dtype that triton's kernels are made for
MODES = {
    "float64": ["--dtype", "float64"],
    "float32": ["--dtype", "float32"],
    "compiled": ["--dtype", "float32", "--compile"],
}


CAPACITY = [
    f"tests.models_capacity:make --set layer=gshard --capacity {whose}" for whose in ("global", "local")
] + ["tests.models_capacity:make --set layer=grouped"]
MODELS = ["mixtral", "deepseek_v3", "gpt_oss", *CAPACITY]
MESHES = {
    2: ["tp=2", "ep=2", "dp=2"],
    4: ["ep=2,tp=2", "dp=2,tp=2", "tp=2,dp=2 --roles expert=tp", "ep=2,tp=2 --roles expert=ep,tp"],
}


def commands(models, meshes, modes) -> list[list[str]]:
    return [
        [*shlex.split(model), "--mesh", *shlex.split(mesh), *MODES[mode], "--device", "cuda"]
        for model in models
        for mesh in meshes
        for mode in modes
    ]


def run(command: list[str], timeout: int) -> tuple[list[str], int, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tedfx.cli", "verify", *command],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return command, 124, f"not done after {timeout} s"
    text = done.stdout if done.returncode == 0 else done.stdout + done.stderr
    return command, done.returncode, text.strip()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument(
        "--meshes", nargs="+", metavar="AXES", help=f"default: {MESHES}, by the number of GPUs"
    )
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES), help="default: all")
    parser.add_argument("--jobs", type=int, default=6, help="commands at a time (default 6)")
    parser.add_argument(
        "--timeout", type=int, default=240, metavar="S", help="seconds per command (default 240)"
    )
    parser.add_argument("--out", metavar="FILE", help="write the record there as markdown")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU here")
    meshes = args.meshes or MESHES[4 if torch.cuda.device_count() >= 4 else 2]

    done = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for ended in as_completed(
            [pool.submit(run, c, args.timeout) for c in commands(args.models, meshes, args.modes)]
        ):
            c, status, text = ended.result()
            done.append((c, status, text))
            print(
                f"{'ok  ' if status == 0 else 'FAIL'} {' '.join(c)}"
                + ("" if status == 0 else ": " + (text.splitlines() or [""])[-1][:200]),
                flush=True,
            )
    gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    good = sum(status == 0 for _, status, _ in done)
    head = (
        f"# `tedfx verify` on {gpus}\n\nWritten by `python benchmarks/verify_gpus.py`: {good} of "
        f"{len(done)} verified. NCCL, one rank per GPU, {args.jobs} commands at a time.\n"
    )
    sections = [
        f"## `tedfx verify {' '.join(c)}`\n\nexit status {status}\n\n```\n{text}\n```\n"
        for c, status, text in sorted(done)
    ]
    if args.out:
        with open(args.out, "w") as file:
            file.write("\n".join([head, *sections]))
    print(f"{good} of {len(done)} verified on {gpus}")
    return good != len(done)


if __name__ == "__main__":
    sys.exit(main())
