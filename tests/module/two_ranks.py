"""The tests of this folder that two ranks can run, on whatever device is there: `torchrun --nproc-per-node 2
-m tests.module.two_ranks`.

For machines with two GPUs (NCCL); where there are none it runs on gloo. Prints a line per test.
"""

import os
import tempfile
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.module import (
    saving,
    test_checks,
    test_compile,
    test_gradients,
    test_module,
    test_saving_resume,
    test_state,
)

_MESHES = {}


def _context(shape, names, groups=()):
    """In place of tests.pool.context: meshes for four ranks become (2, 1)."""
    shape = tuple(shape) if torch.Size(shape).numel() == 2 else (2, *[1] * (len(shape) - 1))
    if (shape, names) not in _MESHES:
        mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", shape, mesh_dim_names=names)
        _MESHES[shape, names] = type("Context", (), {"device_mesh": mesh})
    return _MESHES[shape, names]


def main():
    rank = int(os.environ["RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
    else:
        dist.init_process_group("gloo")
    for module in (
        saving,
        test_checks,
        test_compile,
        test_gradients,
        test_module,
        test_state,
    ):
        module.context = _context
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, src=0)
    meshes = [((2,), ("dp",)), ((2,), ("tp",)), ((1, 2), ("dp", "tp")), ((2, 1), ("dp", "tp"))]
    jobs = [
        (test_module.train, *mesh, options)
        for mesh in meshes
        for options in ({}, {"fused": True}, {"foreach": False})
    ]
    jobs += [(test_gradients.accumulate, order) for order in ("SSS", "nnS", "Snn", "Sn0nS", "nnSznnS")]
    jobs += [(f,) for f in (test_gradients.micro_batches, test_gradients.twice, test_gradients.some_unused)]
    jobs += [
        (f,)
        for f in (
            test_gradients.broken,
            test_gradients.pointers,
            test_gradients.converted,
            test_checks.signatures,
        )
    ]
    jobs += [(test_gradients.buckets, size) for size in (1, 384, 2**20)]
    jobs += [(test_state.round_trip, name) for name in ("dp2", "tp2", "ep2")]
    for number, (saved, loaded) in enumerate([("tp2", "ep2"), ("ep2", "dp2"), ("ep2", "tp2")]):
        jobs += [
            (test_state.save, saved, f"{folder[0]}/{number}"),
            (test_state.load, loaded, f"{folder[0]}/{number}"),
        ]
    jobs += [
        (test_saving_resume.bitwise, f"{folder[0]}/{name}", name, True)
        for name in test_saving_resume.OPTIMIZERS
    ]
    jobs += [
        (test_saving_resume.bitwise, f"{folder[0]}/sync", "adamw", False),
        (test_saving_resume.own_state, f"{folder[0]}/own"),
    ]
    jobs += [(test_compile.compiled, True)]
    for function, *args in jobs:
        start = time.monotonic()
        function(*args)
        if rank == 0:
            print(f"ok {function.__name__}{tuple(args)} {time.monotonic() - start:.2f} s", flush=True)
    if rank == 0:
        print(
            f"{len(jobs)} passed on {'nccl' if torch.cuda.is_available() else 'gloo'}, torch "
            f"{torch.__version__}",
            flush=True,
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
