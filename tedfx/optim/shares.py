"""One parameter as a sharded optimizer sees it: this rank's share, its master weights, and where the share
lies in the parameter.

The optimizer works on flat elements of the share, in the order of the share's own shape. Where these lie next
to each other in the parameter (always at ZeRO's stages 0 and 3, and wherever the share is cut from the first
dim) a float32 or float64 parameter is its own master, with no copy. Where they do not (stages 1 and 2,
another dim) such a parameter is still its own master: a tile of it is copied out, updated and copied back, so
that what is extra is a tile and not the share. A parameter of fewer bytes per element than the master dtype
(bfloat16, float16) has a master of its own, of the share only; so has every parameter under offload, on the
host.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tedfx import _torch
from tedfx.errors import TedfxError
from tedfx.state.parameters import Placed

Slot = tuple[Tensor, Any]
"""(a tensor on the host, an event after which it is there, or None)"""


class Share:
    """This rank's share of one parameter.

    master  [share.numel], on the optimizer's device, or None where the parameter itself is it.
    homes   key -> [share.numel]: the optimizer's states.
    tiles   the `Tile`s that it is cut into, in order; set by who cuts.
    """

    def __init__(
        self, name: str, placed: Placed, parameter: nn.Parameter, master_dtype: torch.dtype, host: bool
    ):
        self.name, self.placed, self.parameter, self.host = name, placed, parameter, host
        self.numel, self.tiles, self.homes = placed.share.numel, [], {}
        self.widened = parameter.dtype.itemsize < master_dtype.itemsize
        self.dtype = master_dtype if self.widened else parameter.dtype
        self.master = None
        # (gradient on the host, an event or None); one to be added to it; those of which the copy may be
        # under way
        self._host: Slot | None = None
        self._more: Slot | None = None
        self._pending: list[Slot] = []
        self.has_taken = False
        if self.widened or host:
            pinned = host and parameter.device.type != "cpu"
            self.master = torch.empty(
                self.numel, dtype=self.dtype, device="cpu" if host else parameter.device, pin_memory=pinned
            )
            self.read(0, self.numel, self.master)
        self.seen = self.version()

    @property
    def device(self) -> torch.device:
        """Where the update runs."""
        return torch.device("cpu") if self.host else self.parameter.device

    @property
    def travels(self) -> bool:
        """Whether the updated shares have to be gathered into the parameter."""
        return self.placed.kept is not self.placed.share

    def local(self) -> Tensor:
        """The parameter's own local tensor, not a copy that counts its versions apart, as `detach` of a
        DTensor gives."""
        return _torch.piece_of(self.parameter)

    def version(self) -> tuple[int, int]:
        """Changes whenever the parameter's values are written to, or its storage is another."""
        local = self.local()
        return local.data_ptr(), _torch.version_of(local)

    # ---- the share inside the parameter --------------------------------------------------------------------

    def rows(self, rank: int | None = None) -> Tensor:
        """The share, or that of another rank of the reduce axes, in this rank's parameter: [outer, elements
        next to each other], a view."""
        local, placed = self.local(), self.placed
        if not self.travels:
            return local.view(1, -1)
        dim = placed.share_dim
        assert dim is not None, self.name  # what travels is a part of the parameter
        outer, inner = prod(placed.local_held[:dim]), prod(placed.local_held[dim + 1 :])
        start, length = placed.share_cut.piece(placed.index if rank is None else rank)
        return local.view(outer, placed.local_held[dim] * inner).narrow(1, start * inner, length * inner)

    def flat(self) -> Tensor | None:
        """The share in the parameter as one flat view, or None where its elements are apart."""
        rows = self.rows()
        return rows.view(-1) if rows.is_contiguous() else None

    def read(self, start: int, stop: int, out: Tensor) -> Tensor:
        for a, b, part in runs(self.rows(), start, stop):
            out[a:b].view(part.shape).copy_(part)
        return out

    def write(self, start: int, stop: int, values: Tensor, asynchronous: bool = False) -> None:
        """values[stop - start], rounded to the parameter's dtype."""
        for a, b, part in runs(self.rows(), start, stop):
            part.copy_(values[a:b].view(part.shape), non_blocking=asynchronous)

    def follow(self, step: int) -> None:
        """Take over values that somebody else wrote into the parameter since the last update (a loaded state
        dict), `step` elements at a time.

        A master that rounds to the parameter's value is kept: it is the more exact one.
        """
        if self.master is None or self.version() == self.seen:
            return
        for start in range(0, self.numel, step):
            mine = self.master[start : start + step]
            theirs = self.read(
                start,
                start + len(mine),
                torch.empty(len(mine), dtype=self.parameter.dtype, device=mine.device),
            )
            mine.copy_(torch.where(mine.to(theirs.dtype) == theirs, mine, theirs.to(mine.dtype)))
        self.seen = self.version()

    # ---- the gradient --------------------------------------------------------------------------------------

    def gradient(self) -> Tensor | None:
        """[share.numel], as backward left it, on the device or, where it was taken, on the host; None where
        there is none."""
        left, taken = self._left(), self.taken()
        if left is None or taken is None:
            return left if taken is None else taken
        return taken + left.to(taken.device)

    def _left(self) -> Tensor | None:
        """What is in `.grad`."""
        grad = self.parameter.grad
        if grad is None:
            return None
        if not isinstance(grad, DTensor):
            raise TedfxError(
                f"the gradient of {self.name} is no DTensor: gradients of a ParallelModule are those "
                "that its backward makes"
            )
        placements, placed = tuple(grad.placements), self.placed
        if placements == placed.share.placements:
            return grad.to_local().reshape(-1)
        if placements == placed.whole.placements:
            return placed.share_of(grad.to_local().contiguous()).reshape(-1)
        if placements == placed.unsynced:
            raise TedfxError(
                f"the gradient of {self.name} is not summed over {placed.reduce_axes} yet: the last "
                "backward before a step runs outside of no_sync()"
            )
        raise TedfxError(
            f"the gradient of {self.name} has placements {placements}, expected {placed.share.placements}"
        )

    # ---- a gradient on the host ----------------------------------------------------------------------------

    def take(self, value: Tensor) -> None:
        """Start to copy a summed gradient to the host, where it is added to what is there. On the current
        stream."""
        if self._host is not None and self._host[0].dtype != value.dtype:
            self._host = None
        if self.has_taken:  # the last one has arrived long ago
            self._add_up()
            slot = self._more = self._copied(value, self._more)
        else:
            slot = self._host = self._copied(value, self._host)
            self.has_taken = True
        self._pending.append(slot)

    def _copied(self, value: Tensor, into: Slot | None) -> Slot:
        cuda = value.device.type != "cpu"
        held = (
            into[0]
            if into is not None and into[0].dtype == value.dtype
            else torch.empty(self.numel, dtype=value.dtype, pin_memory=cuda)
        )
        held.copy_(value, non_blocking=True)
        event = torch.get_device_module(value.device).Event() if cuda else None
        if event is not None:
            event.record()
        return held, event

    def _add_up(self) -> Tensor:
        """The sum on the host of all that was taken."""
        if self._host is None:
            raise TedfxError(f"no gradient of {self.name} was taken")
        total = self._host[0]
        for held, event in self._pending:
            if event is not None:
                event.synchronize()
            if held is not total:
                total.add_(held)
        self._pending = []
        return total

    def taken(self) -> Tensor | None:
        """[share.numel] on the host, as far as backward has come; None where there is none."""
        if not self.has_taken:
            return None
        return self._add_up()

    def drop(self, zero: bool = False) -> None:
        """Forget the gradient on the host, or make it zero; its memory is kept for the next one."""
        if self.has_taken:
            total = self._add_up()
            if zero:
                total.zero_()
        self.has_taken = self.has_taken and zero

    # ---- as the user's tensors -----------------------------------------------------------------------------

    def dtensor(self, flat: Tensor) -> DTensor:
        """A tensor of the share's elements as a DTensor in the parameter's held shape, of the same
        storage."""
        return self.placed.dtensor(flat.view(self.placed.share.shape), self.placed.share.placements)

    @property
    def names(self) -> tuple[str, ...]:
        """The user's names: those of a stack's sources, the first of a tied tensor's."""
        layout = self.placed.layout
        return layout.sources or (layout.name,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each of the user's tensors."""
        return self.placed.layout.user_shape


def runs(rows: Tensor, start: int, stop: int) -> Iterator[tuple[int, int, Tensor]]:
    """Elements [start, stop) of rows[outer, w] in order, as at most three views: (a, b, view of elements
    [start + a, start + b))."""
    if start >= stop:
        return
    if rows.is_contiguous():
        yield 0, stop - start, rows.view(-1)[start:stop]
        return
    width, at = rows.shape[1], start
    while at < stop:
        row, column = divmod(at, width)
        if column == 0 and stop - at >= width:
            many = (stop - at) // width
            part = rows[row : row + many]
        else:
            part = rows[row, column : min(width, column + stop - at)]
        yield at - start, at - start + part.numel(), part
        at += part.numel()
