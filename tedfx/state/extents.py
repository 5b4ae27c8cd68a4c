"""Which part of a parameter a rank holds: a box of its view, and where that lies in the user's tensors.

A parameter has up to two extents on a rank. **whole** is what programs compute with: what is left when the
axes that shard it are cut away, the same on all ranks over which it is replicated. **share** is this rank's
part of that under ZeRO: one dim of it, cut over the axes that its gradient is summed over.
"""

from __future__ import annotations

from functools import cached_property
from itertools import product
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from tedfx.state.pieces import PiecedTensor


class Extent:
    """A box of the view.

    view, groups   the parameter's global shape in factors, and which of its dims make up each dim of the
                   user's shape.
    starts, lengths  this rank's interval of each view dim.
    plain          whether the DTensor has the user's shape; else the view's.
    placements     of that DTensor, an entry per mesh axis.
    axes           mesh axes over which ranks hold different elements.
    """

    def __init__(self, layout, mesh, view, groups, starts, lengths, plain: bool, placements, axes):
        self.layout, self.mesh, self.view, self.groups, self.plain = layout, mesh, view, groups, plain
        self.starts, self.lengths, self.placements, self.axes = (
            tuple(starts),
            tuple(lengths),
            tuple(placements),
            tuple(axes),
        )
        self.shape = tuple(prod(lengths[d] for d in group) for group in groups)
        self.held = self.shape if plain else self.lengths
        self.numel = prod(lengths)

    @cached_property
    def chunks(self) -> dict[str, list[tuple[tuple[int, ...], tuple]]]:
        """For each of the user's names, the boxes this rank has of it: (offsets in the user's tensor, where
        in a local tensor of `shape`).

        A box is contiguous in each dim of the user's tensor; a fused dim gives one box per outer factor.
        """
        layout = self.layout
        if not self.numel:
            return {name: [] for name in layout.names}
        runs = [self._runs(group) for group in self.groups]
        local = [[slice(k * size, (k + 1) * size) for k in range(len(starts))] for starts, size in runs]
        first = 1 if layout.sources else 0
        boxes = list(
            product(*[list(zip(starts, where)) for (starts, _), where in zip(runs[first:], local[first:])])
        )
        offsets = [tuple(start for start, _ in box) for box in boxes]
        places = [tuple(where for _, where in box) for box in boxes]
        if not layout.sources:
            return {name: list(zip(offsets, places)) for name in layout.names}
        table, stacked = {}, self._indices(self.groups[0])
        for index, names in enumerate(layout.groups):
            mine = [(o, (stacked[index], *p)) for o, p in zip(offsets, places)] if index in stacked else []
            table.update(dict.fromkeys(names, mine))
        return table

    def _indices(self, group: tuple[int, ...]) -> dict[int, int]:
        """Indices of a user's dim that this rank holds -> where in the local dim."""
        starts, size = self._runs(group)
        return {start + i: k * size + i for k, start in enumerate(starts) for i in range(size)}

    def _runs(self, group: tuple[int, ...]) -> tuple[list[int], int]:
        """The contiguous intervals of one user's dim that this rank holds: their starts, and their common
        length."""
        view = self.view
        last = max((k for k, d in enumerate(group) if self.lengths[d] != view[d]), default=0)
        inner = prod(view[d] for d in group[last + 1 :])
        outer = [range(self.starts[d], self.starts[d] + self.lengths[d]) for d in group[:last]]
        start, length = (self.starts[group[last]], self.lengths[group[last]]) if group else (0, 1)
        starts = []
        for indices in product(*outer):
            flat = 0
            for d, index in zip(group, indices):
                flat = flat * view[d] + index
            starts.append((flat * (view[group[last]] if group else 1) + start) * inner)
        return starts, length * inner

    def entries(self, held: DTensor) -> dict[str, Tensor]:
        """The user's tensors that `held` consists of: see `Placed.entries`."""
        layout = self.layout
        with torch.no_grad():
            local = held.to_local().detach().view(self.shape)
        if self.plain and not layout.sources:
            return {name: held.detach() for name in layout.names}
        if self.plain and not any(isinstance(p, Shard) and p.dim == 0 for p in self.placements):
            placements = tuple(Shard(p.dim - 1) if isinstance(p, Shard) else p for p in self.placements)
            shape = torch.Size(layout.shape[1:])
            return {
                name: DTensor.from_local(
                    local[i], self.mesh, placements, run_check=False, shape=shape, stride=strides(shape)
                )
                for i, names in enumerate(layout.groups)
                for name in names
            }
        return {
            name: PiecedTensor(
                layout.shape[1:] if layout.sources else layout.shape,
                [(offsets, local[where]) for offsets, where in boxes],
                self.mesh,
                self.axes,
                local.dtype,
                local.device,
            )
            for name, boxes in self.chunks.items()
        }

    def cut(self, name: str, full: Tensor, local: Tensor) -> None:
        """Copy this rank's part of the user's full tensor `name` into `local` (of `shape`)."""
        for offsets, where in self.chunks[name]:
            target = local[where]
            target.copy_(full[tuple(slice(o, o + n) for o, n in zip(offsets, target.shape))])


def strides(shape) -> tuple[int, ...]:
    """Of a contiguous tensor, also one without elements."""
    found, step = [], 1
    for size in reversed(shape):
        found.append(step)
        step *= max(int(size), 1)
    return tuple(reversed(found))


def share_dim(shape, view, groups, lengths, sharded: dict[int, int], ranks: int) -> tuple[int | None, bool]:
    """Which view dim ZeRO cuts over `ranks`: (dim, whether a sharded dim has to be split for it), or (None,
    False).

    shape     the user's; a tensor of one dim that is sharded already stays whole: it is small, and a second
              dim would make it look like a matrix.
    sharded   view dim -> ranks over which it is cut already. `lengths` are those of the first rank, which
              has no fewer than the others, so that the dim is the same on all.

    A dim that the ranks divide comes first, and one that the user's own shape can name before one that it
    cannot; then what is left of a sharded dim; then the longest dim, in pieces that are not equal. What is
    shorter than the ranks stays whole.
    """
    if ranks == 1 or not shape or (len(shape) == 1 and sharded):
        return None, False
    free = [d for d in range(len(view)) if d not in sharded]
    named = []
    for group in groups:
        major = next((d for d in group if view[d] > 1), None)
        if major is not None and not any(d in sharded for d in group):
            named.append(major)
    for dims in (named, free):
        for d in dims:
            if lengths[d] % ranks == 0 and lengths[d] > 0:
                return d, False
    even = [d for d, over in sharded.items() if view[d] == lengths[d] * over]
    for d in even:
        if lengths[d] % ranks == 0:
            return d, True
    for dims, split in ((named, False), (free, False), (even, True)):
        d = max(dims, key=lambda d: lengths[d], default=None)
        if d is not None and lengths[d] >= ranks:
            return d, split
    return None, False
