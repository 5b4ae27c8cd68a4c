"""`tedfx verify` on the GPUs of this machine, on record: python benchmarks/verify_gpus.py --out docs/verify-gpus.md

Every model on every mesh of one axis over two GPUs, eager and compiled, each by the command that its section names. Several commands share the
GPUs at a time (`--jobs`): nothing here is timed. Exit status 1 where one is not verified.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

# (dtype, compiled): what is compiled runs in float32, the dtype that triton's kernels are made for
MODES = (("float64", False), ("float32", False), ("float32", True))


def commands(models, meshes) -> list[list[str]]:
    return [
        [model, "--mesh", mesh, "--dtype", dtype, "--device", "cuda", *(["--compile"] if compiled else [])]
        for model in models
        for mesh in meshes
        for dtype, compiled in MODES
    ]


def run(command: list[str], timeout: int) -> tuple[list[str], int, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    try:
        done = subprocess.run([sys.executable, "-m", "tedfx.cli", "verify", *command], capture_output=True, text=True, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired:
        return command, 124, f"not done after {timeout} s"
    text = done.stdout if done.returncode == 0 else done.stdout + done.stderr
    return command, done.returncode, text.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mixtral", "deepseek_v3", "gpt_oss"], metavar="NAME")
    parser.add_argument("--meshes", nargs="+", default=["tp=2", "ep=2", "dp=2"], metavar="AXES")
    parser.add_argument("--jobs", type=int, default=6, help="commands at a time (default 6)")
    parser.add_argument("--timeout", type=int, default=240, metavar="S", help="seconds per command (default 240)")
    parser.add_argument("--out", metavar="FILE", help="write the record there as markdown")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU here")

    with ThreadPoolExecutor(args.jobs) as pool:
        done = list(pool.map(lambda c: run(c, args.timeout), commands(args.models, args.meshes)))
    gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    good = sum(status == 0 for _, status, _ in done)
    head = f"# `tedfx verify` on {gpus}\n\nWritten by `python benchmarks/verify_gpus.py`: {good} of {len(done)} verified. NCCL, one rank per GPU, {args.jobs} commands at a time.\n"
    sections = [f"## `tedfx verify {' '.join(c)}`\n\nexit status {status}\n\n```\n{text}\n```\n" for c, status, text in done]
    if args.out:
        with open(args.out, "w") as file:
            file.write("\n".join([head, *sections]))
    for c, status, text in done:
        print(f"{'ok  ' if status == 0 else 'FAIL'} {' '.join(c)}" + ("" if status == 0 else ": " + text.splitlines()[-1][:200] if text else ""))
    print(f"{good} of {len(done)} verified on {gpus}")
    return good != len(done)


if __name__ == "__main__":
    sys.exit(main())
