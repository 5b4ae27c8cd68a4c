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
4. The sums are written to `p.grad`, or go to who takes them (`tedfx/runtime/leaving.py`), and then as soon as
   the next bucket is launched.

Every rank runs the same backward. A rank that runs none while others do is a hang, as in any data
parallelism.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tedfx import _torch
from tedfx.errors import TedfxError
from tedfx.options import Options
from tedfx.runtime.leaving import Leaving
from tedfx.state.buckets import Bucket, Flight, Reduction, new_group, plan
from tedfx.state.parameters import Placed


class GradientBoundary:
    """Leaves, buckets and reductions of one ParallelModule.

    placed: by layout name. parameter: returns the nn.Parameter (a DTensor) of a name now. Collective to
    construct: it creates one process group per set of reduced axes. options: gradient_dtype and bucket_bytes.
    """

    def __init__(
        self,
        placed: dict[str, Placed],
        parameter: Callable[[str], nn.Parameter],
        options: Options = Options(),
    ):
        self.placed, self.parameter = placed, parameter
        self.bucket_bytes, self.gradient_dtype = options.bucket_bytes, options.gradient_dtype
        self.reductions: list[Reduction] = []
        self.synced = True
        # under ZeRO-3 a compiled graph scatters gradients itself: what its leaves get is this rank's share,
        # summed
        self.in_graph = False
        self._groups = {axes: None for axes in sorted({p.reduce_axes for p in placed.values()})}
        for axes in self._groups:
            if axes:
                self._groups[axes] = new_group(next(iter(placed.values())).mesh, axes)
        self._dtypes = {name: parameter(name).dtype for name in placed}
        self._leaves: dict[str, tuple[tuple, Tensor]] = {}
        self._active: dict[str, None] = {}  # every parameter that a program used with gradients; ordered
        self._plan_key, self._buckets = None, []
        self._grads: dict[
            str, Tensor
        ] = {}  # local gradients taken from the leaves, not yet in p.grad or in a bucket
        self._flying: list[Flight] = []
        self.leaving = Leaving()
        self._tasks: set[int] = set()

    # ---- forward -------------------------------------------------------------------------------------------

    def leaves(self, names: Iterable[str]) -> list[Tensor]:
        """The local tensors that a program takes for these parameters, in the user's local shapes."""
        with torch.inference_mode(False), torch.no_grad():
            return [self._leaf(name) for name in names]

    @property
    def used(self) -> bool:
        """Whether a forward with gradients has used parameters."""
        return bool(self._active)

    def _leaf(self, name: str) -> Tensor:
        parameter = self.parameter(name)
        local = parameter.to_local()
        key = (local.data_ptr(), local.dtype, local.device, local.shape, parameter.requires_grad)
        if name not in self._leaves or self._leaves[name][0] != key:
            if local.dtype != self._dtypes[name]:
                raise TedfxError(
                    f"parameter {name} has become {local.dtype}, the programs are for {self._dtypes[name]}: "
                    "convert the model before parallelize"
                )
            if not local.is_contiguous():
                raise TedfxError(
                    f"parameter {name}: its local tensor is not contiguous any more; load values with "
                    "load_state_dict or copy_"
                )
            leaf = local.view(self.placed[name].kept.shape).detach()
            if parameter.requires_grad:
                leaf.requires_grad_()
                if (
                    self.gradient_dtype is not None
                ):  # a leaf of several uses, or of several micro-batches, has their gradients summed in it
                    leaf.grad_dtype = self.gradient_dtype
                # Weak: a tensor's hooks are no place where the garbage collector finds a cycle, and the
                # boundary holds the leaf.
                leaf.register_post_accumulate_grad_hook(partial(_arrived, weakref.ref(self), name))
            self._leaves[name] = (key, leaf)
        return self._leaves[name][1]

    def begin(self, names: Iterable[str]) -> None:
        """A forward with gradients is about to use these parameters, in this order."""
        if self._tasks and _torch.backward_id() == -1:
            self._abandon()  # the last backward raised: its callbacks never ran
        for name in names:
            self._active.setdefault(name)
        key = tuple(
            (name, self.parameter(name).dtype) for name in self._active if self.parameter(name).requires_grad
        )
        if key != self._plan_key:
            if self._flying:
                raise TedfxError(
                    "parameters changed while gradients were being reduced: run forward outside of "
                    "backward first"
                )
            self._plan_key, self._buckets = key, self._plan(key)

    def _plan(self, key) -> list[Bucket]:
        summed = [
            (name, self.gradient_dtype or dtype)
            for name, dtype in key
            if self.placed[name].reduce_axes and not self._summed(name)
        ]
        return plan(summed, self.placed, self.bucket_bytes)

    # ---- backward ------------------------------------------------------------------------------------------

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes that run inside accumulate without communication."""
        before, self.synced = self.synced, False
        try:
            yield
        finally:
            self.synced = before

    def _summed(self, name: str) -> bool:
        return self.in_graph and self.placed[name].stage == 3 and self.placed[name].cut is not None

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
        if self.leaving.of(name) is not None and (not self.placed[name].reduce_axes or self._summed(name)):
            self._leave([(name, grad)])
            return
        self._grads[name] = self._grads[name] + grad if name in self._grads else grad
        while self.synced and self._next() is not None and all(n in self._grads for n in self._next().names):
            self._launch(overlapped=True)  # Step 1

    def _next(self) -> Bucket | None:
        return self._buckets[len(self._flying)] if len(self._flying) < len(self._buckets) else None

    @torch.no_grad()
    def _finish(self, task: int) -> None:
        self._tasks.discard(task)
        if self.synced:
            self._reduce()
            if any(self.placed[name].reduce_axes and not self._summed(name) for name in self._grads):
                self._reduce()  # a backward inside a backward added to buckets already launched
        self._separate()
        if not self.synced:
            self._hold()
        self._settle()

    def _reduce(self) -> None:
        # Step 2
        while self._next() is not None:
            self._launch(overlapped=False)
        flying, self._flying = self._flying, []
        # Step 3
        counts = {}
        for axes in dict.fromkeys(flight.bucket.axes for flight in flying):
            flags = [flag for flight in flying if flight.bucket.axes == axes for flag in flight.have]
            device = self.parameter(flying[0].bucket.names[0]).device
            count = torch.tensor(flags, dtype=torch.int32).to(device)
            counts[axes] = (
                count,
                dist.all_reduce(count, group=self._groups[axes], async_op=True),
                not all(flags),
            )
        present = {}
        for axes, (count, work, missing) in counts.items():
            work.wait()
            values = count.tolist() if missing else None
            names = [name for flight in flying if flight.bucket.axes == axes for name in flight.bucket.names]
            present.update((name, values is None or values[i] > 0) for i, name in enumerate(names))
        # Step 4
        for flight in flying:
            self._land(flight, present)

    def _land(self, flight: Flight, present: dict[str, bool]) -> None:
        """Write a bucket's sums to `.grad`, or send them to who takes them."""
        if flight.landed:
            return
        bucket, flat = flight.bucket, flight.flat
        parts = dict(zip(bucket.names, flat.split([self._travels(bucket, n) for n in bucket.names])))
        taken = {
            name: value[: self.placed[name].share.numel]
            for name, value in parts.items()
            if present[name] and self.leaving.of(name) is not None
        }
        self._leave(taken.items(), flight.work)
        flight.landed, flight.flat, rows, flight.rows = True, None, flight.rows, None
        if all(name in taken or not present[name] for name in parts):
            return
        flight.work.wait()
        if (
            rows is not None and self.placed[bucket.names[0]].stage == 1
        ):  # the gradient lives in its place among the whole ones
            flat = rows[self.placed[bucket.names[0]].index].copy_(flat)
            parts = dict(zip(bucket.names, flat.split([self._travels(bucket, n) for n in bucket.names])))
        for name, value in parts.items():
            if present[name] and name not in taken:
                share = self.placed[name].share
                self._add(name, value[: share.numel], share.placements)

    def _land_early(self) -> None:
        """Buckets that somebody takes need not wait for the end of backward: this rank has all their
        gradients, so they exist whatever the other ranks have."""
        for flight in self._flying[:-1]:
            if (
                not flight.landed
                and all(flight.have)
                and all(self.leaving.of(name) is not None for name in flight.bucket.names)
            ):
                if not self.leaving.ready(flight.work, flight.flat.device):
                    return
                self._land(flight, dict.fromkeys(flight.bucket.names, True))

    def _leave(self, values: Iterable[tuple[str, Tensor]], work: dist.Work | None = None) -> None:
        values = [(name, value.to(self.gradient_dtype or value.dtype)) for name, value in values]
        if values:
            self.leaving.send(values, work)

    def _launch(self, overlapped: bool) -> None:
        """Sum the next bucket: this backward's gradients and what earlier ones left unsynced."""
        bucket, values, have = self._next(), [], []
        for name in bucket.names:
            value, parameter = self._grads.pop(name, None), self.parameter(name)
            if _unsynced(parameter.grad, self.placed[name]):
                held = parameter.grad.to_local().reshape(-1)
                value = held if value is None else held + value.reshape(-1)
                parameter.grad = None
            have.append(value is not None)
            if value is None:
                value = torch.zeros(
                    self.placed[name].whole.numel, dtype=bucket.dtype, device=parameter.device
                )
            values.append(value.reshape(-1).to(bucket.dtype))
        rows = None
        if bucket.scattered:
            rows = torch.cat(
                [self.placed[n].cut.spread(v) for n, v in zip(bucket.names, values)], 1
            )  # a copy: autograd may give two leaves gradients that share storage
            flat = rows.new_empty(rows.shape[1])
            work = _torch.scatter_into(
                flat, rows.view(-1), op=dist.ReduceOp.SUM, group=self._groups[bucket.axes], async_op=True
            )
        else:
            flat = torch.cat(values)
            work = dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=self._groups[bucket.axes], async_op=True)
        self._flying.append(Flight(bucket, flat, have, work, rows))
        sent = flat if rows is None else rows
        self.reductions.append(
            Reduction(
                bucket.axes,
                bucket.names,
                sent.numel() * sent.element_size(),
                overlapped,
                "all_reduce" if rows is None else "reduce_scatter",
            )
        )
        self._land_early()

    def _travels(self, bucket: Bucket, name: str) -> int:
        return self.placed[name].cut.width if bucket.scattered else self.placed[name].whole.numel

    def _hold(self) -> None:
        """Leave this backward's gradients unsynced. Reduced ones become partial on every rank, used here or
        not."""
        for name in self._active:
            placed, parameter = self.placed[name], self.parameter(name)
            if not placed.reduce_axes or not parameter.requires_grad or self._summed(name):
                continue
            value = self._grads.pop(name, None)
            if parameter.grad is not None and not _unsynced(parameter.grad, placed):
                local = parameter.grad.to_local()
                parameter.grad = None
                if placed.share_dim is not None:  # shares are apart: their sum over the ranks is the whole
                    share, local = local, local.new_zeros(placed.local_held)
                    placed.share_of(local).copy_(share)
                elif not _keeps(placed):
                    local.zero_()
                parameter.grad = placed.dtensor(local, placed.unsynced)
            if value is not None:
                self._add(name, value, placed.unsynced)

    def _separate(self) -> None:
        """Autograd may give two leaves gradients that share storage (views of one cotangent); `.grad` is
        written in place."""
        seen = set()
        for name, grad in self._grads.items():
            at = grad.untyped_storage().data_ptr()
            if at in seen:
                self._grads[name] = grad.clone()
            seen.add(at)

    def _settle(self) -> None:
        """Write the gradients that need no sum."""
        for name in list(self._grads):
            self._add(name, self._grads.pop(name), self.placed[name].share.placements)

    def _add(self, name: str, value: Tensor, placements) -> None:
        parameter, placed = self.parameter(name), self.placed[name]
        if tuple(placements) == placed.share.placements and self.leaving.of(name) is not None:
            self._leave([(name, value)])
            return
        value = value.to(self.gradient_dtype or value.dtype)
        if parameter.grad is None:
            parameter.grad = placed.dtensor(value.contiguous(), placements)
        else:
            parameter.grad.to_local().add_(value.view(placed.extent(placements).held))

    def _abandon(self) -> None:
        for flight in self._flying:
            flight.work.wait()
        self._flying, self._grads, self._tasks = [], {}, set()


def _unsynced(grad: DTensor | None, placed: Placed) -> bool:
    return grad is not None and placed.reduce_axes != () and tuple(grad.placements) == placed.unsynced


def _keeps(placed: Placed) -> bool:
    """Whether this rank is coordinate 0 of the axes that the gradient is summed over."""
    mesh = placed.mesh
    return all(
        index == 0
        for axis, index in zip(mesh.mesh_dim_names, mesh.get_coordinate())
        if axis in placed.reduce_axes
    )


def _arrived(boundary: weakref.ref, name: str, leaf: Tensor) -> None:
    if (
        leaf.grad is None
    ):  # under ZeRO-3 what autograd brings a share is nothing: `tedfx/runtime/gathers.py` has it
        return
    grad, leaf.grad = (
        leaf.grad.detach().resolve_conj().resolve_neg(),
        None,
    )  # what is sent is the numbers themselves
    if (alive := boundary()) is not None:
        alive.arrived(name, grad)
