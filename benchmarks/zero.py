"""Peak memory and step time of ZeRO's stages and of the optimizer's tiles, on two GPUs: one JSON line per run.

    python benchmarks/zero.py --out benchmarks/results/zero-2xH100.jsonl

The model and batch of benchmarks/policies.py (one Mixtral, 8 layers, bfloat16), plain data parallelism (dp=2), `tedfx.optim.ShardedOptimizer` over AdamW with float32
masters and clipping. A step is forward, backward and optimizer; its time is the median after warm-up, on rank 0. `stored` is what a rank holds between steps:
parameters and optimizer states (and gradients before `zero_grad`), beside it ZeRO's formula (arXiv 1910.02054, table 1) for this model: psi parameters, N = 2 ranks.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
import warnings

import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from policies import make_model, on_two_gpus, parser  # noqa: E402

from tedfx.verify import versions  # noqa: E402

RUNS = [
    # (options of parallelize, options of the optimizer)
    ({"zero": 0}, {}),
    ({"zero": 0}, {"tile": None}),
    ({"zero": 1}, {}),
    ({"zero": 2}, {}),
    ({"zero": 2}, {"tile": None}),
    ({"zero": 3}, {}),
    ({"zero": 3}, {"tile": 2**25}),
    ({"zero": 3, "checkpoint": "comm"}, {}),
    ({"zero": 2}, {"offload": "cpu"}),
    ({"zero": 3, "compile": True}, {}),
]


def formula(stage: int, psi: int, ranks: int) -> float:
    """Bytes of 16-bit parameters and gradients and of 12 bytes of optimizer per parameter."""
    shared = {0: 0, 1: 12, 2: 14, 3: 16}[stage]
    return psi * (16 - shared + shared / ranks)


def measure(rank, args) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    import tedfx
    from tedfx.trace import trace

    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model = make_model(args)
    ids = torch.zeros(args.batch, args.sequence, dtype=torch.int64)
    traced = trace(model, kwargs={"input_ids": ids, "labels": ids})
    psi = sum(p.numel() for p in model.parameters())
    model.cpu()  # its weights are not part of what is measured
    torch.cuda.empty_cache()
    for number in args.runs:
        options, kinds = RUNS[number]
        mesh = init_device_mesh("cuda", (2,), mesh_dim_names=("dp",))
        before = torch.cuda.memory_allocated()
        pm = tedfx.parallelize(model, mesh, traces=[traced], outputs=("loss",), example_inputs={"input_ids": ids, "labels": ids}, **options)
        optimizer = tedfx.optim.ShardedOptimizer(pm, torch.optim.AdamW, lr=1e-4, max_norm=1.0, **kinds)
        tokens = torch.randint(32000, (args.batch, args.sequence), generator=torch.Generator().manual_seed(rank.index)).cuda()
        times, step_peak = [], 0
        for step in range(args.warmup + args.steps):
            if step == args.warmup:
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            pm(input_ids=tokens, labels=tokens).loss.backward()
            torch.cuda.synchronize()
            peak, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            optimizer.step()
            torch.cuda.synchronize()
            step_peak = torch.cuda.max_memory_allocated() - held
            optimizer.zero_grad()
            times.append(time.perf_counter() - begin)
        record = {
            **{"checkpoint": "none", "compile": False, **options}, "tile": "default", **kinds, "step_ms": round(1e3 * statistics.median(times[args.warmup :]), 1),
            "peak_gib": round((peak - before) / 2**30, 2), "stored_gib": round((held - before) / 2**30, 2), "formula_gib": round(formula(options["zero"], psi, 2) / 2**30, 2),
            "optimizer_extra_gib": round(step_peak / 2**30, 3), "parameters": psi, "layers": args.layers, "hidden": args.hidden, "batch": args.batch, "sequence": args.sequence,
            "device": torch.cuda.get_device_name(), "versions": versions(),
        }  # fmt: skip
        if rank.index == 0:
            with open(args.out, "a") as file:
                file.write(json.dumps(record) + "\n")
            print(f"{options} {kinds}: {record['step_ms']} ms, peak {record['peak_gib']}, stored {record['stored_gib']} (formula {record['formula_gib']}), step's extra {record['optimizer_extra_gib']} GiB", flush=True)
        del pm, optimizer, tokens
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(on_two_gpus(measure, parser(__doc__.split("\n\n")[0], RUNS, 4, "zero.jsonl")))
