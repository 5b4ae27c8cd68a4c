"""Which gradients travel together, and over which process groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from tedfx.ops.groups import group_among
from tedfx.state.parameters import Placed


@dataclass(frozen=True)
class Bucket:
    """Parameters whose gradients travel together."""

    axes: tuple[str, ...]
    dtype: torch.dtype
    scattered: bool  # by reduce-scatter, each rank its share
    names: tuple[str, ...]


@dataclass
class Flight:
    """A bucket under way. flat: what it becomes; have: whether this rank has a gradient, per name; rows: what
    a reduce-scatter reads; landed: it has gone where it belongs."""

    bucket: Bucket
    flat: Tensor | None
    have: list[bool]
    work: dist.Work
    rows: Tensor | None
    landed: bool = False

    def land(self) -> tuple[Tensor, Tensor | None]:
        """(flat, rows), which are let go of here."""
        flat, rows = self.flat, self.rows
        assert flat is not None and not self.landed
        self.landed, self.flat, self.rows = True, None, None
        return flat, rows


@dataclass(frozen=True)
class Reduction:
    """One bucket that was summed in the last synced backward."""

    axes: tuple[str, ...]
    names: tuple[str, ...]
    bytes: int
    overlapped: bool  # launched while backward was running
    op: str = "all_reduce"


_Kind: TypeAlias = tuple[tuple[str, ...], torch.dtype, bool]
"""The axes of a sum, the dtype that it is made in, and whether it is scattered: those of one bucket."""


def pack_buckets(
    summed: Iterable[tuple[str, torch.dtype]], placed: Mapping[str, Placed], bucket_bytes: int
) -> list[Bucket]:
    """Buckets of (name, dtype of its gradient), given in order of use: filled in the reverse; a bucket's
    place is that of its last member."""
    filling: dict[_Kind, list[str]] = {}
    filled: dict[_Kind, int] = {}
    done: list[Bucket] = []

    def close(kind: _Kind) -> None:
        if filling.get(kind):
            done.append(Bucket(*kind, tuple(filling.pop(kind))))
            filled[kind] = 0

    last: dict[str, int] = {}
    for name, dtype in reversed(list(summed)):
        each = placed[name]
        kind, size = (each.reduce_axes, dtype, each.share_dim is not None), each.whole.numel * dtype.itemsize
        if filled.get(kind, 0) + size > bucket_bytes:
            close(kind)
        filling.setdefault(kind, []).append(name)
        filled[kind] = filled.get(kind, 0) + size
        last[name] = len(last)
    for kind in list(filling):
        close(kind)
    return sorted(done, key=lambda bucket: last[bucket.names[-1]])


_GROUPS: dict[tuple, dist.ProcessGroup] = {}


def new_group(mesh, axes: tuple[str, ...]) -> dist.ProcessGroup:
    """A group of this rank over `axes`, apart from the mesh's own; shared between modules. Collective over
    the mesh."""
    picked = [mesh.mesh_dim_names.index(axis) for axis in axes]
    kept = [dim for dim in range(mesh.mesh.dim()) if dim not in picked]
    size = torch.Size(mesh.mesh.shape[dim] for dim in picked).numel()
    rows = sorted(sorted(row) for row in mesh.mesh.permute(kept + picked).reshape(-1, size).tolist())
    key = (dist.group.WORLD, tuple(map(tuple, rows)))
    if key not in _GROUPS:
        _GROUPS[key] = group_among(rows, group_desc="tedfx_gradients_" + "_".join(axes))
    return _GROUPS[key]
