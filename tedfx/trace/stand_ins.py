"""The model while it is traced: without values, and with a `forward` that names what the call names."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from tedfx._torch import FakeTensorMode
from tedfx.errors import TraceError


@contextlib.contextmanager
def fake_state(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> Iterator[None]:
    """Parameters and buffers swapped for fakes on `device`; a tied tensor stays tied."""
    fakes: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in fakes:
            with mode:
                new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            fakes[id(tensor)] = new
        return fakes[id(tensor)]

    saved: list[tuple[dict[str, Any], str, torch.Tensor]] = []

    def swap(table: dict[str, Any]) -> None:
        for name, tensor in table.items():
            if tensor is not None:
                saved.append((table, name, tensor))
                table[name] = fake(tensor)

    try:
        for module in model.modules():
            swap(module._parameters)
            swap(module._buffers)
        yield
    finally:
        for table, name, tensor in saved:
            table[name] = tensor


@contextlib.contextmanager
def named_forward(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """`forward` with exactly these parameters, where some of them go through its `**kwargs`: export does not
    match the dynamic shapes of those."""
    forward, own = model.forward, "forward" in vars(model)
    if set(names) <= set(inspect.signature(forward).parameters):
        yield
        return

    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    named.__signature__ = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    model.forward = named
    try:
        yield
    finally:
        if own:
            model.forward = forward
        else:
            del model.forward


def tied_names(model: nn.Module) -> dict[str, str]:
    """FQN -> the first FQN of the same tensor."""
    first: dict[int, str] = {}
    named = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    return {name: first.setdefault(id(t), name) for name, t in named if first.setdefault(id(t), name) != name}


@contextlib.contextmanager
def idle_conversions(line: Callable[[], str]) -> Iterator[None]:
    """`module.to(dtype)` inside of forward: nothing, where it changes nothing; else refused at `line()`.
    torch would put new tensors into the module either way."""
    real = nn.Module._apply

    def apply(self, fn, recurse=True):
        for tensor in itertools.chain(self.parameters(recurse), self.buffers(recurse)):
            made = fn(tensor)
            if (made.dtype, made.device) != (tensor.dtype, tensor.device):
                raise TraceError(
                    f"{type(self).__name__}.to inside forward turns its {str(tensor.dtype)[6:]} state into "
                    f"{str(made.dtype)[6:]} | at {line()} | convert the module where the model is made"
                )
        return self

    nn.Module._apply = apply
    try:
        yield
    finally:
        nn.Module._apply = real
