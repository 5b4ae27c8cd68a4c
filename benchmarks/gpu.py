"""tedfx on GPUs: one run of the benchmark's work, as a JSON line.

    torchrun --nproc-per-node 2 benchmarks/gpu.py --mesh ep=2 --compile [--work fine] [--zero 1]
        [--roles expert=tp] [--sequence-parallel 0] [--checkpoint full] [--states fp32] [--profile [FILE]]

The unmodified Mixtral (or Mistral, `--work dense`) of transformers, bfloat16, random tokens; a step is forward,
backward, clipping, AdamW, zero_grad (benchmarks/gpu_work.py). `--states bf16`: weights and AdamW's states in
bfloat16; `fp32`: float32 masters and states (`tedfx.optim.ShardedOptimizer`). `--optimizer torch` takes torch's
AdamW and clip_grad_norm_ in place of ShardedOptimizer. `--profile` prints kernel time by kind and the
communication that nothing hides, per step, after the timed steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import gpu_profile  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from gpu_work import LEARNING, MAX_NORM, add_work, batches, say, start, timed, work_of  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_work(parser)
    parser.add_argument("--mesh", default="dp=1")
    parser.add_argument("--roles", default="", help="expert=tp, expert=ep+tp, ..")
    parser.add_argument("--zero", type=int, default=0)
    parser.add_argument("--sequence-parallel", type=int, choices=(0, 1))
    parser.add_argument("--checkpoint", default="none")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--states", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--optimizer", choices=("sharded", "torch"), default="sharded")
    parser.add_argument("--profile", nargs="?", const="", help="and the whole as a JSON file")
    parser.add_argument("--top", type=int, default=0, help="the kernels that take most, in the profile")
    args = parser.parse_args()
    import transformers

    import tedfx

    device, work = start(), work_of(args)
    axes = {name: int(size) for name, size in (part.split("=") for part in args.mesh.split(","))}
    mesh = init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    options: dict = dict(checkpoint=args.checkpoint, compile=args.compile, zero=args.zero)
    roles = {
        k: tuple(x for x in v.split("+") if x) for k, v in (part.split("=") for part in args.roles.split())
    }
    if roles:
        options["roles"] = roles
    if args.sequence_parallel is not None:
        options["sequence_parallel"] = bool(args.sequence_parallel)
    model = work.model(device, torch.bfloat16)
    ids = torch.zeros(work.sequences, work.sequence, dtype=torch.int64)
    began = time.perf_counter()
    example = dict(input_ids=ids, labels=ids)
    pm = tedfx.parallelize(model, mesh, outputs=("loss",), example_inputs=example, **options)
    made = time.perf_counter() - began
    model.cpu()
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if args.optimizer == "torch":
        optimizer = torch.optim.AdamW(pm.parameters(), **LEARNING, fused=device.type == "cuda")
    else:
        optimizer = tedfx.optim.ShardedOptimizer(
            pm,
            torch.optim.AdamW,
            **LEARNING,
            max_norm=MAX_NORM,
            master_dtype=torch.float32 if args.states == "fp32" else torch.bfloat16,
        )

    host = {"forward": [], "backward": [], "optimizer": []}

    def step(ids):
        at = [time.perf_counter()]
        loss = pm(input_ids=ids, labels=ids).loss
        at.append(time.perf_counter())
        loss.backward()
        at.append(time.perf_counter())
        if args.optimizer == "torch":
            torch.nn.utils.clip_grad_norm_(pm.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        at.append(time.perf_counter())
        for spent, before, after in zip(host.values(), at, at[1:]):
            spent.append((after - before) * 1e3)
        return loss

    replica, replicas = pm.batch_coordinate
    data = batches(work, device, replica, args.fixed_batch)
    row = timed(
        args,
        work,
        device,
        step,
        data,
        replicas,
        system=f"tedfx {tedfx.__version__}",
        mesh=args.mesh,
        roles=args.roles,
        zero=args.zero,
        sequence_parallel=args.sequence_parallel,
        checkpoint=args.checkpoint,
        compile=args.compile,
        states="bf16" if args.optimizer == "torch" else args.states,
        optimizer=args.optimizer,
        parallelize_s=round(made, 1),
        transformers=transformers.__version__,
    )
    # How long the host is busy with each part, or waits in it for the device; not the time of its kernels.
    row["host_ms"] = {key: round(statistics.median(spent[args.warmup :]), 2) for key, spent in host.items()}
    if args.profile is not None:
        found = gpu_profile.profile(step, data, 2, device)
        row["profile"] = {key: value for key, value in found.items() if key not in ("kernels", "gaps")}
        if dist.get_rank() == 0:
            print(gpu_profile.table(found, args.top), flush=True)
            if args.profile:
                gpu_profile.write(found, args.profile)
    say(row)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
