"""Peak host memory of a rank that gives weights to a model made on the meta device: JSON lines on stdout.

    python benchmarks/host_memory.py
    python benchmarks/host_memory.py --mesh ep=4 --layers 20

Gloo ranks as processes of their own, one `torchrun` per way: `init_weights` (and `save_pretrained` behind it,
which makes the checkpoint, in a temporary folder), then `load_pretrained` of that folder. `peak` is the
largest resident set of a rank's process (`ru_maxrss`, imports included), `share` the bytes of parameters that
it holds, `bound` 1.3 times the share plus 1 GB. Exit status 1 where a peak of init_weights or load_pretrained
is above its bound.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time

GB = 10**9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mesh", default="ep=2,tp=2", help="axis sizes (default ep=2,tp=2)")
    parser.add_argument(
        "--layers", type=int, default=11, help="of the Mixtral, some 210 MB each (default 11)"
    )
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument(
        "--folder",
        help="where the checkpoint goes for the time of the run (default: the system's temporary folder)",
    )
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        return rank(args)
    needed = 2 * 4 * parameters(args)
    room = tempfile.mkdtemp(prefix="tedfx_host_memory_", dir=args.folder)
    try:
        if shutil.disk_usage(room).free < needed:
            print(
                f"{room} has less than {needed / GB:.1f} GB free: choose another with --folder",
                file=sys.stderr,
            )
            return 2
        ranks, bad = 1, 0
        for part in args.mesh.split(","):
            ranks *= int(part.split("=")[1])
        for way in ("init", "load"):
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(ranks),
                os.path.abspath(__file__),
                "--way",
                way,
            ]
            command += [
                "--mesh",
                args.mesh,
                "--layers",
                str(args.layers),
                "--hidden",
                str(args.hidden),
                "--folder",
                room,
            ]
            subprocess.run(
                command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            )
            for number in range(ranks):
                with open(os.path.join(room, f"{way}-{number}.json"), encoding="utf-8") as f:
                    for line in f:
                        print(line, end="", flush=True)
                        bad += json.loads(line).get("fits") is False
        return int(bad > 0)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def parameters(args) -> int:
    return (
        args.layers * (8 * 3 * args.hidden * 2 * args.hidden + 3 * args.hidden**2) + 2 * 16000 * args.hidden
    )


def rank(args) -> int:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import MixtralConfig, MixtralForCausalLM

    import tedfx

    dist.init_process_group("gloo")
    axes = [part.split("=") for part in args.mesh.split(",")]
    mesh = init_device_mesh(
        "cpu", tuple(int(size) for _, size in axes), mesh_dim_names=tuple(name for name, _ in axes)
    )
    config = MixtralConfig(
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=16000,
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    imported = peak()
    pm = tedfx.parallelize(model, mesh)
    share = sum(p.to_local().nbytes for p in pm.parameters())
    common = {
        "mesh": args.mesh,
        "rank": dist.get_rank(),
        "model_bytes": sum(p.nbytes for p in model.parameters()),
        "share": share,
        "imports": imported,
        "compiled": peak(),
    }
    common |= {"torch": torch.__version__, "bound": int(1.3 * share + GB)}
    lines, folder = [], os.path.join(args.folder, "checkpoint")
    ways = {
        "init": [
            ("init_weights", lambda: pm.init_weights(seed=0)),
            ("save_pretrained", lambda: pm.save_pretrained(folder, "500MB")),
        ]
    }
    ways["load"] = [("load_pretrained", lambda: pm.load_pretrained(folder))]
    for name, call in ways[args.way]:
        start = time.monotonic()
        call()
        line = {"way": name, "peak": peak(), "seconds": round(time.monotonic() - start, 1), **common}
        if name != "save_pretrained":
            line["fits"] = line["peak"] <= line["bound"]
        lines.append(json.dumps(line))
    with open(os.path.join(args.folder, f"{args.way}-{dist.get_rank()}.json"), "w", encoding="utf-8") as f:
        f.write("\n".join(lines) + "\n")
    dist.barrier()
    dist.destroy_process_group()
    return 0


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
