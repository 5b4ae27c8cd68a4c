"""1-bit Adam beside AdamW: the demo's model and text (examples/pretrain.py), trained from the same seeds on
gloo ranks of this machine; losses, bytes, and the report docs/onebit.md.

    python benchmarks/onebit.py --out benchmarks/results/onebit.jsonl --write docs/onebit.md

Both runs have the demo's model, batches, schedule, betas and weight decay, in float32 and without clipping
(no rank has the global gradient after the warm-up), under data parallelism alone: every gradient is summed
over all ranks. Bytes are `OneBitAdam.volume`, per rank by the ring formulas. AdamW is OneBitAdam in a warm-up
that does not end: the tests hold that to torch.optim.AdamW, and it counts its bytes. FrozenAdam is OneBitAdam
with an all-reduce of the momentum in place of the compressed mean: what the frozen variance alone does to the
loss. A line per run is appended to --out (`--only AdamW` makes one of them); --write makes the report of the
latest line of each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
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
RUNS = ("AdamW", "FrozenAdam", "OneBitAdam")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument(
        "--warmup",
        type=float,
        default=0.15,
        help="share of the steps before the variance is frozen (default: 0.15)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, help="sequences per step over all ranks (default: 16)"
    )
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=RUNS, help="one of the runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are appended to it")
    parser.add_argument("--write", type=Path, metavar="FILE", help="where the report goes")
    return parser.parse_args(argv)


def pretrain():
    """examples/pretrain.py as a module."""
    spec = importlib.util.spec_from_file_location("pretrain", ROOT / "examples" / "pretrain.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["pretrain"] = module
    spec.loader.exec_module(module)
    return module


def exact_mean(self, values, have):
    """In place of `CompressedMean.mean`: the same mean, without loss."""
    for value in values:
        dist.all_reduce(value, group=self.group)
    self.sent = {"all_reduce": sum(value.nbytes for value in values)}
    return [value / self.ranks for value in values]


def train(rank: int, port: int, args: argparse.Namespace, name: str) -> None:
    import tedfx
    from tedfx.optim.compression import CompressedMean

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.ranks)
    mesh = init_device_mesh("cpu", (args.ranks,), mesh_dim_names=("dp",))
    demo = pretrain()
    training, validation = demo.read_corpus(args.seed)
    torch.manual_seed(args.seed)
    pm = tedfx.parallelize(demo.make_model("mixtral", []).train(), mesh)
    warmup = args.steps + 1 if name == "AdamW" else round(args.warmup * args.steps)
    if name == "FrozenAdam":
        CompressedMean.mean = exact_mean
    optimizer = tedfx.optim.OneBitAdam(
        pm, warmup_steps=warmup, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    rate = lambda step: (
        min(1, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / args.steps))
    )  # as the demo's
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    draw = torch.Generator().manual_seed(args.seed)
    index, count = pm.batch_coordinate
    mine = slice(index * args.batch_size // count, (index + 1) * args.batch_size // count)

    losses, began = [], 0.0
    for step in range(args.steps):
        if step == 1:
            began = time.perf_counter()  # the first one compiles
        starts = torch.randint(len(training) - args.sequence_length, (args.batch_size,), generator=draw)
        ids = demo.windows(training, starts[mine], args.sequence_length, "cpu")
        loss = pm(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if rank == 0 and (step + 1) % 25 == 0:
            print(f"{name}: step {step + 1} of {args.steps}, loss {losses[-1]:.3f}", flush=True)
    seconds = (time.perf_counter() - began) / (args.steps - 1)

    pm.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for starts in (
            torch.linspace(0, len(validation) - args.sequence_length, 512).long().split(args.batch_size)
        ):
            ids = demo.windows(validation, starts[mine], args.sequence_length, "cpu")
            logits = pm(input_ids=ids).logits[:, :-1]
            sums += torch.tensor(
                [
                    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item(),
                    ids[:, 1:].numel(),
                ],
                dtype=torch.float64,
            )
    dist.all_reduce(sums)
    if rank == 0:
        volume = optimizer.volume
        row = {
            "run": name,
            "losses": losses,
            "validation": (sums[0] / sums[1]).item(),
            "bytes": volume.sent,
            "last": volume.last,
            "uncompressed": volume.uncompressed,
            "warmup": warmup,
            "weights": sum(p.numel() for p in pm.parameters()),
            "torch": torch.__version__,
            "seconds": seconds,
            **{k: v for k, v in vars(args).items() if k not in ("out", "write", "only", "warmup")},
        }
        with open(args.out, "a") as out:
            print(json.dumps(row), file=out)
    dist.barrier()
    dist.destroy_process_group()


def report(args: argparse.Namespace) -> str:
    rows = {row["run"]: row for row in map(json.loads, args.out.read_text().splitlines())}
    adam, frozen, onebit = (rows[name] for name in RUNS)
    alike = ("ranks", "steps", "batch_size", "sequence_length", "lr", "seed", "torch")
    if any([row[key] for key in alike] != [adam[key] for key in alike] for row in (frozen, onebit)):
        raise SystemExit("the latest runs are of different options: make all anew")
    steps, share = adam["steps"], onebit["warmup"] / adam["steps"]
    marks = sorted({onebit["warmup"], *range(25, steps + 1, 25), steps})
    mean = lambda row, step: sum(row["losses"][max(0, step - 10) : step]) / min(step, 10)
    table = [
        f"| {step}{' (freeze)' if step == onebit['warmup'] else ''} | {mean(adam, step):.3f} | "
        f"{mean(frozen, step):.3f} | {mean(onebit, step):.3f} |"
        for step in marks
    ]
    per_step = adam["last"] / onebit["last"]
    return "\n".join(
        [
            "# 1-bit Adam beside AdamW",
            "",
            f"The demo's Mixtral ({adam['weights'] / 1e6:.1f} million parameters) on the demo's text, "
            f"byte by byte: {adam['ranks']} gloo ranks (dp={adam['ranks']}), {steps} steps of "
            f"{adam['batch_size']} x "
            f"{adam['sequence_length']} bytes, float32, same seeds and batches, peak learning rate "
            f"{adam['lr']:g}, betas (0.9, 0.95), weight decay 0.1, no clipping. "
            f"`OneBitAdam(warmup_steps={onebit['warmup']})` "
            f"({100 * share:.0f} % of the run). Torch {adam['torch']}.",
            "",
            "    python benchmarks/onebit.py --out benchmarks/results/onebit.jsonl --write docs/onebit.md"
            + "".join(
                f" --{k.replace('_', '-')} {adam[k]}"
                for k in alike[:-1]
                if adam[k] != parse_args(["--out", "x"]).__dict__[k]
            ),
            "",
            "Training loss (nats per byte with the model's router loss, mean of the ten steps up to "
            "there), then the loss on held-out text, and bytes that a rank sends for gradients and "
            "momenta:",
            "",
            "| step | AdamW | variance frozen, momentum summed exactly | 1-bit Adam |",
            "|---|---|---|---|",
            *table,
            f"| validation | {adam['validation']:.3f} | {frozen['validation']:.3f} | "
            f"{onebit['validation']:.3f} |",
            f"| bytes per rank, the run | {adam['bytes'] / 1e6:.1f} MB | {frozen['bytes'] / 1e6:.1f} MB "
            f"| {onebit['bytes'] / 1e6:.1f} MB, {adam['bytes'] / onebit['bytes']:.2f} times fewer |",
            f"| bytes per rank, the last step | {adam['last'] / 1e6:.3f} MB | "
            f"{frozen['last'] / 1e6:.3f} MB | {onebit['last'] / 1e6:.3f} MB, {per_step:.1f} times fewer "
            "|",
            "",
            f"Of the {onebit['validation'] - adam['validation']:.3f} nats by which 1-bit Adam is behind "
            f"on held-out text, {frozen['validation'] - adam['validation']:.3f} come of the variance "
            f"being frozen after {onebit['warmup']} "
            "steps, and the rest of the compression.",
            "",
            "Gradients here have 32 bits, so a compressed step sends up to 32 times less, and the run "
            f"up to 1 / ({share:.2f} + {1 - share:.2f} / 32) = {1 / (share + (1 - share) / 32):.2f}. Of "
            "16-bit gradients it is "
            "16 times, and 1 / (0.15 + 0.85 / 16) = 4.92 over a run with 15 % warm-up "
            "(`tests/optim/test_onebit.py` counts it on the collectives: 3 and 17 steps of a bfloat16 "
            "model). The rest is scales (4 bytes "
            "per tensor, rank and direction), a flag per parameter, and padding to whole bytes. One "
            "seed, a small model, and a CPU: bytes are exact, losses are this run's.",
            "",
        ]
    )


def main() -> None:
    args = parse_args()
    for name in RUNS if args.only is None else (args.only,):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(train, (port, args, name), nprocs=args.ranks)
    if args.write:
        args.write.write_text(report(args))


if __name__ == "__main__":
    main()
