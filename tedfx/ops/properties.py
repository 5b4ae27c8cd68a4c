"""What an op is, beside what it computes and its adjoint: said where it is defined, by `@op(..)`.

Who plans memory, counts what is sent or chooses what may run twice asks here, and has no list of names. Of
torch's operators the schema and the tags say what they say (`tedfx/graph/aliases.py`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx

__all__ = ["Moves", "Op", "argument", "describe", "described", "op", "properties"]

# Collectives by torch's names; ZeRO-3's are told apart from those of activations.
ALL_REDUCE = "all_reduce"
ALL_GATHER = "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_tensor"
ALL_TO_ALL = "all_to_all_single"
GATHER_PARAMETERS = "gather_parameters"
SCATTER_GRADIENTS = "scatter_gradients"


@dataclass(frozen=True)
class Moves:
    """A collective that an op runs in one direction, over the ranks of its argument `axes`.

    operand  what it is handed: "in", the op's first operand or the cotangent of that; "out", its result or
             the cotangent of that; "other": an amount with a formula of its own (`tedfx/analysis/cost.py`)
    when     argument -> the values of it for which the collective runs; always, for those that are not named
    """

    collective: str
    operand: Literal["in", "out", "other"]
    when: Mapping[str, tuple] = field(default_factory=dict)


@dataclass(frozen=True)
class Op:
    """forward   the collective of forward
    backward  that of its adjoint
    saves     what backward reads: positions of arguments, the "operands", or "all": the result as well
    alias     its result may be, or look into, its first operand
    decides   which of several comes out: made again, a near-tie could come out otherwise
    waits     makes the host wait for the device
    """

    forward: Moves | None = None
    backward: Moves | None = None
    saves: tuple[int, ...] | Literal["operands", "all"] = "all"
    alias: bool = False
    decides: bool = False
    waits: bool = False


_PROPERTIES: dict[Any, Op] = {}


def describe(target: Any, what: Op) -> None:
    """Say what an op is. `target`: as a graph calls it."""
    assert target not in _PROPERTIES, target
    _PROPERTIES[target] = what


def op(**what: Any) -> Callable:
    """Say what a function that a local graph calls is; the fields of `Op`."""

    def register(function: Callable) -> Callable:
        describe(function, Op(**what))
        return function

    return register


def properties(target: Any) -> Op | None:
    """What an op of ours is; None for any other target."""
    return _PROPERTIES.get(target)


def described() -> Mapping[Any, Op]:
    """All ops that say what they are."""
    return _PROPERTIES


def argument(node: fx.Node, name: str) -> Any:
    """An argument of a call of ours by the name that it has in the function, or its default."""
    position, default = _parameters(node.target)[name]
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


@functools.cache
def _parameters(function: Callable) -> dict[str, tuple[int, Any]]:
    found = inspect.signature(function).parameters.values()
    return {p.name: (i, p.default) for i, p in enumerate(found)}
