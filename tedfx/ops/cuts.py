"""How a local tensor is cut into the ranks' shares, as plain numbers: the same on every rank, so that graphs
can print it.

Shares travel side by side as rows [ranks, width], padded to the largest, so that one gather or one
reduce-scatter takes many parameters at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Cut(NamedTuple):
    """A local tensor of `shape`, seen as `held`, whose dim `dim` is cut into pieces of these `lengths`, one
    per rank.

    In a graph, which all ranks share, a size that differs between them is a product ((lengths, axes), ..) of
    the pieces over these axes; `at` makes numbers of them.
    """

    shape: tuple[int, ...]
    held: tuple[int, ...]
    dim: int
    lengths: tuple[int, ...]

    def at(self, coordinate: Callable[[tuple[str, ...]], int]) -> "Cut":
        """On the rank with this `coordinate` over some axes."""
        return self._replace(
            shape=tuple(_number(size, coordinate) for size in self.shape),
            held=tuple(_number(size, coordinate) for size in self.held),
        )

    @property
    def width(self) -> int:
        """Elements of the largest share."""
        return max(self.lengths) * (_product(self.held) // self.held[self.dim])

    @property
    def even(self) -> bool:
        return len(set(self.lengths)) == 1

    def piece(self, index: int) -> tuple[int, int]:
        """(start, length) of rank `index` along `dim`."""
        return sum(self.lengths[:index]), self.lengths[index]

    def share_shape(self, index: int) -> tuple[int, ...]:
        return (*self.held[: self.dim], self.lengths[index], *self.held[self.dim + 1 :])

    def share_of(self, local: Tensor, index: int) -> Tensor:
        """Rank `index`'s share of a whole local tensor; a view."""
        return local.view(self.held).narrow(self.dim, *self.piece(index))

    def spread(self, local: Tensor) -> Tensor:
        """A whole local tensor -> [ranks, width]: a rank's share in each row, zeros behind it where it is
        shorter."""
        local, ranks = local.reshape(self.held), len(self.lengths)
        if self.even:
            return (
                local.unflatten(self.dim, (ranks, self.lengths[0]))
                .movedim(self.dim, 0)
                .reshape(ranks, self.width)
            )
        return torch.stack([self.padded(self.share_of(local, i)) for i in range(ranks)])

    def collect(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """The inverse of `spread`: [ranks, width] -> the whole local tensor, of `shape`; into `out` where
        given."""
        if self.even:
            moved = rows.reshape(len(self.lengths), *self.share_shape(0)).movedim(0, self.dim)
            if out is None:
                return moved.reshape(self.shape)
            out.view(self.held).unflatten(self.dim, (len(self.lengths), self.lengths[0])).copy_(moved)
            return out
        pieces = [
            row[: _product(self.share_shape(i))].view(self.share_shape(i))
            for i, row in enumerate(rows.unbind(0))
        ]
        if out is None:
            return torch.cat(pieces, self.dim).view(self.shape)
        for i, piece in enumerate(pieces):
            self.share_of(out, i).copy_(piece)
        return out

    def padded(self, share: Tensor) -> Tensor:
        """A share, of any shape, as a row of `width`."""
        flat = share.reshape(-1)
        return (
            flat
            if flat.numel() == self.width
            else torch.nn.functional.pad(flat, (0, self.width - flat.numel()))
        )


def intervals(size: int, sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(start, length) of each rank's piece of a dim that mesh axes of these sizes cut, major first: pieces of
    the rounded-up quotient, the last ones shorter or empty, axis by axis. So does DTensor."""
    pieces = [(0, size)]
    for n in sizes:
        finer = []
        for start, length in pieces:
            step = -(-length // n)
            for i in range(n):
                begin = min(i * step, length)
                finer.append((start + begin, min(step, length - begin)))
        pieces = finer
    return tuple(pieces)


def lengths_of(size: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """How long the ranks' `intervals` are."""
    return tuple(length for _, length in intervals(size, sizes))


def _number(size: Any, coordinate: Callable[[tuple[str, ...]], int]) -> int:
    return size if isinstance(size, int) else _product(pieces[coordinate(axes)] for pieces, axes in size)


def _product(sizes) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
