"""`torch.vmap` in a model's forward, as the operators that it comes to.

torch.export would record what the mapped function computes of single entries, between marks of a level that
exists only while it is traced. Here the function runs unrecorded once, on tensors without values. What then
reaches the dispatcher below the transform are operators on whole tensors, and these are called again, on the
tensors that the trace knows: so they are recorded as if the model had written out the dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tedfx._torch import TorchDispatchMode, every_vmap, pytree, recording, without_recording

__all__ = ["inside_map", "recorded_maps"]

_running: list[_Tape] = []  # the map that runs unrecorded


def inside_map() -> bool:
    """Whether a mapped function runs unrecorded."""
    return bool(_running)


@contextlib.contextmanager
def recorded_maps() -> Iterator[None]:
    """While a model is exported: see the module's docstring."""
    with every_vmap(_map):
        yield


def _map(plain: Callable[[], Any]) -> Any:
    if not recording():  # inside of another map, or of an operator
        return plain()
    tape = _Tape()
    _running.append(tape)
    try:
        with without_recording(), tape:
            out = plain()
    finally:
        _running.pop()
    return tape.again(out)


@dataclass
class _Call:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    learns: bool  # whether gradients were recorded


class _Tape(TorchDispatchMode):
    """The operators that ran. They keep their tensors, so that an id stays one tensor's."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) for x in pytree.tree_leaves(out)):
            self.calls.append(_Call(func, args, kwargs or {}, out, torch.is_grad_enabled()))
        return out

    def again(self, out: Any) -> Any:
        """`out`, of what these operators make of the same tensors when they are called once more."""
        made: dict[int, Tensor] = {}
        now = lambda x: made.get(id(x), x) if isinstance(x, Tensor) else x
        for call in self.calls:
            args, kwargs = pytree.tree_map(now, (call.args, call.kwargs))
            with contextlib.ExitStack() as stack:
                if call.learns != torch.is_grad_enabled():  # a region of its own in the graph
                    stack.enter_context(torch.enable_grad() if call.learns else torch.no_grad())
                new = call.function(*args, **kwargs)
            for was, one in zip(pytree.tree_leaves(call.out), pytree.tree_leaves(new), strict=True):
                if isinstance(was, Tensor):
                    made[id(was)] = one
        return pytree.tree_map(now, out)
