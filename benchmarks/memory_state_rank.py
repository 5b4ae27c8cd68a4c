"""One rank of a mesh of fake ranks, on fake tensors, and the count of every storage that is there: what
`python benchmarks/memory.py state` measures with.

An unmodified model on the meta device goes through `tedfx.parallelize`, its parameters become fake tensors of
the real sizes, forward and backward run (so gradients are what the boundary leaves),
`tedfx.optim.ShardedOptimizer` makes masters and states and takes steps. Every storage is counted from when it
is made to when it is freed.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from unittest import mock

import torch
from memory_state_models import Shape, make_model

import tedfx
from tedfx._torch import FakeTensorMode, TorchDispatchMode, fake_world, pytree
from tedfx.placement.roles import MeshShape
from tedfx.trace.export import trace

SEQUENCE = (
    64  # short: what is measured does not depend on it; 2 x 64 tokens are at least one for each of 128 groups
)


def call(rows: int, sequence: int = SEQUENCE) -> dict[str, torch.Tensor]:
    ids = torch.zeros(rows, sequence, dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}


@functools.cache
def traced(shape: Shape):
    model = make_model(shape)
    return model, trace(model, kwargs=call(2))


# ---- counting storages -------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Bytes of the storages that were made under it and are there, and the most that were there at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._there: dict[int, weakref.finalize] = {}

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        del self._there[key]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {_key(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        # The fake kernel of a wait makes a new tensor, the real one does not.
        out = (
            args[0]
            if func is torch.ops._c10d_functional.wait_tensor.default
            else func(*args, **(kwargs or {}))
        )
        for x in pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and (key := _key(x)) not in given and key not in self._there:
                storage = x.untyped_storage()
                self._there[key] = weakref.finalize(storage, self._gone, key, storage.nbytes())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
        return out


def _key(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


@contextlib.contextmanager
def addresses() -> Iterator[None]:
    """Fake tensors all answer 0 when they are asked for their address. Under this they have one: equal
    exactly where storage and offset are."""
    with (
        mock.patch.object(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata),
        mock.patch.object(
            torch.Tensor, "data_ptr", lambda x: (_key(x) << 64) + x.storage_offset() * x.element_size()
        ),
    ):
        yield


def held(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of their storages, each once."""
    return sum({_key(x): x.untyped_storage().nbytes() for x in tensors if x is not None}.values())


# ---- one rank ----------------------------------------------------------------------------------------------


@dataclass
class Row:
    """Bytes on one rank. `total`: all that is there between backward and the update, however it came about;
    the three before it are found at their owners."""

    table: str
    model: Shape
    mesh: str
    stage: int
    tile: int | None
    options: dict
    psi: int  # parameters of the model
    share: int  # elements of this rank's optimizer
    parameters: int
    gradients: int
    states: int
    total: int
    spike: int | None  # the most above `total` in a step
    idle: int | None  # all that is there after zero_grad; of the last optimizer of a `measure`
    host: int = 0  # of `total` and of `idle`, under offload
    formula: float | None = None


@contextlib.contextmanager
def rank_of(shape: Shape, mesh: str, stage: int, real: bool = False) -> Iterator[tuple]:
    """(the ParallelModule of rank 0, the count of what is alive), on fake tensors, or on real ones.
    Capacities are those of a rank's tokens, as in DeepSpeed: so no size depends on a routing."""
    from torch.distributed.device_mesh import init_device_mesh

    axes, hook = MeshShape.of(mesh), sys.excepthook
    model, source = traced(shape)
    gc.collect()
    gc.freeze()  # collections below need not look at what is there already
    try:
        with fake_world(0, axes.world):
            devices = init_device_mesh("cpu", axes.sizes, mesh_dim_names=axes.names)
            pm = tedfx.parallelize(
                model,
                devices,
                zero=stage,
                traces=[source],
                example_inputs=call(2),
                outputs=("loss",) if shape.kind == "llama" else None,
                capacity="local" if shape.experts else None,
                check_inputs=False,
            )
            with contextlib.ExitStack() as stack:
                if not real:
                    stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
                    stack.enter_context(addresses())
                live = stack.enter_context(Live())
                # in the place of those that `parallelize` allocated, virtual memory that nobody touched
                pm.allocate_anew()
                yield pm, live
    finally:
        sys.excepthook = hook  # each process group adds a prefix to what is printed of an exception
        gc.unfreeze()


def backward(pm) -> None:
    output = pm(**call(1))
    (output if isinstance(output, torch.Tensor) else output.loss).backward()


def measure(
    table: str,
    shape: Shape,
    mesh: str,
    stage: int,
    *,
    steppers: Sequence[Mapping] = ({"fused": True},),
    real: bool = False,
) -> list[Row]:
    """A row per optimizer; steppers: options of ShardedOptimizer over AdamW. A spike is that of the second
    step: the first makes the states."""
    rows = []
    with rank_of(shape, mesh, stage, real) as (pm, live):
        backward(pm)
        for options in steppers:
            stepper = tedfx.optim.ShardedOptimizer(pm, torch.optim.AdamW, lr=1e-4, max_norm=1.0, **options)
            if options.get("offload"):  # gradients leave while backward runs, to an optimizer that is there
                pm.zero_grad()
                backward(pm)
            stepper.step()
            gc.collect()
            before = live.most = live.now
            stepper.step()
            shares = list(stepper._shares.values())
            mine = held(x for share in shares for x in (share.master, *share.homes.values()))
            host = held(
                x
                for share in shares
                for x in (*((share.master, *share.homes.values()) if share.host else ()), share.taken())
            )
            parameters, gradients = (
                held(p.to_local() for p in pm.parameters()),
                held(p.grad.to_local() for p in pm.parameters() if p.grad is not None),
            )
            psi, owned = (
                sum(p.numel() for p in traced(shape)[0].parameters()),
                sum(share.numel for share in shares),
            )
            rows.append(
                Row(
                    table,
                    shape,
                    mesh,
                    stage,
                    stepper.tile,
                    dict(options),
                    psi,
                    owned,
                    parameters,
                    gradients,
                    mine,
                    before,
                    live.most - before,
                    None,
                    host,
                )
            )
            if options is steppers[-1]:
                stepper.zero_grad()
                rows[-1] = replace(rows[-1], idle=live.now)
            del stepper, shares
            gc.collect()
    return rows


def longer(few: Row, more: Row, counts: tuple[int, int], layers: int) -> Row:
    """The row of a model of `layers` layers, from those of two shorter ones: layers are alike, and what is
    kept of a parameter is proportional to it. A tiled spike is not, and is left out."""
    at = lambda a, b: a + (b - a) * (layers - counts[0]) // (counts[1] - counts[0])
    kept = {
        name: at(getattr(few, name), getattr(more, name))
        for name in ("psi", "share", "parameters", "gradients", "states", "total", "host")
    }
    return replace(few, **kept, idle=None, spike=at(few.spike, more.spike) if few.tile is None else None)


def extrapolated(table: str, shape: Shape, mesh: str, stage: int, **options) -> list[Row]:
    """`measure` of two models of a few layers; with experts a pair of layers is what repeats."""
    counts = (2, 4) if shape.experts else (1, 2)
    few, more = (measure(table, replace(shape, layers=count), mesh, stage, **options) for count in counts)
    return [replace(longer(a, b, counts, shape.layers), model=shape) for a, b in zip(few, more)]
