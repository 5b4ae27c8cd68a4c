"""The ranks of a mesh as threads of one process, and values as the ranks hold them.

`Ranks` stands in for process groups: the functional collectives of `tedfx/_torch.py` are replaced by
exchanges between threads, so that the very ops of the local graph run, forward and backward, at the cost of a
function call. CPU autograd runs backward on the thread that calls it.

`split` and `join` say what a type means, and know nothing of the compiler: per axis R and I are copies, P
parts that sum to the value, S pieces of one factor, wherever it stands inside its dim.
"""

from __future__ import annotations

import threading
from math import prod

import torch
from torch import Tensor

from tedfx import _torch
from tedfx.ops import context
from tedfx.ops.context import Span
from tedfx.placement.factors import leaves
from tedfx.placement.types import I, P, R, Shard, find_dim

TIMEOUT = 60.0


class Ranks:
    """`run(fn)` calls `fn(rank)` on a thread per rank, inside a stand-in of the run-time context; the results
    by rank."""

    def __init__(self, mesh: dict[str, int]):
        self.sizes = dict(mesh)
        self.world = prod(mesh.values())
        self._local = threading.local()
        self._groups: dict = {}
        self._lock = threading.Lock()

    def coordinates(self, rank: int) -> dict[str, int]:
        found = {}
        for axis, size in reversed(self.sizes.items()):
            rank, found[axis] = divmod(rank, size)
        return found

    # what the ops ask of a context
    def span(self, axes) -> Span:
        axes = tuple(a for a in axes if self.sizes[a] > 1)
        if not axes:
            return Span((), 1, 0, "", None)
        here, index = self.coordinates(self._local.rank), 0
        for axis in axes:
            index = index * self.sizes[axis] + here[axis]
        rest = tuple((a, here[a]) for a in self.sizes if a not in axes)
        name = repr((axes, rest))
        size = prod(self.sizes[a] for a in axes)
        with self._lock:
            self._groups.setdefault(name, (threading.Barrier(size), [None] * size, axes))
        return Span(axes, size, index, name, None)

    def _exchange(self, x, name: str) -> tuple[list, int]:
        barrier, slots, axes = self._groups[name]
        index = self.span(axes).index
        slots[index] = x
        barrier.wait(TIMEOUT)
        found = list(slots)
        barrier.wait(TIMEOUT)
        return found, index

    def _all_reduce(self, x, op, name):
        found, _ = self._exchange(x, name)
        return torch.stack(found).sum(0).to(x.dtype) if op == "sum" else torch.stack(found).amax(0)

    def _all_gather(self, x, size, name):
        return torch.cat(self._exchange(x, name)[0])

    def _reduce_scatter(self, x, size, name):
        found, index = self._exchange(x, name)
        return torch.stack(found).sum(0).chunk(size)[index].contiguous()

    def _all_to_all(self, x, recv, send, name):
        found, index = self._exchange(x.split(list(send)), name)
        out = torch.cat([runs[index] for runs in found])
        assert out.shape[0] == sum(recv)
        return out

    def run(self, fn) -> list:
        results, errors = [None] * self.world, []

        def work(rank):
            self._local.rank = rank
            try:
                results[rank] = fn(rank)
            except Exception as error:
                errors.append(error)
                for barrier, *_ in list(self._groups.values()):
                    barrier.abort()

        names = {
            "all_reduce": self._all_reduce,
            "all_gather": self._all_gather,
            "reduce_scatter": self._reduce_scatter,
            "all_to_all": self._all_to_all,
        }
        before = {name: getattr(_torch, name) for name in names}
        active, context._ACTIVE = context._ACTIVE, self
        for name, stand_in in names.items():
            setattr(_torch, name, stand_in)
        try:
            threads = [
                threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(1, self.world)
            ]
            for thread in threads:
                thread.start()
            work(0)
            for thread in threads:
                thread.join(TIMEOUT)
        finally:
            context._ACTIVE = active
            for name, real in before.items():
                setattr(_torch, name, real)
            self._groups.clear()
        first = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)] or errors
        if first:
            raise first[0]
        return results


