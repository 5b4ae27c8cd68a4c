"""Parameters as DTensors: how one of the user's tensors lies on the mesh, and how a rank gets its piece.

Three shapes describe a parameter. `shape` is the user's (for stacked experts, all of one kind along a new dim
0). `view` refines its dims into factors, so that whatever a mesh axis shards is a dim of its own: a fused
gate|up `(E, 2F, H)` sharded on F is viewed as `(E, 2, F, H)`. `held` is the shape of the DTensor that the
optimizer sees: the user's own where plain `Shard` placements in it can say the layout, which is whenever
inside each dim only the major factor is sharded; else the view. On a rank, `local` is the held piece with
view dims merged back: what the programs take, and the same storage.

Every rank receives each full tensor of rank 0 once, keeps its slice and lets go of the rest: a load never
holds more than one full tensor beside the model's own share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from tedfx import _torch
from tedfx.errors import ConfigError
from tedfx.ops.cuts import Cut, intervals
from tedfx.state.extents import Extent, share_dim, strides


@dataclass(frozen=True)
class ParameterLayout:
    """What the compiler decides about one parameter. It is the same on every rank.

    name: the user's name (the first of a tied tensor's), or a new name for a stack. shape: the user's global
    shape; of a stack, `(len(sources), *shape of one)`. view: the global shape in factors; the product of
    consecutive dims gives `shape`. shards: mesh axis -> view dim, pairs or a mapping. Axes on one dim stand
    in mesh order, major first. reduce_axes: axes on which the parameter is R: its gradient is summed over
    them, once. sources: the user's names stacked along dim 0, in order; empty for a tensor that is not a
    stack. aliases: further names of the same tied tensor. stack_aliases: of a stack, those of each source;
    empty where no source has any. A mixture used in two places has them.
    """

    name: str
    shape: tuple[int, ...]
    view: tuple[int, ...] = ()  # missing: `shape`
    shards: tuple[tuple[str, int], ...] = ()
    reduce_axes: tuple[str, ...] = ()
    requires_grad: bool = True
    sources: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    stack_aliases: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self):
        shards = self.shards.items() if isinstance(self.shards, Mapping) else self.shards
        put = object.__setattr__
        put(self, "shape", tuple(int(size) for size in self.shape))
        put(self, "view", tuple(int(size) for size in self.view or self.shape))
        put(self, "shards", tuple((axis, int(dim)) for axis, dim in shards))
        for field in ("reduce_axes", "sources", "aliases", "stack_aliases"):
            put(self, field, tuple(getattr(self, field)))
        if self.sources and (
            self.aliases
            or len(self.stack_aliases) not in (0, len(self.sources))
            or self.view[:1] != self.shape[:1]
            or self.shape[0] != len(self.sources)
        ):
            raise ConfigError(
                f"parameter {self.name}: a stack of {len(self.sources)} needs dim 0 of that size, whole "
                "in its view"
            )

    @property
    def user_shape(self) -> tuple[int, ...]:
        """Of each of the user's tensors."""
        return self.shape[1:] if self.sources else self.shape

    @property
    def names(self) -> tuple[str, ...]:
        """The user's names of all that this parameter holds."""
        return tuple(name for group in self.groups for name in group)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The user's names of each tensor that this parameter holds, the first of which stands for all: one
        tensor, or the sources of a stack in order."""
        if not self.sources:
            return ((self.name, *self.aliases),)
        return tuple(
            (name, *more) for name, more in zip(self.sources, self.stack_aliases or ((),) * len(self.sources))
        )


class Placed:
    """A layout on a mesh: shapes and intervals on this rank. `mesh` is a DeviceMesh with named axes.

    cut: how `whole` is cut into the ranks' shares (`tedfx.ops.cuts.Cut`), None where the share is the whole;
    common_cut: the same in numbers that all ranks share. uneven: whether some rank's piece is shorter.
    stage: of ZeRO (arXiv 1910.02054). From 1 on an optimizer owns this rank's `share` of a parameter, and
    gradients are summed into it; at 3 the parameter itself is the share.
    """

    def __init__(self, layout: ParameterLayout, mesh, stage: int = 0):
        self.layout, self.mesh, self.stage, self._specs = layout, mesh, stage, {}
        names, sizes = mesh.mesh_dim_names, tuple(mesh.mesh.shape)
        size, coordinate = dict(zip(names, sizes)), dict(zip(names, mesh.get_coordinate()))
        self._check_axes(names, size)
        shards = [(axis, dim) for axis, dim in layout.shards if size[axis] > 1]
        self.reduce_axes = tuple(axis for axis in names if axis in layout.reduce_axes and size[axis] > 1)
        self.shard_axes = tuple(axis for axis, _ in shards)
        over: dict[int, list[int]] = {}  # view dim -> sizes of the axes that shard it, major first
        at: dict[int, int] = {}  # view dim -> this rank's coordinate over them
        for axis, dim in shards:
            over.setdefault(dim, []).append(size[axis])
            at[dim] = at.get(dim, 0) * size[axis] + coordinate[axis]
        pieces = {dim: intervals(layout.view[dim], sizes) for dim, sizes in over.items()}
        axes_of = {dim: tuple(axis for axis, d in shards if d == dim) for dim in over}
        self.uneven = any(len({length for _, length in each}) > 1 for each in pieces.values())

        # Step 1: the view, one dim finer where ZeRO needs it: (ranks, rest) of a sharded dim, of which it
        # cuts the rest.
        view, share = list(layout.view), None
        groups = _merge(layout, view)
        if stage:
            lengths = [pieces[d][0][1] if d in pieces else n for d, n in enumerate(view)]
            cut = {d: len(each) for d, each in pieces.items()}
            share, split = share_dim(
                layout.shape, view, groups, lengths, cut, prod(size[a] for a in self.reduce_axes)
            )
            if split:
                assert share is not None, layout  # the dim that is split
                view[share : share + 1] = [cut[share], view[share] // cut[share]]
                finer = {dim: dim + (dim > share) for dim in pieces}
                shards = [(axis, finer[dim]) for axis, dim in shards]
                at = {finer[dim]: index for dim, index in at.items()}
                pieces = {finer[dim]: each for dim, each in pieces.items()}
                axes_of = {finer[dim]: each for dim, each in axes_of.items()}
                pieces[share] = tuple((i, 1) for i in range(cut[share]))
                groups, share = _merge(layout, view), share + 1
        self.view, self.groups = tuple(view), groups

        # Step 2: this rank's interval of each view dim.
        starts, lengths = [0] * len(view), list(view)
        for dim, each in pieces.items():
            starts[dim], lengths[dim] = each[at[dim]]

        # Step 3: the shape that plain placements can describe.
        held_dim = {dim: (g, k) for g, group in enumerate(groups) for k, dim in enumerate(group)}
        major = {g: next((d for d in group if view[d] > 1), None) for g, group in enumerate(groups)}
        divided = [dim for _, dim in shards] + ([] if share is None else [share])
        self.plain = all(major[held_dim[dim][0]] == dim for dim in divided) and not any(
            len({length for _, length in pieces[dim]}) > 1 and view[dim] != layout.shape[held_dim[dim][0]]
            for _, dim in shards  # DTensor would cut the whole dim of the user's, and inside of a piece
        )
        self.held = layout.shape if self.plain else self.view
        where = {axis: held_dim[dim][0] if self.plain else dim for axis, dim in shards}
        placements = tuple(Shard(where[axis]) if axis in where else Replicate() for axis in names)
        self.whole = Extent(
            layout, mesh, self.view, groups, starts, lengths, self.plain, placements, self.shard_axes
        )
        self.unsynced = tuple(
            Partial() if axis in self.reduce_axes else placement for axis, placement in zip(names, placements)
        )

        # Step 4: this rank's share.
        self.share, self.share_dim, self.cut, self.common_cut = self.whole, None, None, None
        if share is not None:
            ranks = tuple(size[axis] for axis in self.reduce_axes)
            shares = intervals(lengths[share], ranks)
            self.index = _flat_index([coordinate[axis] for axis in self.reduce_axes], ranks)
            inner = self.whole.held[held_dim[share][0]] // lengths[share] if self.plain else 1
            self.share_dim = held_dim[share][0] if self.plain else share
            self.cut = Cut(
                self.whole.shape,
                self.whole.held,
                self.share_dim,
                tuple(length * inner for _, length in shares),
            )
            common = lambda dims: _common(dims, lengths, pieces, axes_of)
            shape = tuple(common(group) for group in groups)
            held = shape if self.plain else tuple(common((dim,)) for dim in range(len(view)))
            self.common_cut = self.cut._replace(shape=shape, held=held)
            starts, lengths = list(starts), list(lengths)
            starts[share], lengths[share] = starts[share] + shares[self.index][0], shares[self.index][1]
            placements = tuple(
                Shard(self.share_dim) if axis in self.reduce_axes else placement
                for axis, placement in zip(names, placements)
            )
            self.share = Extent(
                layout,
                mesh,
                self.view,
                groups,
                starts,
                lengths,
                self.plain,
                placements,
                (*self.shard_axes, *self.reduce_axes),
            )
        self.kept = self.share if stage == 3 else self.whole
        self.placements = self.kept.placements
        self.local_shape, self.local_held = self.whole.shape, self.whole.held

    def _check_axes(self, names, size) -> None:
        layout = self.layout
        for axis in (*(axis for axis, _ in layout.shards), *layout.reduce_axes):
            if axis not in size:
                raise ConfigError(f"parameter {layout.name}: axis {axis!r} is not on the mesh {names}")
        for axis, dim in layout.shards:
            if axis in layout.reduce_axes:
                raise ConfigError(
                    f"parameter {layout.name}: axis {axis!r} both shards it and reduces its gradient"
                )
            if not 0 <= dim < len(layout.view):
                raise ConfigError(f"parameter {layout.name}: view {layout.view} has no dim {dim}")
        for dim in {dim for _, dim in layout.shards}:
            order = [names.index(axis) for axis, d in layout.shards if d == dim and size[axis] > 1]
            if order != sorted(order) or len(order) != len(set(order)):
                raise ConfigError(
                    f"parameter {layout.name}: the axes that shard dim {dim} must stand in mesh order {names}"
                )

    # ---- tensors -------------------------------------------------------------------------------------------

    def dtensor(self, local: Tensor, placements=None) -> DTensor:
        """`local` (any shape of this rank's piece) as the held DTensor; `placements`: the parameter's,
        `whole`'s, `share`'s or `unsynced`."""
        placements = placements or self.placements
        local = local.view(self.extent(placements).held)
        key = (placements, local.dtype, local.device)
        if key not in self._specs:  # from_local costs some 100 us, and a step makes a DTensor per gradient
            shape = torch.Size(self.held)
            first = DTensor.from_local(
                local, self.mesh, placements, run_check=False, shape=shape, stride=strides(shape)
            )
            self._specs[key] = _torch.spec_of(first)
        return _torch.dtensor_of(local, self._specs[key])

    def extent(self, placements) -> Extent:
        """What a DTensor with these placements holds on this rank."""
        return (
            self.share
            if self.share_dim is not None and tuple(placements) == self.share.placements
            else self.whole
        )

    def share_of(self, local: Tensor) -> Tensor:
        """The part of a whole local tensor that is this rank's share; a view."""
        if self.share_dim is None:
            return local
        return self.share_cut.share_of(local, self.index)

    @property
    def share_cut(self) -> Cut:
        """`cut`, of a parameter whose share is not the whole."""
        assert self.cut is not None
        return self.cut

    def entries(self, held: DTensor) -> dict[str, Tensor]:
        """The user's tensors that `held` (the parameter, its gradient, a moment of the optimizer) consists
        of.

        Each is a DTensor in the user's own shape where plain placements can say so, else a `PiecedTensor`.
        All share storage with `held`. Names, shapes and chunk boundaries mean the same on every mesh.
        """
        return self.extent(held.placements).entries(held)

    def gather(self, held: DTensor) -> dict[str, Tensor]:
        """{user's name: full tensor} on every rank. A collective; pending sums of an unsynced gradient are
        done."""
        full = as_dtensor(held.detach()).full_tensor().reshape(self.layout.shape)
        if self.layout.sources:
            pieces = [full[index].clone() for index in range(len(self.layout.sources))]
            return {name: piece for piece, names in zip(pieces, self.layout.groups) for name in names}
        return {name: full for name in self.layout.names}


def _merge(layout: ParameterLayout, view) -> list[tuple[int, ...]]:
    """Which view dims make up each dim of the user's shape. Dims of size 1 go with the dim before."""
    groups, dim = [], 0
    for size in layout.shape:
        first, have = dim, 1
        while dim < len(view) and (have < size or view[dim] == 1):
            have *= view[dim]
            dim += 1
        groups.append(tuple(range(first, dim)))
    if dim != len(view) or any(prod(view[d] for d in g) != size for g, size in zip(groups, layout.shape)):
        raise ConfigError(f"parameter {layout.name}: view {layout.view} does not refine shape {layout.shape}")
    return groups


def _common(dims, lengths, pieces, axes_of):
    """The product of some view dims on a rank, for `tedfx.ops.cuts.Cut`: a number, or what gives each rank
    its own where they have different ones."""
    factors = [
        (tuple(length for _, length in pieces[d]), axes_of[d])
        for d in dims
        if d in pieces and len({length for _, length in pieces[d]}) > 1
    ]
    rest = prod(lengths[d] for d in dims if (d not in pieces or len({n for _, n in pieces[d]}) == 1))
    return (*factors, ((rest,), ())) if factors else rest


def _flat_index(coordinates, sizes) -> int:
    index = 0
    for coordinate, size in zip(coordinates, sizes):
        index = index * size + coordinate
    return index


def as_dtensor(tensor: Tensor) -> DTensor:
    """A parameter or its gradient, which is a DTensor."""
    assert isinstance(tensor, DTensor)
    return tensor


def local_of(tensor: Tensor) -> Tensor:
    """This rank's piece of a parameter or its gradient."""
    return as_dtensor(tensor).to_local()


def materialize(placed: Placed, broadcast: Callable[[str], Tensor]) -> nn.Parameter:
    """This rank's parameter. `broadcast(name)` is a collective that returns rank 0's full tensor on every
    rank."""
    layout, local = placed.layout, None
    for name in layout.sources or (layout.name,):
        full = broadcast(name)
        want = layout.user_shape
        if tuple(full.shape) != want:
            raise ConfigError(
                f"parameter {name} has shape {tuple(full.shape)}, the layout of {layout.name} expects {want}"
            )
        if local is None:
            local = torch.empty(placed.kept.shape, dtype=full.dtype, device=full.device)
        placed.kept.cut(name, full, local)
        del full
    assert local is not None, layout  # there is one name at least
    return nn.Parameter(placed.dtensor(local), requires_grad=layout.requires_grad)
