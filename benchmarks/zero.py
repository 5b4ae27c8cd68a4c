"""Peak memory and step time of ZeRO's stages and of the optimizer's tiles, on two GPUs: one JSON line per
run.

    python benchmarks/zero.py --out benchmarks/results/zero-2xH100.jsonl

The model and batch of benchmarks/policies.py (one Mixtral, 8 layers, bfloat16), plain data parallelism
(dp=2), `tedfx.optim.ShardedOptimizer` over AdamW with float32 masters and clipping. A step is forward,
backward and optimizer; its time is the median after warm-up, on rank 0. `stored` is what a rank holds between
steps: parameters and optimizer states (and gradients before `zero_grad`), beside it ZeRO's formula (arXiv
1910.02054, table 1) for this model: psi parameters, N = 2 ranks.
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

from tedfx.verification.verify import versions  # noqa: E402

SETTINGS = ("checkpoint", "compile", "bucket_bytes", "prefetch")  # recorded where not given, too

RUNS = [
    # (options of parallelize, options of the optimizer)
    ({"zero": 0}, {}),
    ({"zero": 0}, {"tile": None}),
    ({"zero": 0}, {"tile": None, "foreach": True}),
    ({"zero": 1}, {}),
    ({"zero": 2}, {}),
    ({"zero": 2}, {"tile": None}),
    ({"zero": 2}, {"foreach": True}),
    ({"zero": 3}, {}),
    ({"zero": 3, "checkpoint": "comm"}, {}),
    ({"zero": 3, "compile": True}, {}),
    # sizes: of tiles, of buckets of gradients, of gathers, and how many gathers ahead
    ({"zero": 2}, {"tile": 2**21}),
    ({"zero": 2}, {"tile": 2**23}),
    ({"zero": 2}, {"tile": 2**27}),
    ({"zero": 2, "bucket_bytes": 2**22}, {}),
    ({"zero": 2, "bucket_bytes": 25 * 2**20}, {}),
    ({"zero": 2, "bucket_bytes": 2**29}, {}),
    ({"zero": 3, "gather_bytes": 2**26}, {}),
    ({"zero": 3, "gather_bytes": 2**30}, {}),
    ({"zero": 3, "prefetch": 0}, {}),
    ({"zero": 3, "prefetch": 1}, {}),
    ({"zero": 3, "prefetch": 3}, {}),
    # offload
    ({"zero": 2}, {"offload": "gradients"}),
    ({"zero": 2}, {"offload": "optimizer"}),
    ({"zero": 2}, {"offload": "cpu"}),
    ({"zero": 2}, {"offload": "cpu", "tile": 2**20}),
    ({"zero": 2}, {"offload": "cpu", "tile": 2**25}),
    ({"zero": 3}, {"offload": "cpu"}),
    # the batch in two micro-batches, one after another and layer by layer
    ({"zero": 2, "micro_batches": 2}, {}),
    ({"zero": 2, "micro_batches": 2, "layered": True}, {}),
    ({"zero": 3, "micro_batches": 2}, {}),
    ({"zero": 3, "micro_batches": 2, "layered": True}, {}),
    ({"zero": 3, "micro_batches": 2, "layered": True, "checkpoint": "full"}, {}),
    ({"zero": 3, "micro_batches": 2, "checkpoint": "full"}, {}),
]


def formula(stage: int, psi: int, ranks: int, offload: str | None = None) -> float:
    """Bytes on a rank's device: 16-bit parameters and gradients and 12 bytes of optimizer per parameter, as
    far as they are not on the host."""
    parts = {
        "parameters": 2 / (ranks if stage >= 3 else 1),
        "gradients": 2 / (ranks if stage >= 2 else 1),
        "optimizer": 12 / (ranks if stage >= 1 else 1),
    }
    gone = {None: (), "cpu": ("gradients", "optimizer")}.get(offload, (offload,))
    return psi * sum(size for name, size in parts.items() if name not in gone)


def accumulate(pm, parts: list[dict], layered: bool) -> None:
    """Forward and backward of a step's micro-batches."""
    if layered:
        sum(out.loss for out in pm.layered(parts)).backward()
        return
    with pm.no_sync():
        for part in parts[:-1]:
            pm(**part).loss.backward()
    pm(**parts[-1]).loss.backward()


