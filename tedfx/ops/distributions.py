"""Distributions: from 64 random bits per element to values. Which bits, says `tedfx/ops/random.py`.

Everything is elementwise, and an element takes one word of bits, whatever its distribution. The values have
the exact distribution, up to how many bits a dtype holds: 24 of a float32, 53 of a float64. What a logarithm
is taken of is the midpoint of a cell and never 0 or 1, so that a Gumbel variable as it is written,
`-log(exponential)`, is finite. Numbers of 16 bits are computed in float32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["DISTRIBUTIONS", "Distribution", "drawable", "shift_right", "wide"]

# As many as the dtype's significand holds, so that no draw from [0, 1) rounds up to 1.
_DIGITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
_WORDS = 2**63  # how many integers a draw tells apart


@dataclass(frozen=True)
class Distribution:
    """value(bits, dtype, *parameters) -> values like the int64 tensor `bits`.

    typical(*parameters): what stands for a draw where none may be made: the mean, or a value nearby.
    Of a normal variable it is not the mean but a standard deviation above, so that it depends on both.
    """

    value: Callable[..., Tensor]
    typical: Callable[..., Any]


def drawable(dtype: torch.dtype) -> bool:
    return dtype in _DIGITS or not (dtype.is_floating_point or dtype.is_complex)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a draw for this one is computed."""
    if not dtype.is_floating_point:
        return torch.float64
    return torch.float64 if dtype == torch.float64 else torch.float32


def shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical: int64 shifts drag the sign along."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _unit(bits: Tensor, digits: int, dtype: torch.dtype) -> Tensor:
    """[0, 1), in steps of 2**-digits."""
    return shift_right(bits, 64 - digits).to(dtype) * 2.0**-digits


def _open(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """(0, 1), symmetric: midpoints of cells that are twice as wide, so that they are exact."""
    dtype = wide(dtype)
    digits = _DIGITS[dtype] - 1
    return (shift_right(bits, 64 - digits).to(dtype) + 0.5) * 2.0**-digits


def _normals(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.erfinv(2.0 * _open(bits, dtype) - 1.0) * math.sqrt(2.0)


def _uniform(bits: Tensor, dtype: torch.dtype, low: float, high: float) -> Tensor:
    unit = _unit(bits, _DIGITS[dtype], wide(dtype))
    if (low, high) != (0.0, 1.0):
        unit = low + unit * (high - low)
        unit = torch.where(unit < high, unit, low)  # the upper end itself is not drawn, by rounding either
    return unit.to(dtype)


def _normal(bits: Tensor, dtype: torch.dtype, mean: Any, std: Any) -> Tensor:
    return (mean + std * _normals(bits, dtype)).to(dtype)


def _log_normal(bits: Tensor, dtype: torch.dtype, mean: float, std: float) -> Tensor:
    return (mean + std * _normals(bits, dtype)).exp().to(dtype)


def _bernoulli(bits: Tensor, dtype: torch.dtype, p: Any) -> Tensor:
    decided = wide(p.dtype) if isinstance(p, Tensor) else wide(dtype)
    return (_unit(bits, _DIGITS[decided], decided) < p).to(dtype)


def _exponential(bits: Tensor, dtype: torch.dtype, rate: float) -> Tensor:
    return (-_open(bits, dtype).log() / rate).to(dtype)


def _geometric(bits: Tensor, dtype: torch.dtype, p: float) -> Tensor:
    """How many trials until the first success."""
    if p == 1.0:
        return torch.ones_like(bits, dtype=dtype)
    return (_open(bits, dtype).log() / math.log1p(-p)).ceil().to(dtype)


def _cauchy(bits: Tensor, dtype: torch.dtype, median: float, sigma: float) -> Tensor:
    return (median + sigma * (math.pi * (_open(bits, dtype) - 0.5)).tan()).to(dtype)


def _beyond(dtype: torch.dtype) -> int:
    if dtype in _DIGITS:
        return 2 ** _DIGITS[dtype] + 1
    return 2 if dtype == torch.bool else torch.iinfo(dtype).max + 1


def _integers(bits: Tensor, dtype: torch.dtype, low: int, high: int | None) -> Tensor:
    """low..high - 1; without `high` up to the largest integer that the dtype tells from its neighbours."""
    number, count = shift_right(bits, 1), (_beyond(dtype) if high is None else high) - low
    if count < _WORDS:
        number = number % count
    return (number + low).to(dtype)


DISTRIBUTIONS = {
    "uniform": Distribution(_uniform, lambda low, high: (low + high) / 2),
    "normal": Distribution(_normal, lambda mean, std: mean + std),
    "log_normal": Distribution(_log_normal, lambda mean, std: math.exp(mean + std)),
    "bernoulli": Distribution(_bernoulli, lambda p: p),
    "exponential": Distribution(_exponential, lambda rate: 1 / rate),
    "geometric": Distribution(_geometric, lambda p: math.ceil(1 / p)),
    "cauchy": Distribution(_cauchy, lambda median, sigma: median + sigma),
    "integers": Distribution(_integers, lambda low, high: low + (1 if high is None else (high - low) // 2)),
}