def _cut(x: Tensor, dims, factor, known: dict, shares: dict, degree: int) -> list[Tensor]:
    """x in `degree` pieces along one factor; `shares` says into how many parts each factor is cut already."""
    dim, place = find_dim(dims, factor)
    sizes = [known[f.size] // shares.get(f, 1) for f in leaves(dims[dim])]
    assert prod(sizes) == x.shape[dim] and (sizes[place] % degree == 0 or factor not in shares), (
        sizes,
        x.shape,
        factor,
    )
    view = x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])
    rest = prod(sizes) // sizes[place]
    return [
        piece.reshape(*x.shape[:dim], rest * piece.shape[dim + place], *x.shape[dim + 1 :]).contiguous()
        for piece in _chunks(view, degree, dim + place)
    ]


def _chunks(x: Tensor, degree: int, dim: int) -> list[Tensor]:
    """torch's chunks; empty ones where there are fewer than `degree`, as DTensor has them."""
    found = list(x.chunk(degree, dim))
    return found + [x.narrow(dim, 0, 0)] * (degree - len(found))


def _paste(pieces: list[Tensor], dims, factor, known: dict, shares: dict) -> Tensor:
    dim, place = find_dim(dims, factor)
    x, degree = pieces[0], len(pieces)
    sizes = [known[f.size] // shares.get(f, 1) for f in leaves(dims[dim])]
    views = []
    for piece, run in zip(pieces, _chunks(torch.arange(sizes[place]), degree, 0)):
        cut = [*sizes[:place], len(run), *sizes[place + 1 :]]
        assert prod(cut) == piece.shape[dim], (cut, piece.shape, factor)
        views.append(piece.reshape(*x.shape[:dim], *cut, *x.shape[dim + 1 :]))
    return torch.cat(views, dim + place).reshape(*x.shape[:dim], prod(sizes), *x.shape[dim + 1 :])


class Known(dict):
    """The values of sizes: numbers are themselves, symbols are looked up."""

    def __missing__(self, size):
        if isinstance(size, int):
            return size
        return int(size.subs(self))


def split(
    x: Tensor, dims, type_: dict, mesh: dict, known: dict | None = None, generator=None
) -> list[Tensor]:
    """The value by rank."""
    known = Known(known or {})
    pieces, shares = [x], {}
    for axis, degree in mesh.items():
        placement = type_.get(axis, I)
        grown = []
        for piece in pieces:
            if isinstance(placement, Shard):
                grown += _cut(piece, dims, placement.factor.root(), known, shares, degree)
            elif placement == P:
                parts = [noise(piece, generator) for _ in range(degree - 1)]
                grown += [*parts, piece - sum(parts)]
            else:
                grown += [piece] * degree
        pieces = grown
        if isinstance(placement, Shard):
            root = placement.factor.root()
            shares[root] = shares.get(root, 1) * degree
    return pieces


def noise(like: Tensor, generator=None) -> Tensor:
    if like.dtype.is_floating_point:
        return torch.randn(like.shape, dtype=like.dtype, generator=generator)
    return torch.randint(-3, 4, like.shape, generator=generator).to(like.dtype)


def join(
    pieces: list[Tensor], dims, type_: dict, mesh: dict, known: dict | None = None, what: str = "value"
) -> Tensor:
    """The value that the ranks hold together; AssertionError where copies differ."""
    known = Known(known or {})
    axes = list(mesh.items())
    for at in reversed(range(len(axes))):
        axis, degree = axes[at]
        placement = type_.get(axis, I)
        shares: dict = {}
        for earlier, size in axes[:at]:
            if isinstance(type_.get(earlier), Shard):
                root = type_[earlier].factor.root()
                shares[root] = shares.get(root, 1) * size
        joined = []
        for first in range(0, len(pieces), degree):
            run = pieces[first : first + degree]
            if isinstance(placement, Shard):
                joined.append(_paste(run, dims, placement.factor.root(), known, shares))
            elif placement == P:
                joined.append(sum(run[1:], run[0]))
            else:
                for other in run[1:]:
                    same(other, run[0], f"{what} is {placement} on {axis}, but its copies differ")
                joined.append(run[0])
        pieces = joined
    (x,) = pieces
    return x


_COTANGENT = {R: P, P: R, I: I}


def cotangent(type_: dict) -> dict:
    """R <-> P, I <-> I, S <-> S."""
    return {axis: p if isinstance(p, Shard) else _COTANGENT[p] for axis, p in type_.items()}


def same(actual: Tensor, expected: Tensor, message: str) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=1e-9, atol=1e-9, equal_nan=True, msg=lambda text: f"{message}\n{text}"
    )