def measure(rank, args) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    import tedfx
    from tedfx.trace.export import trace

    warnings.filterwarnings("ignore")
    torch.set_num_threads(os.cpu_count() // 2)  # for what runs on the host
    torch.manual_seed(0)
    model = make_model(args)
    ids = torch.zeros(args.batch, args.sequence, dtype=torch.int64)
    traced = trace(model, kwargs={"input_ids": ids, "labels": ids})
    psi = sum(p.numel() for p in model.parameters())
    model.cpu()  # its weights are not part of what is measured
    torch.cuda.empty_cache()
    for number in args.runs:
        options, kinds = RUNS[number]
        parts, layered = options.get("micro_batches", 1), options.get("layered", False)
        given = {key: value for key, value in options.items() if key not in ("micro_batches", "layered")}
        mesh = init_device_mesh("cuda", (2,), mesh_dim_names=("dp",))
        before = torch.cuda.memory_allocated()
        pm = tedfx.parallelize(
            model,
            mesh,
            traces=[traced],
            outputs=("loss",),
            example_inputs={"input_ids": ids, "labels": ids},
            **given,
        )
        optimizer = tedfx.optim.ShardedOptimizer(pm, torch.optim.AdamW, lr=1e-4, max_norm=1.0, **kinds)
        tokens = torch.randint(
            32000, (args.batch, args.sequence), generator=torch.Generator().manual_seed(rank.index)
        ).cuda()
        times, step_peak = [], 0
        for step in range(args.warmup + args.steps):
            if step == args.warmup:
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            accumulate(pm, [{"input_ids": part, "labels": part} for part in tokens.chunk(parts)], layered)
            torch.cuda.synchronize()
            backward = time.perf_counter() - begin
            peak, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            optimizer.step()
            torch.cuda.synchronize()
            step_peak = torch.cuda.max_memory_allocated() - held
            optimizer.zero_grad()
            times.append((time.perf_counter() - begin, backward))
        record = {
            **{
                **{name: getattr(tedfx.Options, name) for name in SETTINGS},
                **options,
            },
            **kinds,
            "tile": optimizer.tile,
            "step_ms": round(1e3 * statistics.median(t for t, _ in times[args.warmup :]), 1),
            "backward_ms": round(1e3 * statistics.median(t for _, t in times[args.warmup :]), 1),
            "threads": torch.get_num_threads(),
            "peak_gib": round((peak - before) / 2**30, 2),
            "stored_gib": round((held - before) / 2**30, 2),
            "formula_gib": round(formula(options["zero"], psi, 2, kinds.get("offload")) / 2**30, 2),
            "optimizer_extra_gib": round(step_peak / 2**30, 3),
            "parameters": psi,
            "layers": args.layers,
            "hidden": args.hidden,
            "batch": args.batch,
            "sequence": args.sequence,
            "device": torch.cuda.get_device_name(),
            "versions": versions(),
        }
        if rank.index == 0:
            with open(args.out, "a") as file:
                file.write(json.dumps(record) + "\n")
            print(
                f"{options} {kinds}: {record['step_ms']} ms ({record['backward_ms']} to the end of "
                f"backward), peak {record['peak_gib']}, stored {record['stored_gib']} (formula "
                f"{record['formula_gib']}), step's extra {record['optimizer_extra_gib']} GiB",
                flush=True,
            )
        del pm, optimizer, tokens
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(on_two_gpus(measure, parser(__doc__.split("\n\n")[0], RUNS, 4, "zero.jsonl")))
