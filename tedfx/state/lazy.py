"""Tensors of a checkpoint that are read box by box: what a rank does not hold is not read.

A node has a shape and `fill(box, out, read)`: write its part `box` (a slice with start and stop per dim) into
`out`, in out's dtype and on its device. `read(name, box)` is the file's own slicing. Nodes are put together
as the conversions of transformers put tensors together (experts stacked, gate and up concatenated, a fused
projection cut, a transpose); an operation that is none of these is the library's own, run on one whole target
(`Whole`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from tedfx import _transformers

Box = tuple[slice, ...]
Read = Callable[[str, Box | None], Tensor]


Item = TypeVar("Item")


class Node(Protocol):
    """A tensor that is made of what is in the files."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def fill(self, box: Box, out: Tensor, read: Read) -> None:
        """Write the part `box` into `out`."""


@dataclass
class Source:
    """A tensor in the file."""

    name: str
    shape: tuple[int, ...]

    def fill(self, box: Box, out: Tensor, read: Read) -> None:
        out.copy_(read(self.name, box))


@dataclass
class Stack:
    """Nodes of one shape along a new dim."""

    dim: int
    parts: list[Node]

    @property
    def shape(self) -> tuple[int, ...]:
        one = self.parts[0].shape
        return (*one[: self.dim], len(self.parts), *one[self.dim :])

    def fill(self, box: Box, out: Tensor, read: Read) -> None:
        inner = box[: self.dim] + box[self.dim + 1 :]
        for k, index in enumerate(range(box[self.dim].start, box[self.dim].stop)):
            self.parts[index].fill(inner, out.select(self.dim, k), read)


@dataclass
class Cat:
    """Nodes one behind the other along a dim."""

    dim: int
    parts: list[Node]

    @property
    def shape(self) -> tuple[int, ...]:
        one = list(self.parts[0].shape)
        one[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(one)

    def fill(self, box: Box, out: Tensor, read: Read) -> None:
        want, at = box[self.dim], 0
        for part in self.parts:
            size = part.shape[self.dim]
            start, stop = max(want.start, at), min(want.stop, at + size)
            if start < stop:
                inner = (*box[: self.dim], slice(start - at, stop - at), *box[self.dim + 1 :])
                part.fill(inner, out.narrow(self.dim, start - want.start, stop - start), read)
            at += size


@dataclass
class Cut:
    """`length` of a node from `start` on along a dim."""

    dim: int
    start: int
    length: int
    part: Node

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.part.shape[: self.dim], self.length, *self.part.shape[self.dim + 1 :])

    def fill(self, box: Box, out: Tensor, read: Read) -> None:
        here = slice(box[self.dim].start + self.start, box[self.dim].stop + self.start)
        self.part.fill((*box[: self.dim], here, *box[self.dim + 1 :]), out, read)


@dataclass
class Swap:
    """A node with two dims exchanged."""

    dim0: int
    dim1: int
    part: Node

    @property
    def shape(self) -> tuple[int, ...]:
        return _swapped(self.part.shape, self.dim0, self.dim1)

    def fill(self, box: Box, out: Tensor, read: Read) -> None:
        self.part.fill(_swapped(box, self.dim0, self.dim1), out.transpose(self.dim0, self.dim1), read)


@dataclass
class Whole:
    """One target of a conversion that only the library knows: its sources are read whole, in the target's
    dtype."""

    recipe: _transformers.Recipe
    name: str
    shape: tuple[int, ...]
    model: nn.Module
    dtype: torch.dtype

    def fill(self, box: Box, out: Tensor, read: Read) -> None:
        sources = {
            name: read(name, None).to(self.dtype) for names in self.recipe.sources.values() for name in names
        }
        out.copy_(self.recipe.convert(sources, self.model)[self.name][box])


def from_recipe(
    recipe: _transformers.Recipe,
    shapes: dict[str, tuple[int, ...]],
    made: dict[str, Tensor],
    model: nn.Module,
) -> dict[str, Node]:
    """{target: node}. `made`: what the library makes of the sources, as meta tensors in the targets'
    dtypes."""
    plain = _moved(recipe, shapes, len(made), model)
    if plain is not None and [node.shape for node in plain] == [tuple(t.shape) for t in made.values()]:
        return dict(zip(made, plain))
    return {name: Whole(recipe, name, tuple(t.shape), model, t.dtype) for name, t in made.items()}


def _moved(
    recipe: _transformers.Recipe, shapes: dict[str, tuple[int, ...]], targets: int, model: nn.Module
) -> list[Node] | None:
    """The nodes of the targets in order, where every step is a movement of blocks as it is understood
    here."""
    steps = _transformers.steps(recipe, model)
    if steps is None:
        return None
    nodes: list[list[Node]] = [
        [Source(name, shapes[name]) for name in recipe.sources[p]]
        for p in recipe.converter.source_patterns
        if p in recipe.sources
    ]
    for kind, how in steps:
        single = nodes[0][0] if len(nodes) == 1 and len(nodes[0]) == 1 else None
        if kind == "stack" and all(len({n.shape for n in group}) == 1 for group in nodes):
            nodes = [[Stack(how % (len(group[0].shape) + 1), group)] for group in nodes]
        elif kind == "cat":
            parts = [node for group in nodes for node in group]
            if len({len(p.shape) for p in parts}) > 1:
                return None
            nodes = [[Cat(how % len(parts[0].shape), parts)]]
        elif kind == "chunk" and single is not None:
            dim = how % len(single.shape)
            step = -(-single.shape[dim] // targets)
            cuts = range(0, single.shape[dim], step)
            nodes = [[Cut(dim, start, min(step, single.shape[dim] - start), single) for start in cuts]]
        elif kind == "swap" and single is not None:
            nodes = [[Swap(how[0] % len(single.shape), how[1] % len(single.shape), single)]]
        else:
            return None
    return nodes[0] if len(nodes) == 1 and len(nodes[0]) == targets else None


def _swapped(items: tuple[Item, ...], a: int, b: int) -> tuple[Item, ...]:
    swapped = list(items)
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return tuple(swapped)
