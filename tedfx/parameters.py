"""Parameters as DTensors: how one of the user's tensors lies on the mesh, and how a rank gets its piece.

Three shapes describe a parameter. `shape` is the user's (for stacked experts, all of one kind along a new dim 0).
`view` refines its dims into factors, so that whatever a mesh axis shards is a dim of its own: a fused gate|up
`(E, 2F, H)` sharded on F is viewed as `(E, 2, F, H)`. `held` is the shape of the DTensor that the optimizer sees: the
user's own where plain `Shard` placements in it can say the layout, which is whenever inside each dim only the major
factor is sharded; else the view. On a rank, `local` is the held piece with view dims merged back: what the programs
take, and the same storage.

Every rank receives each full tensor of rank 0 once, keeps its slice and lets go of the rest: a load never holds more
than one full tensor beside the model's own share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from tedfx import _torch
from tedfx.errors import ConfigError
from tedfx.pieces import PiecedTensor


@dataclass(frozen=True)
class ParameterLayout:
    """What the compiler decides about one parameter. It is the same on every rank.

    name: the user's name (the first of a tied tensor's), or a new name for a stack.
    shape: the user's global shape; of a stack, `(len(sources), *shape of one)`.
    view: the global shape in factors; the product of consecutive dims gives `shape`.
    shards: mesh axis -> view dim, pairs or a mapping. Axes on one dim stand in mesh order, major first.
    reduce_axes: axes on which the parameter is R: its gradient is summed over them, once.
    sources: the user's names stacked along dim 0, in order; empty for a tensor that is not a stack.
    aliases: further names of the same tied tensor.
    """

    name: str
    shape: tuple[int, ...]
    view: tuple[int, ...] = None
    shards: tuple[tuple[str, int], ...] = ()
    reduce_axes: tuple[str, ...] = ()
    requires_grad: bool = True
    sources: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    def __post_init__(self):
        shards = self.shards.items() if isinstance(self.shards, Mapping) else self.shards
        put = object.__setattr__
        put(self, "shape", tuple(int(size) for size in self.shape))
        put(self, "view", self.shape if self.view is None else tuple(int(size) for size in self.view))
        put(self, "shards", tuple((axis, int(dim)) for axis, dim in shards))
        for field in ("reduce_axes", "sources", "aliases"):
            put(self, field, tuple(getattr(self, field)))
        if self.sources and (self.aliases or self.view[:1] != self.shape[:1] or self.shape[0] != len(self.sources)):
            raise ConfigError(f"parameter {self.name}: a stack of {len(self.sources)} needs dim 0 of that size, whole in its view")

    @property
    def names(self) -> tuple[str, ...]:
        """The user's names of all that this parameter holds."""
        return self.sources or (self.name, *self.aliases)


