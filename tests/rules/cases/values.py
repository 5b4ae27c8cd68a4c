"""Operands of the cases, small and random. Sizes are mostly even; 3 and 5 are dims that cannot be split in
two."""

from __future__ import annotations

import torch

_generator = torch.Generator().manual_seed(0)


def t(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=_generator)


def c(*shape):
    return torch.complex(t(*shape), t(*shape))


def positive(*shape):
    return torch.rand(shape, dtype=torch.float64, generator=_generator) + 0.5


def ids(high, *shape):
    return torch.randint(0, high, shape, generator=_generator)


def order(count):
    return torch.randperm(count, generator=_generator)


def mask(*shape):
    return torch.rand(shape, generator=_generator) < 0.6


def shuffled(*shape):
    """Distinct numbers: no ties in sorts and maxima."""
    count = torch.Size(shape).numel()
    return (torch.randperm(count, generator=_generator).double() / count - 0.4).reshape(shape)


X = t(4, 6, 8)
