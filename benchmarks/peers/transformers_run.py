"""transformers' own Mixtral on the benchmark's work, as a JSON line.

    python benchmarks/peers/transformers_run.py [--work fine] [--compile]
    torchrun --nproc-per-node 2 benchmarks/peers/transformers_run.py --mode fsdp2 --compile

single: one GPU, weights and AdamW's states in bfloat16. fsdp2: torch's fully_shard a decoder layer, bfloat16
compute over float32 masters. `--compile` compiles each decoder layer, as torch's guides do. Experts by
grouped_mm, attention by scaled_dot_product_attention.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import gpu_profile  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from gpu_work import LEARNING, MAX_NORM, add_work, batches, say, start, timed, work_of  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_work(parser)
    parser.add_argument("--mode", choices=("single", "fsdp2"), default="single")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    import transformers

    device, work = start(), work_of(args)
    world, sharded = dist.get_world_size(), args.mode == "fsdp2"
    kwargs: dict = dict(attn_implementation="sdpa")
    if work.experts:
        kwargs["experts_implementation"] = "grouped_mm"
    model = work.model(device, torch.float32 if sharded else torch.bfloat16, **kwargs)
    if args.compile:
        for layer in model.model.layers:
            layer.compile()
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        how: dict = dict(
            mesh=init_device_mesh(device.type, (world,)), mp_policy=policy, reshard_after_forward=False
        )
        for layer in model.model.layers:
            fully_shard(layer, **how)
        fully_shard(model, **how)
    optimizer = torch.optim.AdamW(model.parameters(), **LEARNING, fused=device.type == "cuda")

    def step(ids):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    data = batches(work, device, dist.get_rank() if sharded else 0, args.fixed_batch)
    row = timed(
        args,
        work,
        device,
        step,
        data,
        world if sharded else 1,
        system=f"transformers {transformers.__version__}",
        mesh=f"dp={world}" if sharded else "dp=1",
        mode=args.mode,
        compile=args.compile,
        states="fp32" if sharded else "bf16",
    )
    if args.profile:
        found = gpu_profile.profile(step, data, 2, device)
        row["profile"] = {key: value for key, value in found.items() if key not in ("kernels", "gaps")}
    say(row)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
