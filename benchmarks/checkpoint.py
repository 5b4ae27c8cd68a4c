"""What checksums of a checkpoint cost: seconds per GB of saving and loading, with them and without, on this
disk, in one process.

    python benchmarks/checkpoint.py --gb 1 --folder /tmp

One rank (on the GPU, if there is one) saves and loads linear layers of float32 and nothing else, several
times; the least time of each counts. Files are in the page cache when they are read, so a load from a disk
costs more, and its checksums less beside it. `crc32`: the sum alone, of bytes in memory.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import tedfx
from tedfx.saving import checksums as checkpoint_checksums
from tedfx.saving.checksums import Sum

WIDTH = 4096


def least(act, times: int) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        act()
        found.append(time.perf_counter() - start)
    return min(found)


def main() -> None:
    about, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gb", type=float, default=1.0, metavar="X", help="size of the checkpoint (default: 1)"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=None,
        metavar="DIR",
        help="where it is written and removed again (default: the system's for temporary files)",
    )
    parser.add_argument("--times", type=int, default=4, metavar="N", help="of each measurement (default: 4)")
    args = parser.parse_args()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("gloo" if kind == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    layers = max(1, round(args.gb * 1e9 / (4 * WIDTH * WIDTH)))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    pm = tedfx.parallelize(
        model.to(kind),
        init_device_mesh(kind, (1,), mesh_dim_names=("dp",)),
        example_inputs={"input": torch.zeros(2, WIDTH, device=kind)},
    )
    optimizer = torch.optim.SGD(pm.parameters(), lr=0.1)
    size = sum(p.numel() * 4 for p in model.parameters()) / 1e9
    place = Path(tempfile.mkdtemp(dir=args.folder))
    rows = {}
    try:
        step = iter(range(1000))
        save = lambda folder: (
            lambda: tedfx.Checkpointer(place / folder, pm, optimizer, keep=1).save(next(step))
        )
        rows["save"] = least(save("with"), args.times)
        after, checkpoint_checksums.Sum.after = (
            checkpoint_checksums.Sum.after,
            lambda self, data: Sum(self.bytes + memoryview(data).nbytes, 0),
        )
        rows["save without"] = least(save("without"), args.times)
        checkpoint_checksums.Sum.after = after
        for name, verify in (("load", True), ("load without", False)):
            rows[name] = least(
                tedfx.Checkpointer(place / "with", pm, optimizer, verify=verify).load, args.times
            )
        data = torch.zeros(2**28, dtype=torch.uint8).random_().numpy()
        rows["crc32"] = least(lambda: zlib.crc32(data), args.times) / (data.nbytes / 1e9) * size
    finally:
        shutil.rmtree(place)
        dist.destroy_process_group()
    print(f"{size:.2f} GB, {kind}, torch {torch.__version__}")
    for name, seconds in rows.items():
        print(f"{name:<14} {seconds / size:6.2f} s/GB")


if __name__ == "__main__":
    main()
