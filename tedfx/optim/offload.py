"""Whether the host has room for what offload puts there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist

from tedfx.errors import ConfigError

_CGROUP = Path("/sys/fs/cgroup")


def available() -> int:
    """Bytes that the host (or the container's limit) has left: memory that is free or can be freed."""
    found = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found = int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else found
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        found = min(found, int(most) - int(used.read_text()))
    return found


def check_room(
    shares: Iterable[tuple[int, torch.dtype]],
    master_dtype: torch.dtype,
    states: int,
    group,
    device,
    promised: int = 0,
) -> int:
    """ConfigError, on all ranks alike, where some rank's host has no room for masters, `states` states like
    them, and gradients of these (elements, dtype) shares.

    promised: bytes that are still to be taken for other shares; returned with what these will take later
    (states and gradients; masters are made at once). The ranks of a host are counted by LOCAL_WORLD_SIZE,
    which torchrun sets. Collective over `group` (None: one rank).
    """
    masters = later = 0
    for numel, dtype in shares:
        size = max(dtype.itemsize, master_dtype.itemsize)
        masters, later = masters + numel * size, later + numel * (size * states + dtype.itemsize)
    need = masters + later + promised
    ranks, have = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), available()
    short = torch.tensor(int(need * ranks > have), device=device)
    if group is not None:
        dist.all_reduce(short, op=dist.ReduceOp.MAX, group=group)
    if short.item():
        raise ConfigError(
            f'offload="cpu" without room: masters, {states} states and gradients take '
            f"{need / 2**30:.3g} GiB on each of {ranks} ranks of this host, which has "
            f"{have / 2**30:.3g} GiB left (or another host has too little)"
        )
    return promised + later
