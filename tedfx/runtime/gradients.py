"""The gradient boundary: from the local gradients of one backward to the `.grad` of DTensor parameters.

Autograd runs on **leaves**: plain local tensors that share storage with the parameters. A parameter that is R
on some axes has, on each rank, only this rank's part of its gradient; the sum over those axes happens here,
outside the graph, once per step however often the parameter is used.

What `p.grad` may be, and it is always a DTensor that says what it is:

- `None`: nothing yet, or after `zero_grad()`.
- **reduced**, with the placements that the optimizer sees: the parameter's own, under ZeRO those of this
  rank's share; the gradient of everything since `zero_grad()`.
- **unsynced**, with `Partial` on the reduced axes: some backward ran inside `no_sync()`. The value is the sum
  over the ranks and not yet computed; a reduced gradient that was there before is kept on coordinate 0 and
  zeroed elsewhere, so that the sum stays right and no rank communicates.

A synced backward adds to what is there: an unsynced gradient joins this backward's local gradient *before*
the reduction and the sum replaces it; a reduced one is added to *after* it. So nothing is reduced twice,
nothing stays unreduced, and the state lives in `p.grad` alone: `zero_grad()` in either form drops or zeroes
it in both states. Whether a backward synchronises is decided when it runs, not when the forward did.

Algorithm of a synced backward (numbers repeated in the body):

1. A hook on each leaf takes its gradient. When all members of a bucket have theirs, and every bucket before
   it has been launched, the bucket is summed (never averaged) with an asynchronous all-reduce that overlaps
   the rest of backward; under ZeRO with a reduce-scatter, of which each rank gets its share. At stage 1 the
   buffer that it was summed from lives on with the gradient (whole gradients, as in ZeRO's table); at stage 2
   it goes. Buckets are of equal content and launched in equal order on all ranks; they have process groups of
   their own, so that they neither block nor reorder the collectives of the graph.
2. When backward ends, the buckets that are left are launched, zeros standing for what got no gradient.
3. A tiny sum counts, for each parameter, the ranks that have a gradient. It is read only where one is missing
   here:
   nowhere -> `p.grad` stays as it is (an optimizer skips `None`), somewhere -> this rank
   takes the sum as well.
4. The sums are written to `p.grad` (`tedfx/runtime/accumulated.py`), or go to who takes them
   (`tedfx/runtime/leaving.py`), and then as soon as the next bucket is launched.

Every rank runs the same backward. A rank that runs none while others do is a hang, as in any data
parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tedfx import _torch
from tedfx.errors import TedfxError
from tedfx.ops.groups import begun
from tedfx.options import Options
from tedfx.runtime.accumulated import Accumulated
from tedfx.runtime.leaves import Leaves
from tedfx.runtime.leaving import Leaving
from tedfx.state.buckets import Bucket, Flight, Reduction, new_group, pack_buckets
from tedfx.state.parameters import Placed


class GradientBoundary:
    """Leaves, buckets and reductions of one ParallelModule. Collective to construct: it creates one process
    group per set of reduced axes.

    placed: by layout name. parameter: returns the nn.Parameter (a DTensor) of a name now. options:
    gradient_dtype, bucket_bytes, and compile: under ZeRO-3 a compiled graph scatters gradients itself, so
    that what its leaves get is this rank's share, summed.

    groups      reduced axes -> process group; None where nothing is summed.
    leaving     who takes gradients in the place of `.grad`.
    synced      whether a backward that ends now sums.
    reductions  what the last synced backward summed, in order of launch.
    """

    def __init__(
        self,
        placed: Mapping[str, Placed],
        parameter: Callable[[str], nn.Parameter],
        options: Options = Options(),
    ):
        self.placed, self.parameter = placed, parameter
        self.bucket_bytes, self.gradient_dtype = options.bucket_bytes, options.gradient_dtype
        self.reductions: list[Reduction] = []
        self.synced, self.leaving = True, Leaving()
        self.groups: dict[tuple[str, ...], dist.ProcessGroup | None] = {
            axes: new_group(next(iter(placed.values())).mesh, axes) if axes else None
            for axes in sorted({p.reduce_axes for p in placed.values()})
        }
        # Of parameters that arrive summed: no bucket, no second sum.
        self._summed = {
            name
            for name, each in placed.items()
            if options.compile and each.stage == 3 and each.cut is not None
        }
        self._leaves = Leaves(placed, parameter, self.arrived, self.gradient_dtype)
        self._accumulated = Accumulated(placed, parameter, self.gradient_dtype, self.leaving)
        self._used: dict[str, None] = {}  # every parameter that a program used with gradients; ordered
        self._packed_for, self._buckets = None, []
        # local gradients taken from the leaves, not yet in p.grad or in a bucket
        self._grads: dict[str, Tensor] = {}
        self._flying: list[Flight] = []
        self._tasks: set[int] = set()

    # ---- forward -------------------------------------------------------------------------------------------

    def leaves(self, names: Iterable[str]) -> list[Tensor]:
        """The local tensors that a program takes for these parameters, in the user's local shapes."""
        return self._leaves.of(names)

    @property
    def used(self) -> KeysView[str]:
        """The parameters that some forward with gradients has used."""
        return self._used.keys()

    def begin(self, names: Iterable[str]) -> None:
        """A forward with gradients is about to use these parameters, in this order."""
        if self._tasks and _torch.backward_id() == -1:
            self._abandon()  # the last backward raised: its callbacks never ran
        for name in names:
            self._used.setdefault(name)
        self._pack()

    def _pack(self) -> None:
        """Buckets of what is used and trained now."""
        trained = [
            (name, self.parameter(name).dtype) for name in self._used if self.parameter(name).requires_grad
        ]
        wanted = (tuple(trained), self.bucket_bytes)
        if wanted == self._packed_for:
            return
        if self._flying:
            raise TedfxError(
                "parameters changed while gradients were being reduced: run forward outside of backward first"
            )
        summed = [
            (name, self.gradient_dtype or dtype) for name, dtype in trained if self._is_summed_here(name)
        ]
        self._packed_for, self._buckets = wanted, pack_buckets(summed, self.placed, self.bucket_bytes)

    def _is_summed_here(self, name: str) -> bool:
        return self.placed[name].reduce_axes != () and name not in self._summed

    # ---- backward ------------------------------------------------------------------------------------------

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes that run inside accumulate without communication."""
        before, self.synced = self.synced, False
        try:
            yield
        finally:
            self.synced = before

    @torch.no_grad()
    def arrived(self, name: str, grad: Tensor) -> None:
        """This backward's gradient of a leaf, or under ZeRO-3 of the whole local tensor: this rank's part of
        the sum."""
        task = _torch.backward_id()
        if task not in self._tasks:
            if not self._tasks:
                self.reductions = []
            self._tasks.add(task)
            _torch.queue_callback(partial(self._finish, task))
        if self.leaving.of(name) is not None and not self._is_summed_here(name):
            self._accumulated.leave([(name, grad)])
            return
        self._grads[name] = self._grads[name] + grad if name in self._grads else grad
        while self.synced and (bucket := self._next()) and all(n in self._grads for n in bucket.names):
            self._launch(bucket, overlapped=True)  # Step 1

    def _next(self) -> Bucket | None:
        return self._buckets[len(self._flying)] if len(self._flying) < len(self._buckets) else None

    @torch.no_grad()
    def _finish(self, task: int) -> None:
        self._tasks.discard(task)
        if self.synced:
            self._reduce()
            if any(self._is_summed_here(name) for name in self._grads):
                self._reduce()  # a backward inside a backward added to buckets already launched
        self._separate()
        if not self.synced:
            self._hold()
        for name in list(self._grads):  # those that need no sum
            self._accumulated.add(name, self._grads.pop(name), self.placed[name].share.placements)

    def _reduce(self) -> None:
        # Step 2
        while bucket := self._next():
            self._launch(bucket, overlapped=False)
        flying, self._flying = self._flying, []
        # Step 3
        present = self._present(flying)
        # Step 4
        for flight in flying:
            self._land(flight, present)

    def _present(self, flying: list[Flight]) -> dict[str, bool]:
        """Whether a parameter of these buckets has a gradient on some rank."""
        counts, present = [], {}
        for axes in dict.fromkeys(flight.bucket.axes for flight in flying):
            mine = [flight for flight in flying if flight.bucket.axes == axes]
            names = [name for flight in mine for name in flight.bucket.names]
            flags = [flag for flight in mine for flag in flight.have]
            device = self.parameter(names[0]).device
            # Ones are made on the device: a copy from the host would wait for all that backward has queued.
            count = (
                torch.ones(len(flags), dtype=torch.int32, device=device)
                if all(flags)
                else torch.tensor(flags, dtype=torch.int32).to(device)
            )
            work = dist.all_reduce(count, group=self.groups[axes], async_op=True)
            counts.append((names, count, work, all(flags)))
        for names, count, work, complete in counts:
            work.wait()
            values = [1] * len(names) if complete else count.tolist()
            present.update((name, value > 0) for name, value in zip(names, values))
        return present

    def _launch(self, bucket: Bucket, overlapped: bool) -> None:
        """Sum the next bucket: this backward's gradients and what earlier ones left unsynced."""
        values, have = [], []
        for name in bucket.names:
            value, held = self._grads.pop(name, None), self._accumulated.pop_unsynced(name)
            if held is not None:
                value = held if value is None else held + value.reshape(-1)
            have.append(value is not None)
            if value is None:
                device = self.parameter(name).device
                value = torch.zeros(self.placed[name].whole.numel, dtype=bucket.dtype, device=device)
            values.append(value.reshape(-1).to(bucket.dtype))
        group = self.groups[bucket.axes]
        if bucket.scattered:
            # a copy: autograd may give two leaves gradients that share storage
            rows = torch.cat([self.placed[n].share_cut.spread(v) for n, v in zip(bucket.names, values)], 1)
            flat = rows.new_empty(rows.shape[1])
            work = _torch.scatter_into(flat, rows.view(-1), op=dist.ReduceOp.SUM, group=group, async_op=True)
            sent, op = rows, "reduce_scatter"
        else:
            rows, flat = None, torch.cat(values)
            work = dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=group, async_op=True)
            sent, op = flat, "all_reduce"
        self._flying.append(Flight(bucket, flat, have, begun(work), rows))
        size = sent.numel() * sent.element_size()
        self.reductions.append(Reduction(bucket.axes, bucket.names, size, overlapped, op))
        self._land_early()

    def _land_early(self) -> None:
        """Buckets that somebody takes need not wait for the end of backward: this rank has all their
        gradients, so they exist whatever the other ranks have."""
        for flight in self._flying[:-1]:
            if (
                not flight.landed
                and all(flight.have)
                and all(self.leaving.of(name) is not None for name in flight.bucket.names)
            ):
                if not self.leaving.ready(flight.work, self.parameter(flight.bucket.names[0]).device):
                    return
                self._land(flight, dict.fromkeys(flight.bucket.names, True))

    def _land(self, flight: Flight, present: dict[str, bool]) -> None:
        """Write a bucket's sums to `.grad`, or send them to who takes them."""
        if flight.landed:
            return
        bucket, (flat, rows) = flight.bucket, flight.land()
        parts = self._parts(bucket, flat)
        taken = {
            name: value[: self.placed[name].share.numel]
            for name, value in parts.items()
            if present[name] and self.leaving.of(name) is not None
        }
        self._accumulated.leave(taken.items(), flight.work)
        if all(name in taken or not present[name] for name in parts):
            return
        flight.work.wait()
        first = self.placed[bucket.names[0]]
        if rows is not None and first.stage == 1:  # the gradient lives in its place among the whole ones
            parts = self._parts(bucket, rows[first.index].copy_(flat))
        for name, value in parts.items():
            if present[name] and name not in taken:
                share = self.placed[name].share
                self._accumulated.add(name, value[: share.numel], share.placements)

    def _parts(self, bucket: Bucket, flat: Tensor) -> dict[str, Tensor]:
        """What of a bucket's sums is whose."""
        widths = [
            self.placed[name].share_cut.width if bucket.scattered else self.placed[name].whole.numel
            for name in bucket.names
        ]
        return dict(zip(bucket.names, flat.split(widths)))

    def _hold(self) -> None:
        """Leave this backward's gradients unsynced. Reduced ones become partial on every rank, used here or
        not."""
        for name in self._used:
            if not self._is_summed_here(name) or not self.parameter(name).requires_grad:
                continue
            self._accumulated.make_unsynced(name)
            if name in self._grads:
                self._accumulated.add(name, self._grads.pop(name), self.placed[name].unsynced)

    def _separate(self) -> None:
        """Autograd may give two leaves gradients that share storage (views of one cotangent); `.grad` is
        written in place."""
        seen = set()
        for name, grad in self._grads.items():
            at = grad.untyped_storage().data_ptr()
            if at in seen:
                self._grads[name] = grad.clone()
            seen.add(at)

    def _abandon(self) -> None:
        for flight in self._flying:
            flight.work.wait()
        self._flying, self._grads, self._tasks = [], {}, set()