class Placed:
    """A layout on a mesh: shapes and intervals on this rank. `mesh` is a DeviceMesh with named axes."""

    def __init__(self, layout: ParameterLayout, mesh):
        self.layout, self.mesh, self._specs = layout, mesh, {}
        names, sizes = mesh.mesh_dim_names, tuple(mesh.mesh.shape)
        size, coordinate = dict(zip(names, sizes)), dict(zip(names, mesh.get_coordinate()))
        self._check_axes(names, size)
        shards = [(axis, dim) for axis, dim in layout.shards if size[axis] > 1]
        self.reduce_axes = tuple(axis for axis in names if axis in layout.reduce_axes and size[axis] > 1)
        self.shard_axes = tuple(axis for axis, _ in shards)
        self.groups = self._merge()

        # Step 1: this rank's interval of each view dim.
        starts, lengths = [0] * len(layout.view), list(layout.view)
        for axis, dim in shards:
            if lengths[dim] % size[axis]:
                raise ConfigError(
                    f"parameter {layout.name}: dim {dim} of {layout.view} does not divide over {axis}={size[axis]}"
                )
            lengths[dim] //= size[axis]
            starts[dim] += coordinate[axis] * lengths[dim]
        self.starts, self.local_view = tuple(starts), tuple(lengths)
        self.local_shape = tuple(prod(lengths[d] for d in group) for group in self.groups)

        # Step 2: the shape that plain placements can describe.
        held_dim = {dim: (g, k) for g, group in enumerate(self.groups) for k, dim in enumerate(group)}
        major = {g: next((d for d in group if layout.view[d] > 1), None) for g, group in enumerate(self.groups)}
        self.plain = all(major[held_dim[dim][0]] == dim for _, dim in shards)
        self.held = layout.shape if self.plain else layout.view
        self.local_held = self.local_shape if self.plain else self.local_view
        where = {axis: held_dim[dim][0] if self.plain else dim for axis, dim in shards}
        self.placements = tuple(Shard(where[axis]) if axis in where else Replicate() for axis in names)
        self.unsynced = tuple(
            Partial() if axis in self.reduce_axes else placement for axis, placement in zip(names, self.placements)
        )

    def _check_axes(self, names, size) -> None:
        layout = self.layout
        for axis in (*(axis for axis, _ in layout.shards), *layout.reduce_axes):
            if axis not in size:
                raise ConfigError(f"parameter {layout.name}: axis {axis!r} is not on the mesh {names}")
        for axis, dim in layout.shards:
            if axis in layout.reduce_axes:
                raise ConfigError(f"parameter {layout.name}: axis {axis!r} both shards it and reduces its gradient")
            if not 0 <= dim < len(layout.view):
                raise ConfigError(f"parameter {layout.name}: view {layout.view} has no dim {dim}")
        for dim in {dim for _, dim in layout.shards}:
            order = [names.index(axis) for axis, d in layout.shards if d == dim and size[axis] > 1]
            if order != sorted(order) or len(order) != len(set(order)):
                raise ConfigError(f"parameter {layout.name}: the axes that shard dim {dim} must stand in mesh order {names}")

    def _merge(self) -> list[tuple[int, ...]]:
        """Which view dims make up each dim of the user's shape. Dims of size 1 go with the dim before."""
        layout, groups, dim = self.layout, [], 0
        for size in layout.shape:
            first, have = dim, 1
            while dim < len(layout.view) and (have < size or layout.view[dim] == 1):
                have *= layout.view[dim]
                dim += 1
            groups.append(tuple(range(first, dim)))
        if dim != len(layout.view) or any(prod(layout.view[d] for d in g) != size for g, size in zip(groups, layout.shape)):
            raise ConfigError(f"parameter {layout.name}: view {layout.view} does not refine shape {layout.shape}")
        return groups

    # ---- tensors -------------------------------------------------------------------------------------------------

    def dtensor(self, local: Tensor, placements=None) -> DTensor:
        """`local` (any shape of this rank's piece) as the held DTensor."""
        placements, local = placements or self.placements, local.view(self.local_held)
        key = (placements, local.dtype, local.device)
        if key not in self._specs:  # from_local costs some 100 us, and a step makes a DTensor per gradient
            shape, stride = torch.Size(self.held), _strides(self.held)
            first = DTensor.from_local(local, self.mesh, placements, run_check=False, shape=shape, stride=stride)
            self._specs[key] = _torch.spec_of(first)
        return _torch.dtensor_of(local, self._specs[key])

    @cached_property
    def chunks(self) -> dict[str, list[tuple[tuple[int, ...], tuple[slice, ...]]]]:
        """For each of the user's names, the boxes this rank has of it: (offsets in the user's tensor, where in `local`).

        A box is contiguous in each dim of the user's tensor; a fused dim gives one box per outer factor.
        """
        runs = [self._runs(group) for group in self.groups]
        local = [[slice(k * size, (k + 1) * size) for k in range(len(starts))] for starts, size in runs]
        first = 1 if self.layout.sources else 0
        boxes = list(product(*[list(zip(starts, where)) for (starts, _), where in zip(runs[first:], local[first:])]))
        offsets = [tuple(start for start, _ in box) for box in boxes]
        places = [tuple(where for _, where in box) for box in boxes]
        if not self.layout.sources:
            return {name: list(zip(offsets, places)) for name in self.layout.names}
        table = {}
        for index, name in enumerate(self.layout.sources):
            at = index - self.starts[0]
            table[name] = [(o, (at, *p)) for o, p in zip(offsets, places)] if 0 <= at < self.local_view[0] else []
        return table

    def _runs(self, group: tuple[int, ...]) -> tuple[list[int], int]:
        """The contiguous intervals of one user's dim that this rank holds: their starts, and their common length."""
        view = self.layout.view
        last = max((k for k, d in enumerate(group) if self.local_view[d] != view[d]), default=0)
        inner = prod(view[d] for d in group[last + 1 :])
        outer = [range(self.starts[d], self.starts[d] + self.local_view[d]) for d in group[:last]]
        start, length = (self.starts[group[last]], self.local_view[group[last]]) if group else (0, 1)
        starts = []
        for indices in product(*outer):
            flat = 0
            for d, index in zip(group, indices):
                flat = flat * view[d] + index
            starts.append((flat * (view[group[last]] if group else 1) + start) * inner)
        return starts, length * inner

    def entries(self, held: DTensor) -> dict[str, Tensor]:
        """The user's tensors that `held` (the parameter, its gradient, a moment of the optimizer) consists of.

        Each is a DTensor in the user's own shape where plain placements can say so, else a `PiecedTensor`. All share
        storage with `held`. Names, shapes and chunk boundaries mean the same on every mesh.
        """
        layout = self.layout
        with torch.no_grad():
            local = held.to_local().detach().view(self.local_shape)
        if self.plain and not layout.sources:
            return {name: held.detach() for name in layout.names}
        if self.plain and self.local_shape[0] == layout.shape[0]:
            placements = tuple(Shard(p.dim - 1) if isinstance(p, Shard) else p for p in self.placements)
            shape = torch.Size(layout.shape[1:])
            return {
                name: DTensor.from_local(
                    local[i], self.mesh, placements, run_check=False, shape=shape, stride=_strides(shape)
                )
                for i, name in enumerate(layout.sources)
            }
        return {
            name: PiecedTensor(
                layout.shape[1:] if layout.sources else layout.shape,
                [(offsets, local[where]) for offsets, where in boxes],
                self.mesh, self.shard_axes, local.dtype, local.device,
            )
            for name, boxes in self.chunks.items()
        }

    def gather(self, held: DTensor) -> dict[str, Tensor]:
        """{user's name: full tensor} on every rank. A collective; pending sums of an unsynced gradient are done."""
        full = held.detach().full_tensor().reshape(self.layout.shape)
        if self.layout.sources:
            return {name: full[index].clone() for index, name in enumerate(self.layout.sources)}
        return {name: full for name in self.layout.names}

    def cut(self, name: str, full: Tensor, local: Tensor) -> None:
        """Copy this rank's part of the user's full tensor `name` into `local` (shape `local_shape`)."""
        for offsets, where in self.chunks[name]:
            target = local[where]
            target.copy_(full[tuple(slice(o, o + n) for o, n in zip(offsets, target.shape))])


def _strides(shape) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(int(size), 1)
    return tuple(reversed(strides))


def materialize(placed: Placed, broadcast: Callable[[str], Tensor]) -> nn.Parameter:
    """This rank's parameter. `broadcast(name)` is a collective that returns rank 0's full tensor on every rank."""
    layout, local = placed.layout, None
    for name in layout.sources or (layout.name,):
        full = broadcast(name)
        want = layout.shape[1:] if layout.sources else layout.shape
        if tuple(full.shape) != want:
            raise ConfigError(f"parameter {name} has shape {tuple(full.shape)}, the layout of {layout.name} expects {want}")
        if local is None:
            local = torch.empty(placed.local_shape, dtype=full.dtype, device=full.device)
        placed.cut(name, full, local)
        del full
    return nn.Parameter(placed.dtensor(local), requires_grad=layout.requires_grad)
