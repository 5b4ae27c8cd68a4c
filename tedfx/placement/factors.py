"""Factors: every dim of every value is an ordered product of factors.

A **factor** is the unit that a mesh axis may shard. Ops relate factors: elementwise ops unify them, ``view``
regroups them, ``chunk`` of a fused projection refines ``[2 F]`` into ``(2, F)``. Relations are kept in a
union-find with refinement: a factor is unified with another (``_same``) or refined into an ordered product
(``_parts``), and every dim that mentions it follows. The rules in ``tedfx/rules`` state the relations;
nothing here knows an operator.

Terms: a *dim* is a tuple of factors, major first; a dim of size 1 is the empty product ``()``. *Leaves* are
the factors that stand after all unifications and refinements. Sizes are those of
`tedfx/placement/sizes.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from tedfx.placement.sizes import Size, as_size, divides, is_data, parts, product, quotient, same

_ids = itertools.count()


class Factor:
    """One factor. ``ragged`` marks rows whose number differs between ranks (V when sharded). ``everywhere``:
    of rows in slots, their number on all ranks together, in a rank's own sizes (`passes/lower_slots.py`); the
    size of the factor is that of the single device, which has other rows."""

    __slots__ = ("_size", "name", "ragged", "everywhere", "_same", "_parts", "uid")

    def __init__(self, size: Size, name: str = "", ragged: bool = False):
        self._size, self.name, self.ragged = size, name, ragged
        self.everywhere: Size | None = None
        self._same: Factor | None = None
        self._parts: tuple[Factor, ...] | None = None
        self.uid = next(_ids)

    def root(self) -> "Factor":
        factor = self
        while factor._same is not None:
            factor = factor._same
        return factor

    def leaves(self) -> tuple["Factor", ...]:
        root = self.root()
        if root._parts is None:
            return (root,)
        return tuple(leaf for part in root._parts for leaf in part.leaves())

    @property
    def size(self) -> Size:
        return self.root()._size

    def resize(self, size: Size) -> None:
        """The size turns out to be this one."""
        self.root()._size = size

    def refine(self, sizes: Sequence[Size]) -> tuple["Factor", ...]:
        """Replace this leaf by an ordered product of factors of these sizes."""
        root = self.root()
        assert root._parts is None and same(product(sizes), root._size), (root, sizes)
        root._parts = tuple(
            Factor(size, f"{root.name}.{i}" if root.name else "") for i, size in enumerate(sizes)
        )
        return root._parts

    def merge(self, other: "Factor") -> None:
        mine, theirs = self.root(), other.root()
        if mine is theirs:
            return
        if theirs.uid < mine.uid:  # the oldest stays, so that names and order do not depend on traversal
            mine, theirs = theirs, mine
        theirs._same = mine
        mine.name = mine.name or theirs.name

    def __repr__(self) -> str:
        root = self.root()
        return f"{root.name or 'f'}#{root.uid}:{root._size}"


Dim: TypeAlias = tuple[Factor, ...]


def leaves(dim: Iterable[Factor]) -> Dim:
    return tuple(leaf for factor in dim for leaf in factor.leaves())


def dim_size(dim: Iterable[Factor]) -> Size:
    """Global size of a dim."""
    return product(factor.size for factor in dim)


def settle(a: Sequence[Factor], b: Sequence[Factor]) -> None:
    """A size that only the data tells (``u0``: the number of bins, of matches) is, where it meets a known
    size, that size: the op asserts it at run time."""
    for one, other in ((leaves(a), leaves(b)), (leaves(b), leaves(a))):
        if len(one) == 1 and is_data(one[0].size):
            if dim_size(other) != one[0].size:
                one[0].resize(dim_size(other))
            return


def _always(factor: Factor, sizes: list[Size]) -> bool:
    return True


def unify(
    a: Sequence[Factor],
    b: Sequence[Factor],
    may_refine: Callable[[Factor, list[Size]], bool] = _always,
) -> bool:
    """State that two dims are the same, refining where one is finer; False (and nothing changed) where they
    do not agree.

    ``may_refine(factor, sizes)`` can veto a refinement (a refinement that would leave no part divisible by
    the tensor degree).
    """
    left, right = list(leaves(a)), list(leaves(b))
    merges: list[tuple[Factor, Factor]] = []
    refinements: dict[Factor, list[Factor]] = {}
    i = j = 0
    rest_l: Size | None = None  # what is left of a leaf that is being refined
    rest_r: Size | None = None
    while i < len(left) and j < len(right):
        size_l = left[i].size if rest_l is None else rest_l
        size_r = right[j].size if rest_r is None else rest_r
        if size_l == size_r and rest_l is None and rest_r is None:
            merges.append((left[i], right[j]))
            i, j = i + 1, j + 1
        elif size_l == size_r:  # the last part of a refined leaf
            refinements.setdefault(left[i] if rest_l is not None else right[j], []).append(
                left[i] if rest_l is None else right[j]
            )
            i, j, rest_l, rest_r = i + 1, j + 1, None, None
        elif rest_r is None and parts(size_l, size_r) is not None:
            refinements.setdefault(left[i], []).append(right[j])
            rest_l, j = parts(size_l, size_r), j + 1
        elif rest_l is None and parts(size_r, size_l) is not None:
            refinements.setdefault(right[j], []).append(left[i])
            rest_r, i = parts(size_r, size_l), i + 1
        else:
            return False
    if i < len(left) or j < len(right):
        return False
    # a leaf met twice under different splits (x x) would be refined twice: such dims do not agree
    if len({f.uid for f in refinements}) != len(refinements) or any(
        m in refinements or n in refinements for m, n in merges
    ):
        return False
    if not all(may_refine(factor, [p.size for p in finer]) for factor, finer in refinements.items()):
        return False
    for factor, finer in refinements.items():
        new = factor.refine([p.size for p in finer])
        for part, target in zip(new, finer):
            target.merge(part)
    for one, other in merges:
        one.merge(other)
    return True


def regroup(dims: Sequence[Sequence[Factor]], sizes: Sequence[Size]) -> list[Dim] | None:
    """The dims of ``view(x, sizes)``: the same factors in the same order, grouped anew, refined where a size
    cuts a factor; None where the sizes cut factors that cannot be refined (12 = 3 x 4 viewed as 4 x 3)."""
    flat = [leaf for dim in dims for leaf in leaves(dim)]
    out: list[Dim] = []
    position = 0
    for size in map(as_size, sizes):
        taken: list[Factor] = []
        remaining: Size = size
        while remaining != 1:
            if position == len(flat):
                return None
            leaf = flat[position]
            if divides(leaf.size, remaining):
                taken.append(leaf)
                remaining = quotient(remaining, leaf.size)
                position += 1
            elif (rest := parts(leaf.size, remaining)) is not None:
                first, second = leaf.refine([remaining, rest])
                flat[position : position + 1] = [second]
                # the same leaf may stand again further on
                flat = flat[: position + 1] + [part for f in flat[position + 1 :] for part in f.leaves()]
                taken.append(first)
                remaining = 1
            else:
                return None
        out.append(tuple(taken))
    return out if position == len(flat) else None


def refine_dim(dim: Sequence[Factor], sizes: Sequence[Size]) -> list[Dim] | None:
    """Split a dim into an ordered product of given sizes; the dims of the parts, or None."""
    return regroup([dim], sizes)
