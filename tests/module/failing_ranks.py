"""One rank of a job fails alone, on whatever device is there: `torchrun --nproc-per-node 2 -m
tests.module.failing_ranks HOW`.

For machines with two GPUs (NCCL); where there are none it runs on gloo. Each rank that is not told by
signal prints its line and after how many seconds it had it. HOW: id, labels, size (rank 1's call is
wrong), raises (rank 1's own error between two steps), killed, stopped (SIGKILL, SIGSTOP), small (a mesh
of rank 0 alone, in a world of two).
"""

import datetime
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import tedfx
from tests.module.test_failures import MoE

TIMEOUT = 40


def main(how):
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=datetime.timedelta(seconds=TIMEOUT))
    if how == "small":
        mesh = DeviceMesh(kind, [0], mesh_dim_names=("ep",)) if rank == 0 else None
    else:
        mesh = init_device_mesh(kind, (2,), mesh_dim_names=("ep",))
    losses = []
    if mesh is not None:
        losses = train(mesh, how, rank, kind)
    dist.barrier()
    print(f"rank {rank}: trained {[round(loss, 4) for loss in losses]}", flush=True)


def train(mesh, how, rank, kind):
    pm = tedfx.parallelize(MoE().to(kind), mesh, check_timeout=TIMEOUT)
    optimizer = torch.optim.AdamW(pm.parameters(), lr=1e-2)
    losses = []
    for step in range(4):
        ids = torch.randint(32, (4, 9), generator=torch.Generator().manual_seed(step)).to(kind)
        call, fails = {"input_ids": ids, "labels": ids}, rank == 1 and step == 2
        if fails:
            spoil(how, call)
        start = time.monotonic()
        try:
            loss = pm(**call)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        except Exception:
            print(f"rank {rank}: after {time.monotonic() - start:.1f} s", flush=True)
            raise
    return losses


def spoil(how, call):
    if how == "id":
        call["input_ids"] = call["input_ids"].clone()
        call["input_ids"][1, 3] = 40
    elif how == "labels":
        del call["labels"]
    elif how == "size":
        call["labels"] = call["labels"][:, :5]
    elif how == "raises":
        raise ValueError("the loader's own error")
    elif how in ("killed", "stopped"):
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)


if __name__ == "__main__":
    tedfx.run(main, sys.argv[1])
