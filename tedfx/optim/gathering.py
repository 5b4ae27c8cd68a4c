"""After an update under ZeRO: the ranks' shares of a parameter go back into the whole parameter of each,
bucket by bucket, beside the tiles that are still to come.

One bucket is under way at a time, and its buffer is all the memory that is needed. On a GPU a stream of its
own runs gathers and copies one after the other, so that neither the host nor the update waits for them. A
parameter larger than a bucket is gathered in place where its shares lie one behind the other, else in ranges.

The order of the gathers is that of the parameters. It is the same on all ranks of a group, also where their
shares are cut into tiles differently or are empty.
"""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from torch import Tensor

from tedfx import _torch
from tedfx.ops.groups import begun
from tedfx.optim.shares import Share, runs


class Gathering:
    """The gathers of one step after the other. groups: reduce axes -> process group. bucket_bytes: of a whole
    local parameter's elements that travel together."""

    def __init__(self, groups, device: torch.device, bucket_bytes: int):
        self._groups, self._device, self._bucket_bytes = groups, device, bucket_bytes
        self._stream = torch.get_device_module(device).Stream(device) if device.type != "cpu" else None
        self._filling: dict[tuple, list[Share]] = {}
        # The gather under way, and what it is of: ((share, start, stop), rows[ranks, stop - start]); nothing
        # where it gathers into the parameter itself.
        self._flying: tuple[dist.Work, list[tuple[tuple[Share, int, int], Tensor]]] | None = None

    def add(self, share: Share) -> None:
        """The share is updated: its parameter may be gathered."""
        if not share.travels:
            return
        kind, limit = (share.placed.reduce_axes, share.parameter.dtype), self._bucket_bytes
        if sum(_bytes(each) for each in [*self._filling.get(kind, []), share]) > limit:
            self._close(kind)
        if _bytes(share) <= limit:
            self._filling.setdefault(kind, []).append(share)
            return
        placed = share.placed
        if share.rows().is_contiguous() and placed.share_cut.even:
            self._launch(kind, [share], whole=True)
            return
        step = max(limit // (len(placed.share_cut.lengths) * share.parameter.dtype.itemsize), 1)
        for start in range(0, placed.share_cut.width, step):
            self._launch(kind, [(share, start, min(start + step, placed.share_cut.width))])

    def finish(self) -> None:
        """All parameters are whole again (on a GPU: for whatever is queued from here on)."""
        for kind in list(self._filling):
            self._close(kind)
        with self._aside(join=False):
            self._land()
        if self._stream is not None:
            torch.get_device_module(self._device).current_stream().wait_stream(self._stream)

    def _close(self, kind) -> None:
        shares = self._filling.pop(kind, [])
        if shares:
            self._launch(kind, [(share, 0, share.placed.share_cut.width) for share in shares])

    @contextlib.contextmanager
    def _aside(self, join: bool = True):
        """On the stream of the gathers, behind what the current one has been given."""
        if self._stream is None:
            yield
            return
        module = torch.get_device_module(self._device)
        if join:
            self._stream.wait_stream(module.current_stream())
        with module.stream(self._stream):
            yield

    def _launch(self, kind, parts, whole: bool = False) -> None:
        with self._aside():
            self._land()
            group = self._groups[kind[0]]
            if whole:
                (share,) = parts
                work = _torch.gather_into(
                    share.local().view(-1), share.rows().view(-1), group=group, async_op=True
                )
                self._flying = begun(work), []
                return
            width = sum(stop - start for _, start, stop in parts)
            mine = torch.zeros(width, dtype=kind[1], device=self._device)
            at = 0
            for share, start, stop in parts:
                for a, b, part in runs(share.rows(), start, min(stop, share.numel)):
                    mine[at + a : at + b].view(part.shape).copy_(part)
                at += stop - start
            rows = mine.new_empty(len(parts[0][0].placed.share_cut.lengths), width)
            work = _torch.gather_into(rows.view(-1), mine, group=group, async_op=True)
            widths = [stop - start for _, start, stop in parts]
            self._flying = begun(work), list(zip(parts, rows.split(widths, dim=1)))

    def _land(self) -> None:
        if self._flying is None:
            return
        (work, parts), self._flying = self._flying, None
        work.wait()
        for (share, start, stop), rows in parts:
            _collect(share, rows, start, stop)


def _collect(share: Share, rows: Tensor, start: int, stop: int) -> None:
    """rows[ranks, stop - start]: elements [start, stop) of every rank's share, into the parameter."""
    placed = share.placed
    if start == 0 and stop == placed.share_cut.width:
        placed.share_cut.collect(rows, out=share.local())
        return
    for rank, row in enumerate(rows):
        target = share.rows(rank)
        for a, b, part in runs(target, start, min(stop, target.numel())):
            part.copy_(row[a:b].view(part.shape))


def _bytes(share: Share) -> int:
    return share.placed.share_cut.width * len(share.placed.share_cut.lengths) * share.parameter.dtype.itemsize
