"""An optimizer that holds the parameters of the user's model and not those of its ParallelModule trains
nothing. Seen at its step, through torch's hooks on all optimizers."""

from __future__ import annotations

import weakref

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tedfx.errors import ConfigError

_PAIRS: list[tuple[weakref.ref, weakref.ref]] = []  # (ParallelModule, the user's model)
_HANDLES: list = []


def remember(module: nn.Module, model: nn.Module) -> None:
    """`module` is what `model` was parallelized to."""
    _PAIRS[:] = [(m, o) for m, o in _PAIRS if m() is not None and o() is not None]
    _PAIRS.append((weakref.ref(module), weakref.ref(model)))
    if not _HANDLES:  # with a closure, gradients are there after the step only
        _HANDLES.append(
            register_optimizer_step_pre_hook(
                lambda optimizer, args, kwargs: None if _closure(args, kwargs) else _check(optimizer)
            )
        )
        _HANDLES.append(
            register_optimizer_step_post_hook(
                lambda optimizer, args, kwargs: _check(optimizer) if _closure(args, kwargs) else None
            )
        )


def _closure(args: tuple, kwargs: dict) -> bool:
    return any(
        callable(value)
        for value in (*args[:2], *kwargs.values())
        if not isinstance(value, torch.optim.Optimizer)
    )


def _check(optimizer: torch.optim.Optimizer) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for module, model in [(m(), o()) for m, o in _PAIRS]:
        if module is None or model is None or not module.trained:
            continue
        own = [(name, p) for name, p in model.named_parameters() if id(p) in held]
        if (
            own
            and all(p.grad is None for _, p in own)
            and not any(id(p) in held for p in module.parameters())
        ):
            raise ConfigError(
                f"this {type(optimizer).__name__} holds parameters of the model that was parallelized, "
                f"{own[0][0]} for one, and none of them has a gradient: it would train nothing | "
                f"parameter {own[0][0]} | make the optimizer from the ParallelModule's parameters()"
            )


__all__ = ["remember"]
