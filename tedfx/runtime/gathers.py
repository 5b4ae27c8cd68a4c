"""What an eager call under ZeRO-3 keeps of its parameters between forward and backward: nothing but notes.

A `Store` belongs to one forward. It launches the gather of a bucket (`ops.gather_parameters`) before it is
asked for, and while autograd records the forward it saves a note in place of every whole parameter
(`torch.autograd.graph.saved_tensors_hooks`): which bucket, which part. Backward then gathers the bucket once
more, the one it will need next already in flight, and lets go of it when the bucket's gradients have come.
Those go, whole, to the gradient boundary, which sums and scatters them in buckets of its own as it does at
stage 2; so accumulation without communication (`no_sync`) is the same at every stage.

Order is the same on all ranks: that of the graph in forward, the reverse in backward, where a bucket of which
nothing was saved is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tedfx import _torch
from tedfx.ops import context
from tedfx.ops.cuts import Cut
from tedfx.ops.gather import GATHER, pack, wholes
from tedfx.ops.groups import begun


@dataclass(frozen=True)
class Gathered:
    """One `gather_parameters` of a graph. names: of the layouts; inside: it stands in a recompute region,
    which gathers again by itself; calls: how many micro-batches ask for it."""

    axes: tuple[str, ...]
    cuts: tuple[Cut, ...]
    names: tuple[str, ...]
    inside: bool
    calls: int = 1


@dataclass
class _Note:
    number: int
    index: int
    size: tuple
    stride: tuple
    offset: int | torch.SymInt


@dataclass
class _Flight:
    out: Tensor
    work: dist.Work


class Store:
    """The gathers of one forward and its backward.

    gathers: all of the graph, in order. shares: layout name -> this rank's share. deliver(name, gradient
    of the whole local tensor), called once a backward for each. ahead: how many gathers are in flight beyond
    the one that is used. sum_dtype: what several gradients of a parameter are added up in, by default their
    own.

    Micro-batches that run layer by layer (`tedfx/runtime/layered.py`) call each gather one after another: the
    first makes it, the last lets go of it, in both directions.
    """

    def __init__(
        self,
        gathers: Sequence[Gathered],
        shares: dict[str, Tensor],
        ranks: context.RankContext,
        deliver: Callable[[str, Tensor], None],
        ahead: int = 1,
        sum_dtype: torch.dtype | None = None,
    ):
        self.gathers, self.shares, self.ranks, self._deliver, self.ahead, self._sum_dtype = (
            gathers,
            shares,
            ranks,
            deliver,
            ahead,
            sum_dtype,
        )
        self._flying: dict[int, _Flight] = {}
        self._live: dict[int, tuple[StorageWeakRef, int, int]] = {}  # storage address -> whose it is
        self._saved: set[int] = {i for i, each in enumerate(gathers) if each.inside}
        self._held: dict[
            int, tuple[list[Tensor], int]
        ] = {}  # in forward: what is still to be asked for, and how often
        self._again: dict[int, list[Tensor]] = {}
        self._taken: set[int] = set()  # in this backward
        self._frozen = {
            i for i, each in enumerate(gathers) if not any(shares[name].requires_grad for name in each.names)
        }
        self._uses: dict[str, int] = {}
        self._calls = {i: each.calls for i, each in enumerate(gathers)}
        for each in gathers:
            for name in each.names:
                if shares[name].requires_grad:
                    self._uses[name] = self._uses.get(name, 0) + each.calls
        self._missing: dict[str, int] = {}
        self._sums: dict[str, Tensor] = {}

    # ---- gathering -----------------------------------------------------------------------------------------

    def gather(self, number: int, shares: Sequence[Tensor]) -> list[Tensor]:
        """What `ops.gather_parameters` gives in a call that has a store."""
        if torch.is_grad_enabled() and any(x.requires_grad for x in shares):
            return list(_Through.apply(self, number, *shares))
        return self._whole(number)

    def _whole(self, number: int) -> list[Tensor]:
        """The bucket's whole tensors for one call of its gather."""
        if _torch.backward_id() != -1:
            return self._for_backward(number)
        made, left = self._held.pop(number, (None, self.gathers[number].calls))
        made = self._take(number) if made is None else made
        if left > 1:
            self._held[number] = made, left - 1
        return [whole.detach() for whole in made]  # each call has tensors of its own, of the same storage

    def _for_backward(self, number: int) -> list[Tensor]:
        """The same in backward, until the bucket's gradients have come. Of a frozen bucket none come: it goes
        when one before it is asked for."""
        if number not in self._again:
            for other in [i for i in self._again if i in self._frozen and i > number]:
                del self._again[other]
            self._again[number] = self._take(number)
        return [whole.detach() for whole in self._again[number]]

    def _launch(self, number: int) -> None:
        if number not in self._flying:
            each = self.gathers[number]
            row = pack([self.shares[name].detach() for name in each.names], each.cuts)
            context.record(GATHER, each.axes, "forward", row)
            out = row.new_empty(self.ranks.size(each.axes), row.numel())
            self._flying[number] = _Flight(
                out,
                begun(
                    _torch.gather_into(out.view(-1), row, group=self.ranks.group(each.axes), async_op=True)
                ),
            )

    def _take(self, number: int) -> list[Tensor]:
        """The bucket's whole tensors; the next one's gather starts."""
        self._launch(number)
        backward = _torch.backward_id() != -1
        if (
            backward
        ):  # a region takes its buckets in forward order, so those behind this one may have been taken
            self._taken.add(number)
            following = [i for i in range(number - 1, -1, -1) if i in self._saved and i not in self._taken]
        else:
            following = range(number + 1, len(self.gathers))
        for other in following[: self.ahead]:
            self._launch(other)
        flight = self._flying.pop(number)
        flight.work.wait()
        made = wholes(flight.out, self.gathers[number].cuts)
        for index, whole in enumerate([] if backward else made):
            self._live[whole.untyped_storage().data_ptr()] = (
                StorageWeakRef(whole.untyped_storage()),
                number,
                index,
            )
        return made

    def end_forward(self) -> None:
        """Nothing stays in flight that forward asked for."""
        for flight in self._flying.values():
            flight.work.wait()
        self._flying.clear()
        self._live.clear()
        self._held.clear()

    # ---- between forward and backward ----------------------------------------------------------------------

    def notes(self):
        """Context manager around a forward with gradients."""
        return torch.autograd.graph.saved_tensors_hooks(self._note, self._read)

    def _note(self, saved: Tensor):
        if type(saved) is not Tensor and not isinstance(saved, torch.nn.Parameter):
            return saved
        found = self._live.get(saved.untyped_storage().data_ptr())
        if (
            found is None
            or found[0].expired()
            or found[0].cdata != StorageWeakRef(saved.untyped_storage()).cdata
        ):
            return saved
        self._saved.add(found[1])
        return _Note(found[1], found[2], tuple(saved.shape), saved.stride(), saved.storage_offset())

    def _read(self, note):
        if not isinstance(note, _Note):
            return note
        return self._for_backward(note.number)[note.index].as_strided(note.size, note.stride, note.offset)

    # ---- gradients -----------------------------------------------------------------------------------------

    def arrived(self, number: int, grads: Sequence[Tensor | None]) -> None:
        """A call's gradients have come: with the last one's, the bucket is not needed any more. A parameter
        of several calls or buckets waits for the last of them."""
        if not self._missing:
            _torch.queue_callback(self._end_backward)
            self._missing = dict(self._uses)
            self._calls = {i: each.calls for i, each in enumerate(self.gathers)}
        self._calls[number] -= 1
        if self._calls[number] <= 0:
            self._again.pop(number, None)
        for name, grad in zip(self.gathers[number].names, grads):
            if name not in self._missing:
                continue
            self._missing[name] -= 1
            if grad is not None:
                self._sums[name] = (
                    self._sums[name].to(self._sum_dtype or grad.dtype) + grad if name in self._sums else grad
                )
            if self._missing[name] == 0 and name in self._sums:
                self._deliver(name, self._sums.pop(name))

    def _end_backward(self) -> None:
        for flight in self._flying.values():
            flight.work.wait()
        self._flying.clear()
        self._again.clear()
        self._taken.clear()
        sums, self._sums, self._missing = self._sums, {}, {}
        for name, grad in sums.items():
            self._deliver(name, grad)


class _Through(torch.autograd.Function):
    """Whole tensors out, their gradients to the store. The shares get none from autograd."""

    @staticmethod
    def forward(ctx, store, number, *shares):
        ctx.set_materialize_grads(False)
        ctx.store, ctx.number = store, number
        return tuple(store._whole(number))

    @staticmethod
    def backward(ctx, *grads):
        ctx.store.arrived(ctx.number, grads)
        return None, None, *[None] * len(grads)
