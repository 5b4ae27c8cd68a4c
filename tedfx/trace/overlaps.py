"""Tensors of a model that share memory without being one object: a step on one changes the other on a single
device, and a copy of each would not know.

A tied weight is one object under several names, and stays tied. What is refused are two parameters, or a
parameter and a buffer, in the same memory, and buffers of which forward writes one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import nn

from tedfx.errors import ConfigError

__all__ = ["refuse_overlaps"]


def refuse_overlaps(model: nn.Module, written: Collection[str] = ()) -> None:
    """ConfigError where two tensors share memory and one of them is a parameter, or among the buffers
    `written`."""
    changing = {id(p) for p in model.parameters()}
    changing |= {id(b) for n, b in model.named_buffers(remove_duplicate=False) if n in written}
    for one, other, name, beside in _overlapping(model):
        if id(one) in changing or id(other) in changing:
            raise ConfigError(
                f"{name} and {beside} share memory but are two tensors, so that a write to one would "
                "change the other on a "
                f"single device only | {name} | make it one tensor under both names, or clone one of them"
            )


def _overlapping(model: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor, str, str]]:
    """Neighbours in memory whose spans overlap."""
    spans: dict[tuple, list[tuple[int, int, str, torch.Tensor]]] = {}
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.layout is torch.strided and not t.is_meta and t.numel():
            start = t.storage_offset() * t.element_size()
            last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
            key = (t.device, t.untyped_storage().data_ptr())
            spans.setdefault(key, []).append((start, start + (last + 1) * t.element_size(), name, t))
    for found in spans.values():
        reached: tuple | None = None
        for start, end, name, t in sorted(found, key=lambda span: span[:2]):
            if reached is not None and start < reached[0]:
                yield reached[2], t, reached[1], name
            if reached is None or end > reached[0]:
                reached = (end, name, t)
