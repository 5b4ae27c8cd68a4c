"""One-hot with a number of classes that is data, as a trace holds it until its first classes are taken
(`tedfx/trace/first_classes.py`)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["wide_one_hot"]


@torch.library.custom_op("tedfx::wide_one_hot", mutates_args=())
def _wide_one_hot(ids: Tensor, classes: int) -> Tensor:
    """ids[..] -> [.., classes] int64, 1 at the class of each; nowhere, where it is beyond them.

    It stands for one-hot with enough classes for every id and with `classes - 1` at least; the last of these
    is there so that taking all but it shows in a graph."""
    return (ids.unsqueeze(-1) == torch.arange(classes, device=ids.device)).to(torch.int64)


@_wide_one_hot.register_fake
def _(ids, classes):
    return ids.new_empty((*ids.shape, classes), dtype=torch.int64)


def wide_one_hot(ids: Tensor, classes: int | torch.SymInt) -> Tensor:
    """ids[..] -> [.., classes] int64, as a node of its own."""
    return torch.ops.tedfx.wide_one_hot(ids, classes)
