"""What a dtype says of a value: whether it has a gradient, how precise it is, and a complex value as a real
one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tedfx.errors import ConfigError

__all__ = [
    "PRECISIONS",
    "as_real",
    "cast_module",
    "check_precision",
    "has_gradient",
    "precision",
    "widest",
]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str | None) -> torch.dtype | None:
    """The dtype that `precision` names; None for None."""
    if precision is not None and (not isinstance(precision, str) or precision not in PRECISIONS):
        raise ConfigError(
            f"precision={precision!r}: one of {', '.join(map(repr, PRECISIONS))}, or None for the "
            "model's own dtypes"
        )
    return None if precision is None else PRECISIONS[precision]


def has_gradient(dtype: torch.dtype) -> bool:
    """Whether autograd follows values of this dtype: floating-point and complex ones."""
    return dtype.is_floating_point or dtype.is_complex


def precision(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the real and imaginary parts of a complex dtype; any other is its own."""
    return dtype.to_real() if dtype.is_complex else dtype


def widest(x: Tensor) -> Tensor:
    """In double precision, to compare: complex stays complex, as `.double()` drops imaginary parts."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def as_real(x: Tensor) -> Tensor:
    """What goes through a buffer of plain numbers: pending conjugations and negations carried out,
    complex[..] seen as real[.., 2]. Others as they are.

    `torch.view_as_complex` is the way back.
    """
    x = x.resolve_conj().resolve_neg()
    return torch.view_as_real(x) if x.is_complex() else x


def cast_module(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`module.to(dtype)` that leaves complex tensors complex, of that precision where there is one: torch's
    own makes real ones of them."""
    kept = {}
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, tensor in list(table.items()):
                if tensor is not None and tensor.is_complex():
                    kept.setdefault(id(tensor), (tensor, []))[1].append((table, name))
                    table[name] = None
    module.to(dtype)
    for tensor, places in kept.values():
        tensor.data = tensor.data.to(
            dtype.to_complex() if dtype in (torch.float32, torch.float64) else tensor.dtype
        )
        for table, name in places:
            table[name] = tensor
    return module
