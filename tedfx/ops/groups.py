"""Process groups of the ranks of a mesh, which may be fewer than those of the job."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from tedfx.errors import TedfxError

__all__ = ["begun", "group_among"]


def begun(work: dist.Work | None) -> dist.Work:
    """What a collective of torch.distributed gives with `async_op=True`, on a rank of its group."""
    if work is None:
        raise TedfxError(f"rank {dist.get_rank()} asks for a collective of a group that it is not in")
    return work


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
        group = dist.new_group(mine, use_local_synchronization=True, **options)
    else:
        made = {tuple(row): dist.new_group(list(row), **options) for row in rows}
        group = made[tuple(mine)]
    if not isinstance(group, dist.ProcessGroup):
        raise TedfxError(f"torch made no group of ranks {mine} for rank {here}, which is one of them")
    return group
