"""A model that is run and then is as it was: its tensors are copies meanwhile, and whatever its Python
changed is put back."""

from __future__ import annotations

import collections
import contextlib
import types
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from torch import nn

from tedfx.trace.cells import base_of

__all__ = ["on_gpu", "untouched"]

_CLOSED = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    torch.dtype,
    torch.device,
)
_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)


def on_gpu(device: torch.device) -> list[torch.device]:
    """The devices whose generators a run on `device` may move, as `torch.random.fork_rng` takes them: it
    looks at all GPUs of the host, and says so, where it is told none."""
    return [device] if device.type == "cuda" else []


class _State:
    """What can be reached from a model through attributes, dicts, lists and sets, and its contents. Objects
    with slots, closures and globals are not seen."""

    def __init__(self, root: nn.Module):
        self.containers: list[tuple[Any, list]] = []
        self.tensors: list[torch.Tensor] = []
        self.generators: list[tuple[torch.Generator, torch.Tensor]] = []
        self.seen: dict[int, Any] = {}  # what is kept keeps its id
        todo: list[Any] = [root]
        while todo:
            x = todo.pop()
            if (
                id(x) in self.seen
                or isinstance(x, _CLOSED)
                or type(x).__module__.startswith(("torch.distributed", "torch._C._distributed"))
            ):
                continue
            self.seen[id(x)] = x
            if isinstance(x, torch.Tensor):
                if (
                    type(x) in _PLAIN
                    and x.is_leaf
                    and x.layout is torch.strided
                    and not x.is_meta
                    and not x.is_inference()
                ):
                    self.tensors.append(x)
            elif isinstance(x, torch.Generator):
                self.generators.append((x, x.get_state()))
            elif isinstance(x, dict):
                self.containers.append((x, list(x.items())))
                todo.extend(x.values())
            elif isinstance(x, (list, set, collections.deque)):
                self.containers.append((x, list(x)))
                todo.extend(x)
            elif isinstance(x, (tuple, frozenset)):
                todo.extend(x)
            elif isinstance(x, types.MethodType):
                todo.append(x.__self__)
            elif isinstance(getattr(x, "__dict__", None), dict):
                todo.append(vars(x))

    def restore(self) -> None:
        for container, items in self.containers:
            if isinstance(container, dict):
                now = list(container.items())
                if len(now) != len(items) or any(
                    a is not c or b is not d for (a, b), (c, d) in zip(now, items)
                ):
                    kind = base_of(container)
                    kind.clear(container)
                    for key, value in items:
                        kind.__setitem__(container, key, value)
            elif len(container) != len(items) or any(a is not b for a, b in zip(container, items)):
                container.clear()
                (container.update if isinstance(container, set) else container.extend)(items)
        for generator, state in self.generators:
            generator.set_state(state)


@contextlib.contextmanager
def untouched(
    model: nn.Module, dtype: Callable[[torch.dtype], torch.dtype], constant: Container[int] = ()
) -> Iterator[None]:
    """Under it every tensor that the model holds is a copy of its values in the dtype that `dtype` says,
    under the tensor's own identity (hooks and all).

    On exit the model is as it was: bits, `.grad`, `requires_grad`, attributes, contents of lists and dicts,
    training flags. Tensors whose id is in `constant` are not copied and require no gradient meanwhile:
    nothing may write to them. Tensors that share memory share it in their copies.
    """
    state = _State(model)
    saved = [(x, x.data, x.grad, x.requires_grad) for x in state.tensors]
    try:
        for x, copy in _copies([x for x in state.tensors if id(x) not in constant], dtype):
            x.data = copy
        for x in state.tensors:
            if id(x) in constant:
                x.requires_grad_(False)
        yield
    finally:
        state.restore()
        for x, data, grad, requires_grad in saved:
            if x.grad is not grad:
                x.grad = None
            x.data = data
            if x.grad is not grad:
                x.grad = grad
            if x.requires_grad is not requires_grad:
                x.requires_grad_(requires_grad)


def _copies(
    tensors: list[torch.Tensor], dtype: Callable[[torch.dtype], torch.dtype]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    groups: dict[Any, list[torch.Tensor]] = {}
    for x in tensors:
        groups.setdefault((x.untyped_storage().data_ptr() or id(x), x.dtype), []).append(x)
    for (_, own), group in groups.items():
        if len(group) == 1:
            yield group[0], group[0].detach().to(dtype(own), copy=True)
            continue
        memory = torch.empty(0, dtype=own, device=group[0].device).set_(group[0].untyped_storage())
        memory = memory.to(dtype(own), copy=True)
        for x in group:
            yield x, memory.as_strided(x.shape, x.stride(), x.storage_offset())
