"""A trace that failed: is it the model that fails? The plain model is run on the same example, and where it
fails too the line is the model's own error."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tedfx._torch import FakeTensorMode, pytree
from tedfx.errors import TraceError, user_line
from tedfx.ops.autocast import Autocast, region
from tedfx.trace.restored import on_gpu, untouched

__all__ = ["own_error"]


def own_error(
    model: nn.Module, call: Mapping[str, Any], frontends: Sequence[Any], around: Autocast | None, fakes: Any
) -> TraceError | None:
    """The error of the plain model's forward on `call`, as a line; None where it runs. The model is left as
    it was, and its parameters are not copied.

    It runs where its weights are. Without any, it runs on tensors without values, whose own refusals (a value
    that is asked for, a size that is data) are not the model's: `fakes(mode)` is a context in which the
    model's tensors are such.
    """
    meta = any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.get_default_device())
    mode = FakeTensorMode(allow_non_fake_inputs=True) if meta else None
    with contextlib.ExitStack() as stack:
        for frontend in frontends:
            stack.enter_context(frontend.reference(model))
        stack.enter_context(untouched(model, lambda dtype: dtype, {id(p) for p in model.parameters()}))
        if mode is not None:
            device = torch.device("cpu")
            stack.enter_context(fakes(mode))
        stack.enter_context(torch.random.fork_rng(on_gpu(device)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(region(around, device.type))
        place = lambda x: (
            (mode.from_tensor(x) if mode is not None else x.detach().to(device, copy=True))
            if isinstance(x, torch.Tensor)
            else x
        )
        given = pytree.tree_map(place, dict(call))
        try:
            with mode or contextlib.nullcontext():
                model(**given)
        except Exception as error:  # whatever the model raises
            if meta and type(error).__module__.startswith(
                "torch."
            ):  # what a tensor without values cannot answer
                return None
            text = " ".join(str(error).split())[:300]
            without = ", on tensors without values" if meta else ""
            return TraceError(
                f"the model itself fails on this input{without}: {type(error).__name__}: {text} | at "
                f"{user_line(error)} | make model(**inputs) run on one device first (its config, or the "
                "example inputs)"
            )
    return None
