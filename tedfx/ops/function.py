"""A call of the user's own `torch.autograd.Function` as one operator: his forward, and in backward his
backward.

The graph's node calls a plain function of the operands (`operator_of`), which puts the rest of the call
around them and calls `apply`. Eager autograd runs it as it runs the model's own
call; while compiling it is traced into the graph by autograd itself (`allow_in_graph`), forward and
backward, not by the interpreter of the Python code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tedfx._torch import pytree
from tedfx.ops.autocast import Autocast, region

__all__ = ["SIZE", "TENSOR", "Kept", "kept_of", "operator_of"]

TENSOR, SIZE = object(), object()  # stand in `Kept.leaves` for what the graph has nodes for


@dataclass(eq=False)
class Kept:
    """What of a call is the same in every call of the graph.

    function    the class
    leaves      the leaves of its arguments, `TENSOR` or `SIZE` where the graph has a node
    spec        the pytree spec of the arguments
    learns      of each tensor among them, whether a gradient was asked for
    gradient    False: called under no_grad
    autocast    the region that it was called in
    device_type of that region
    single      it returns a tensor, not a tuple of tensors
    studied     what `tedfx/trace/bodies.py` found, by the kinds of the operands
    """

    function: type
    leaves: tuple
    spec: Any
    learns: tuple[bool, ...]
    gradient: bool
    autocast: Autocast | None
    device_type: str
    single: bool = True
    studied: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.function.__name__

    def arguments(self, operands) -> tuple:
        feed = iter(operands)
        return pytree.tree_unflatten(
            [next(feed) if leaf is TENSOR or leaf is SIZE else leaf for leaf in self.leaves], self.spec
        )

    def __call__(self, *operands) -> Any:
        with (
            contextlib.nullcontext() if self.gradient else torch.no_grad(),
            region(self.autocast, self.device_type),
        ):
            return self.function.apply(*self.arguments(operands))

    def same(self, other: "Kept") -> bool:
        """Whether both are one operator: numbers, strings and the like equal, other arguments the same
        object.
        """
        mine = (
            self.function,
            self.spec,
            self.learns,
            self.gradient,
            self.autocast,
            self.device_type,
            len(self.leaves),
        )
        if mine != (
            other.function,
            other.spec,
            other.learns,
            other.gradient,
            other.autocast,
            other.device_type,
            len(other.leaves),
        ):
            return False
        return all(
            a is b or (type(a) is type(b) and isinstance(a, _PLAIN) and a == b)
            for a, b in zip(self.leaves, other.leaves)
        )


_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def operator_of(kept: Kept) -> Callable:
    """The function that nodes call; it is printed as ``Round.apply``."""

    def apply(*operands):
        return kept(*operands)

    apply.__name__ = apply.__qualname__ = f"{kept.name}.apply"
    apply.kept = kept
    torch.compiler.allow_in_graph(apply)
    return apply


def kept_of(target: Any) -> Kept | None:
    """Of a node's target, where it is such an operator."""
    found = getattr(target, "kept", None)
    return found if isinstance(found, Kept) else None
