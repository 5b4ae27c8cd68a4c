"""Peak memory and step time of the checkpoint policies and of sequence parallelism, on two GPUs: one JSON
line per run.

    python benchmarks/policies.py --out benchmarks/results/policies-2xH100.jsonl

One Mixtral (8 layers, hidden 2048, feed-forward 4096, 8 experts, top-2, bfloat16), sequence 4096, 2 sequences
per data rank, random tokens, AdamW. A step is forward, backward and optimizer; its time is the median after
warm-up, on rank 0. Runs follow each other in the same two processes, from one trace.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import warnings

import torch

from tedfx.verification import processes as verify_ranks
from tedfx.verification.verify import versions

RUNS = [
    # (mesh, options of parallelize)
    ("ep=2", {}),
    ("ep=2", {"checkpoint": "comm"}),
    ("ep=2", {"checkpoint": "selective"}),
    ("ep=2", {"checkpoint": "full"}),
    ("ep=2", {"checkpoint": "budget=6GiB"}),
    ("tp=2", {"sequence_parallel": False}),
    ("tp=2", {"sequence_parallel": True}),
    ("tp=2", {"sequence_parallel": True, "checkpoint": "comm"}),
    ("tp=2", {"sequence_parallel": True, "checkpoint": "selective"}),
    ("tp=2", {"sequence_parallel": True, "checkpoint": "full"}),
    ("tp=2", {"sequence_parallel": True, "checkpoint": "budget=3GiB"}),
    ("ep=2", {"compile": True}),
    ("ep=2", {"compile": True, "checkpoint": "comm"}),
    ("ep=2", {"compile": True, "checkpoint": "selective"}),
    ("ep=2", {"compile": True, "checkpoint": "full"}),
    ("ep=2", {"compile": True, "checkpoint": "budget=6GiB"}),
    ("tp=2", {"compile": True, "sequence_parallel": False}),
    ("tp=2", {"compile": True, "sequence_parallel": True}),
]


def make_model(args):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=32000,
        max_position_embeddings=args.sequence,
        router_aux_loss_coef=0.01,
        output_router_logits=True,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return MixtralForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def measure(rank, args) -> list[dict]:
    from torch.distributed.device_mesh import init_device_mesh

    import tedfx
    from tedfx.placement.roles import MeshShape
    from tedfx.trace.export import trace

    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model = make_model(args)
    ids = torch.zeros(args.batch, args.sequence, dtype=torch.int64)
    traced = trace(model, kwargs={"input_ids": ids, "labels": ids})
    found = []
    for number in args.runs:
        mesh, options = RUNS[number]
        shape = MeshShape.of(mesh)
        device_mesh = init_device_mesh("cuda", shape.sizes, mesh_dim_names=shape.names)
        pm = tedfx.parallelize(
            model,
            device_mesh,
            traces=[traced],
            outputs=("loss",),
            example_inputs={"input_ids": ids, "labels": ids},
            **options,
        )
        optimizer = torch.optim.AdamW(pm.parameters(), lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(pm.batch_coordinate[0])
        tokens = torch.randint(32000, (args.batch, args.sequence), generator=generator).cuda()
        left_over = torch.cuda.memory_allocated() - sum(
            p.to_local().numel() * p.element_size() for p in [*pm.parameters()]
        )
        times, start = [], time.perf_counter()
        for step in range(args.warmup + args.steps):
            if step == args.warmup:
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            pm(input_ids=tokens, labels=tokens).loss.backward()
            after_backward = torch.cuda.max_memory_allocated()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
            if step == 0:
                first = time.perf_counter() - start
        if args.profile and rank.index == 0:
            profiler = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
            )
            profiler.start()
        if args.profile:
            pm(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.zero_grad()
            torch.cuda.synchronize()
        if args.profile and rank.index == 0:
            profiler.stop()
            print(
                profiler.key_averages().table(
                    sort_by=args.profile_by, row_limit=args.profile, max_name_column_width=60
                )
            )
        timed = times[args.warmup :]
        held = sum(p.to_local().numel() * p.element_size() for p in pm.parameters())
        record = {
            "mesh": mesh,
            **{"checkpoint": "none", "compile": False, **options},
            "step_ms": round(1e3 * statistics.median(timed), 1),
            "fastest_ms": round(1e3 * min(timed), 1),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "peak_to_backward_gib": round(after_backward / 2**30, 2),
            "parameters_gib": round(held / 2**30, 2),
            "model_gib": round(sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30, 2),
            "first_step_s": round(first, 1),
            "held_before_gib": round(left_over / 2**30, 2),
            "layers": args.layers,
            "hidden": args.hidden,
            "batch": args.batch,
            "sequence": args.sequence,
            "device": torch.cuda.get_device_name(),
            "versions": versions(),
        }
        found.append(record)
        if rank.index == 0:
            with open(args.out, "a") as file:
                file.write(json.dumps(record) + "\n")
            print(f"{mesh} {options}: {record['step_ms']} ms, {record['peak_gib']} GiB", flush=True)
        del pm, optimizer, tokens
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return found


def parser(description: str, runs: list, steps: int, out: str) -> argparse.ArgumentParser:
    """What the benchmarks of this model on two GPUs share."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--layers", type=int, default=8)
    made.add_argument("--hidden", type=int, default=2048)
    made.add_argument("--sequence", type=int, default=4096)
    made.add_argument("--batch", type=int, default=2, help="sequences per data rank")
    made.add_argument("--warmup", type=int, default=2)
    made.add_argument("--steps", type=int, default=steps)
    made.add_argument(
        "--runs",
        type=int,
        nargs="+",
        default=list(range(len(runs))),
        help="numbers of the runs (default: all)",
    )
    made.add_argument("--timeout", type=float, default=560.0)
    made.add_argument("--out", default=out)
    return made


def on_two_gpus(measure, made: argparse.ArgumentParser) -> int:
    """`measure(rank, args)` on two ranks, a GPU each."""
    args = made.parse_args()
    if torch.cuda.device_count() < 2:
        made.error(f"needs two GPUs, {torch.cuda.device_count()} here")
    verify_ranks.run(
        verify_ranks.jobs(measure, (args,), 2, "cuda", "nccl", args.timeout), False, args.timeout
    )
    return 0


def main() -> int:
    made = parser(__doc__.split("\n\n")[0], RUNS, 5, "policies.jsonl")
    made.add_argument(
        "--profile", type=int, default=0, metavar="N", help="print the N most costly kernels of one more step"
    )
    made.add_argument(
        "--profile-by", default="self_cuda_time_total", help="or self_cpu_time_total: what keeps the host"
    )
    return on_two_gpus(measure, made)


if __name__ == "__main__":
    sys.exit(main())
