"""1-bit Adam beside AdamW: the demo's model and text (examples/pretrain.py), trained twice from the same seeds on gloo ranks of this machine; losses, bytes, and the table of docs/onebit.md.

    python benchmarks/onebit.py --write docs/onebit.md

Both runs have the demo's batches, learning rates, betas, weight decay and evaluation, in float32, under data parallelism alone, so every gradient is summed over all ranks. Bytes are those of
`OneBitAdam.volume`, per rank by the ring formulas; a run in AdamW sends the bytes that all-reduces of its gradients do.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

ROOT = Path(__file__).resolve().parent.parent


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup", type=float, default=0.15, help="share of the steps before the variance is frozen (default: 0.15)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, metavar="FILE", help="where the report goes")
    return parser.parse_args(argv)


def pretrain():
    """examples/pretrain.py as a module."""
    spec = importlib.util.spec_from_file_location("pretrain", ROOT / "examples" / "pretrain.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["pretrain"] = module
    spec.loader.exec_module(module)
    return module


def train(args, demo, mesh, name: str, text) -> dict:
    """{"losses": {step: training loss, mean of the last ten}, "validation": nats per byte, "bytes": per rank, "uncompressed": .., "seconds": per step, "steps": of warm-up}."""
    import tedfx

    training, validation = text
    torch.manual_seed(args.seed)
    pm = tedfx.parallelize(demo.make_model("mixtral", []).train(), mesh)
    options, warmup = dict(lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1), round(args.warmup * args.steps)
    # AdamW is 1-bit Adam whose warm-up never ends: the tests hold it to torch.optim.AdamW, and it counts its bytes.
    optimizer = tedfx.optim.OneBitAdam(pm, warmup_steps=args.steps + 1 if name == "AdamW" else warmup, **options)
    rate = lambda step: min(1, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / args.steps))  # noqa: E731  as the demo's
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    draw = torch.Generator().manual_seed(args.seed)
    index, count = pm.batch_coordinate
    mine = slice(index * args.batch_size // count, (index + 1) * args.batch_size // count)
    losses, norms, began = [], [], 0.0
    for step in range(args.steps):
        if step == 1:
            began = time.perf_counter()  # the first one compiles
        starts = torch.randint(len(training) - args.sequence_length, (args.batch_size,), generator=draw)
        ids = demo.windows(training, starts[mine], args.sequence_length, "cpu")
        loss = pm(input_ids=ids, labels=ids).loss
        loss.backward()
        if not optimizer.compressed:
            norms.append(float(optimizer.clip_grad_norm_(float("inf"))))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if dist.get_rank() == 0 and (step + 1) % 25 == 0:
            print(f"{name}: step {step + 1}, loss {losses[-1]:.3f}, gradient norm {norms[-1]:.2f}", flush=True)
    seconds = (time.perf_counter() - began) / (args.steps - 1)
    pm.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for starts in torch.linspace(0, len(validation) - args.sequence_length, 256).long().split(args.batch_size):
            ids = demo.windows(validation, starts[mine], args.sequence_length, "cpu")
            logits = pm(input_ids=ids).logits[:, :-1]
            sums += torch.tensor([F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item(), ids[:, 1:].numel()], dtype=torch.float64)
    dist.all_reduce(sums)
    return {
        "losses": losses, "norms": norms, "validation": (sums[0] / sums[1]).item(), "bytes": optimizer.volume.sent, "last": optimizer.volume.last,
        "uncompressed": optimizer.volume.uncompressed, "seconds": seconds, "warmup": warmup, "weights": sum(p.numel() for p in pm.parameters()),
    }  # fmt: skip
