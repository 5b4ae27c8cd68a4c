"""Process groups of the ranks of a mesh, which may be fewer than those of the job."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

__all__ = ["group_among"]


def group_among(rows: Sequence[Sequence[int]], **options) -> dist.ProcessGroup:
    """The group of this rank's row, for disjoint rows of ranks of which this rank is in one; options are
    those of `dist.new_group`.

    Where the rows are the whole job every rank makes every group, in the same order. Where some ranks are in
    none of them, they are not here to take part: then the ranks of a row make its group among themselves.
    Collective over the rows.
    """
    here = dist.get_rank()
    mine = next(list(row) for row in rows if here in row)
    if sum(map(len, rows)) < dist.get_world_size():
        return dist.new_group(mine, use_local_synchronization=True, **options)
    made = {tuple(row): dist.new_group(list(row), **options) for row in rows}
    return made[tuple(mine)]
