"""What an optimizer class does, found by running it on a few numbers: whether it updates every element by
itself, and which states it keeps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tedfx import _torch
from tedfx.errors import ConfigError

Make = Callable[[list[Tensor]], torch.optim.Optimizer]
SHAPE = (2, 64)  # two halves that a vectorised kernel takes without a rest


def check_class(cls) -> None:
    """ConfigError unless `cls` is an optimizer class whose step needs no closure."""
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ConfigError(
            f"ShardedOptimizer takes an optimizer class such as torch.optim.AdamW, not {cls!r:.80}"
        )
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{cls.__name__} evaluates the model inside its step (a closure): such an optimizer cannot "
            "be sharded"
        )


@_torch.with_values()
def fuses(cls, options: dict[str, Any], device) -> bool:
    """Whether the class has a fused step on this device, and the options do not choose another
    implementation: one pass over memory in place of many, and no temporaries."""
    if "fused" not in inspect.signature(cls).parameters or options.keys() & {
        "fused",
        "foreach",
        "differentiable",
        "capturable",
    }:
        return False
    try:
        state_kinds(lambda tensors: cls(tensors, **options, fused=True), device, torch.float32)
    except (
        RuntimeError
    ):  # which devices have one is no public list; torch's classes raise this where theirs is not among them
        return False
    return True


@_torch.with_values()  # what a class does can be asked also where the run's own tensors are fake
def elementwise(make: Make, device) -> str | None:
    """make: [tensors] -> an optimizer. None if stepping two flat halves of random numbers equals stepping the
    whole, bit by bit, over two steps; else what speaks against it, in a few words."""
    generator = torch.Generator().manual_seed(0)
    start, *grads = (torch.randn(SHAPE, generator=generator).to(device) for _ in range(3))
    try:
        whole = _steps(make, start, grads)
        halves = [_steps(make, start[i], [grad[i] for grad in grads]) for i in range(2)]
    except Exception as error:  # whatever a foreign class raises, it does not do
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return (
        None
        if torch.equal(whole, torch.stack(halves))
        else "half of a tensor is updated otherwise than as a part of the whole"
    )


def state_kinds(make: Make, device, dtype: torch.dtype, shape=SHAPE) -> dict[str, Any]:
    """key -> a state of a parameter of this shape after one step."""
    parameter = torch.zeros(shape, dtype=dtype, device=device).requires_grad_()
    optimizer = make([parameter])
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return dict(optimizer.state[parameter])


def _steps(make: Make, start: Tensor, grads) -> Tensor:
    parameter = start.clone().requires_grad_()
    optimizer = make([parameter])
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach()
