"""The run-time context: where this rank stands on the mesh, and which process group spans which axes.

The local graph names mesh axes only. `RankContext` turns a tuple of axis names, major first, into a process
group, a size and a flattened coordinate; `use(ctx)` makes it current around a call. Nothing before run time
needs one.

Inside a compiled region dynamo reads the current context as plain python data (dicts of strings and ints), so
the context must be entered outside the region, and two contexts with equal entries share the compiled code.
Autograd Functions copy what their backward needs out of the context, because backward runs later and on
another thread.
"""

import copy
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tedfx import _torch
from tedfx.ops.groups import group_among

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Span:
    """What a conversion has to know about a tuple of axes.

    `size` ranks, of which this one is number `index` (flattened, major axis first). `name` is the process
    group's name, "" when size is 1. `order[i]` is the rank inside the group that holds flattened coordinate
    i; None when that is i itself, which it is whenever the axes are given in the mesh's own order.
    """

    axes: Axes
    size: int
    index: int
    name: str
    order: tuple[int, ...] | None


class RankContext:
    """This rank's sizes, coordinates and process groups on `device_mesh`.

    Groups of single axes come from the mesh. Groups over several axes are created by `ensure_groups`, a
    collective call: every rank of the job makes it, with the same list. Axes of size 1 never count.

    Raises ValueError if this rank is not on the mesh or the mesh has unnamed axes.
    """

    def __init__(self, device_mesh: DeviceMesh, groups: Iterable[Axes] = ()):
        names = device_mesh.mesh_dim_names
        coordinate = device_mesh.get_coordinate()
        if not names:
            raise ValueError("tedfx needs a DeviceMesh with named axes (mesh_dim_names)")
        if coordinate is None:
            raise ValueError(f"rank {dist.get_rank()} is not on the mesh {device_mesh}")
        self.device_mesh = device_mesh
        self.device_type = device_mesh.device_type
        self.sizes: dict[str, int] = dict(zip(names, device_mesh.mesh.shape, strict=True))
        self.coordinates: dict[str, int] = dict(zip(names, coordinate, strict=True))
        self._groups: dict[frozenset[str], dist.ProcessGroup] = {}
        self.store = None  # of one call under ZeRO-3, see `with_store`
        self._spans: dict[Axes, Span] = {(): Span((), 1, 0, "", None)}
        self.ensure_groups([(name,) for name in names])
        self.ensure_groups(groups)

    def with_store(self, store) -> "RankContext":
        """This context for one call whose parameters are gathered by `store` (`tedfx/runtime/gathers.py`);
        groups are shared."""
        mine = copy.copy(self)
        mine.store = store
        return mine

    def ensure_groups(self, groups: Iterable[Axes]) -> None:
        """Create the process groups of these tuples of axes that are not there yet. Collective over the whole
        job."""
        for axes in groups:
            axes = self._proper(tuple(axes))
            if axes in self._spans:
                continue
            key = frozenset(axes)
            if key not in self._groups:
                self._groups[key] = self._create(axes)
            self._spans[axes] = self._span(axes)

    def size(self, axes: Axes) -> int:
        """Number of ranks over these axes: the product of their sizes."""
        size = 1
        for axis in axes:
            size = size * self.sizes[axis]
        return size

    def coordinate(self, axes: Axes) -> int:
        """This rank's flattened coordinate over these axes, major first."""
        index = 0
        for axis in axes:
            index = index * self.sizes[axis] + self.coordinates[axis]
        return index

    def span(self, axes: Axes) -> Span:
        """Size, index and group name over these axes. KeyError, with the remedy, for a group never
        created."""
        proper = self._proper(axes)
        if proper not in self._spans:
            raise KeyError(
                f"no process group over axes {proper}: call ensure_groups([{proper}]) on every rank first"
            )
        return self._spans[proper]

    def group(self, axes: Axes) -> dist.ProcessGroup:
        """The process group over these axes. Ranks in it follow the mesh's order, not the order of `axes`.

        ValueError when the axes hold one rank: there is nothing to communicate and no group.
        """
        axes = self.span(axes).axes
        if not axes:
            raise ValueError("a group over axes of size 1 does not exist; nothing is to be communicated")
        return self._groups[frozenset(axes)]

    def _proper(self, axes: Axes) -> Axes:
        return tuple(axis for axis in axes if self.sizes[axis] > 1)

    def groups(self, axes: Axes) -> list[list[int]]:
        """Every group over these axes as a list of ranks by flattened coordinate."""
        names = list(self.sizes)
        picked = [names.index(axis) for axis in axes]
        kept = [dim for dim in range(len(names)) if dim not in picked]
        return self.device_mesh.mesh.permute(kept + picked).reshape(-1, self.size(axes)).tolist()

    def _mine(self, axes: Axes) -> list[int]:
        return next(row for row in self.groups(axes) if dist.get_rank() in row)

    def _create(self, axes: Axes) -> dist.ProcessGroup:
        if len(axes) == 1:
            return self.device_mesh.get_group(axes[0])
        rows = [sorted(row) for row in self.groups(axes)]
        world = dist.group.WORLD
        if rows == [list(range(dist.get_world_size()))] and world is not None:
            return world  # one communicator less
        return group_among(rows, group_desc="tedfx_" + "_".join(axes))

    def _span(self, axes: Axes) -> Span:
        group = self._groups[frozenset(axes)]
        ranks = dist.get_process_group_ranks(group)
        order = tuple(ranks.index(rank) for rank in self._mine(axes))
        natural = order == tuple(range(len(order)))
        return Span(
            axes, self.size(axes), self.coordinate(axes), _torch.group_name(group), None if natural else order
        )

    def __repr__(self) -> str:
        place = ", ".join(f"{axis}={self.coordinates[axis]}/{size}" for axis, size in self.sizes.items())
        return f"RankContext({place})"


