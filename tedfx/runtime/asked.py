"""`torch.autograd.grad(loss, pm.parameters())` is refused, rather than told that nothing depends on them.

Autograd runs on leaves that share storage with the parameters (`tedfx/runtime/gradients.py`), so a parameter
is no part of the graph behind a loss: with `allow_unused=True` its gradient would be None without a word. A
loss therefore passes a node that has the parameters as operands as well. It gives them nothing; but where one
is asked for and no leaf is, it says so. Larger outputs are left alone: a copy would cost memory, and a view
could not be changed in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from tedfx._torch import is_asked
from tedfx.errors import TedfxError

__all__ = ["notice"]


class _Notice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, leaves, count, *operands):
        ctx.set_materialize_grads(False)
        ctx.leaves, ctx.parameters = leaves, operands[count:]
        return tuple(x.clone() for x in operands[:count])

    @staticmethod
    def backward(ctx, *grads):
        # Nodes are looked up here, where the first leaf answers, and not for all of them in each call.
        asked = lambda tensors: any(is_asked(get_gradient_edge(x).node) for x in tensors)
        if not asked(ctx.leaves) and asked(ctx.parameters):
            raise TedfxError(
                "torch.autograd.grad (or backward(inputs=..)) for parameters of a ParallelModule, whose "
                "gradients are "
                "summed when backward ends: call loss.backward() and read p.grad"
            )
        return None, None, *grads, *(None for _ in ctx.parameters)


def notice(outputs: Sequence, parameters: Sequence[Tensor], leaves: Sequence[Tensor]) -> list:
    """`outputs` of a call; those of one element with a gradient behind a node that knows the parameters.

    leaves: what autograd runs on in the place of the parameters.
    """
    is_loss = [isinstance(x, Tensor) and x.requires_grad and x.numel() == 1 for x in outputs]
    found = [x for x, loss in zip(outputs, is_loss) if loss]
    if not found:
        return list(outputs)
    learned = [p for p in parameters if p.requires_grad]
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    noticed = iter(_Notice.apply(trained, len(found), *found, *learned))
    return [next(noticed) if loss else x for x, loss in zip(outputs, is_loss)]
