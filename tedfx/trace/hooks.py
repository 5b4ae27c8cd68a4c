"""Backward hooks, which no graph has: found by looking at every module, parameter and buffer before it is
traced. Forward hooks are part of a traced call."""

from __future__ import annotations

import itertools

from torch import nn

from tedfx._torch import backward_hooks, global_backward_hooks
from tedfx.errors import TraceError


def refuse_hooks(model: nn.Module) -> None:
    """TraceError for the first hook that backward would call."""
    for kind in global_backward_hooks():
        raise TraceError(
            f"a hook on the backward of all modules is registered ({kind}), which a parallel module "
            "would not call | torch.nn.modules.module | remove it before parallelize"
        )
    for name, module in model.named_modules():
        for kind in backward_hooks(module):
            raise TraceError(
                f"module {name or type(model).__name__} has a backward hook ({kind}), which a parallel "
                f"module would not call | module {name or type(model).__name__} | remove it; "
                "write what it does to a gradient as an operator of forward, or do it to pm's gradients "
                "after backward"
            )
    for name, tensor in itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        for kind in backward_hooks(tensor):
            raise TraceError(
                f"parameter {name} has a hook ({kind}), which a parallel module would not call | "
                f"parameter {name} | remove it, and do what it does to p.grad of pm's parameter after "
                "loss.backward()"
            )


__all__ = ["refuse_hooks"]