_ACTIVE: RankContext | None = None


@contextmanager
def use(context: RankContext | None) -> Iterator[RankContext | None]:
    """Make `context` (or none) the current one. Enter it outside any compiled region."""
    global _ACTIVE
    before, _ACTIVE = _ACTIVE, context
    try:
        yield context
    finally:
        _ACTIVE = before


def current() -> RankContext:
    """The current context. RuntimeError when there is none."""
    if _ACTIVE is None:
        raise RuntimeError(
            "no tedfx run-time context is active: wrap the call in `with tedfx.ops.context.use(context):`"
        )
    return _ACTIVE


def active() -> RankContext | None:
    """The current context, or None: for who only hands it on."""
    return _ACTIVE


def span(axes: Axes) -> Span:
    """`current().span(axes)`; for no axes at all, no context is needed."""
    if len(axes) == 0:
        return _NOTHING
    return current().span(axes)


_NOTHING = Span((), 1, 0, "", None)


@dataclass(frozen=True)
class Collective:
    """One collective that ran: what, over which axes (size 1 dropped), in which phase, and its operand on
    this rank."""

    op: str
    axes: Axes
    phase: str  # "forward", "recompute" or "backward"
    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    ragged: bool = False  # routed rows: how many is data


_LOG: list[Collective] | None = None


@contextmanager
def count_collectives() -> Iterator[list[Collective]]:
    """Collect every collective that runs, in order, as a list of `Collective`. Sees eager execution only."""
    global _LOG
    before, _LOG = _LOG, []
    try:
        yield _LOG
    finally:
        _LOG = before


def record(op: str, axes: Axes, phase: str, x: torch.Tensor, ragged: bool = False) -> None:
    """Called by the ops next to each collective."""
    if torch.compiler.is_compiling() or _LOG is None:
        return
    _LOG.append(
        Collective(op, axes, _phase(phase), x.numel() * x.element_size(), tuple(x.shape), x.dtype, ragged)
    )


def _phase(phase: str) -> str:
    """A forward op that runs while a backward does is a recompute."""
    return "recompute" if phase == "forward" and _torch.backward_id() != -1 else phase


@dataclass(frozen=True)
class Event:
    """What else a rank does once per step and should not repeat: a "route" (which rows go to which expert),
    or a "host copy" (the host waits for a number of the device)."""

    what: str
    phase: str  # "forward" or "recompute"


_EVENTS: list[Event] | None = None


@contextmanager
def count_events() -> Iterator[list[Event]]:
    """Collect the routings and host copies of the MoE's ops that run, in order. Sees eager execution only."""
    global _EVENTS
    before, _EVENTS = _EVENTS, []
    try:
        yield _EVENTS
    finally:
        _EVENTS = before


def note(what: str) -> None:
    """Called by the ops next to what `count_events` counts."""
    if torch.compiler.is_compiling() or _EVENTS is None:
        return
    _EVENTS.append(Event(what, _phase("forward")))


def totals(log: Iterable[Collective]) -> dict[tuple[str, Axes], tuple[int, int]]:
    """(op, axes) -> (how many, bytes), for a log of `count_collectives`."""
    key = lambda c: (c.op, c.axes)
    groups = itertools.groupby(sorted(log, key=key), key)
    return {k: (len(v := list(g)), sum(c.bytes for c in v)) for k, g in groups}
