"""Bytes that a rank sends for gradients and momenta: counted from what collectives were given, by the
formulas of rings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tedfx.optim.shares import Share
from tedfx.runtime.gradients import GradientBoundary


@dataclass(frozen=True)
class Volume:
    """steps: counted so far. sent: bytes in all of them; last: in the last one. uncompressed: what
    all-reduces of the gradients, in their own dtype, would have sent. ratio: uncompressed / sent."""

    steps: int = 0
    sent: float = 0.0
    last: float = 0.0
    uncompressed: float = 0.0

    def after(self, sent: float, uncompressed: float) -> Volume:
        return Volume(self.steps + 1, self.sent + sent, sent, self.uncompressed + uncompressed)

    @property
    def ratio(self) -> float:
        return self.uncompressed / self.sent if self.sent else 1.0


def ring_bytes(collective: str, size: int, ranks: int) -> float:
    """Bytes that a rank of `ranks` sends, in a ring, for a collective over a tensor of `size` bytes: the
    whole tensor, so the input of an all-reduce, reduce-scatter or all-to-all, and the output of an
    all-gather."""
    return size * (ranks - 1) / ranks * (2 if collective == "all_reduce" else 1)


def reduced(boundary: GradientBoundary) -> float:
    """Bytes of the last backward that summed gradients, the counts of who has one (an int32 for each)
    included."""
    sent, names = 0.0, {}
    for reduction in boundary.reductions:
        sent += ring_bytes(
            reduction.op, reduction.bytes, dist.get_world_size(boundary.groups[reduction.axes])
        )
        names[reduction.axes] = names.get(reduction.axes, 0) + len(reduction.names)
    return sent + sum(
        ring_bytes("all_reduce", 4 * count, dist.get_world_size(boundary.groups[axes]))
        for axes, count in names.items()
    )


def uncompressed(boundary: GradientBoundary, shares: Iterable[Share]) -> float:
    """Bytes of all-reduces of these gradients, of those that some program uses."""
    summed = [share for share in shares if share.placed.reduce_axes and share.name in boundary.used]
    return sum(
        ring_bytes(
            "all_reduce",
            share.numel * gradient_dtype(boundary, share).itemsize,
            dist.get_world_size(boundary.groups[share.placed.reduce_axes]),
        )
        for share in summed
    )


def gradient_dtype(boundary: GradientBoundary, share: Share) -> torch.dtype:
    return boundary.gradient_dtype or share.parameter.dtype
