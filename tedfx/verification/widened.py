"""A float64 model whose float32 parts are float64 as well.

Many models compute some of their parts (norms, softmax, routing, rotary tables) in float32 whatever their own
dtype. On a mesh sums are made in another order, so that a float64 model differs there by a float32 rounding,
and where such a part is ill-conditioned by many. With those parts in float64 nothing of the model changes but
this, and what is left of a difference is no rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def widened(on: bool = True) -> Iterator[None]:
    """float64 wherever code asks for float32 or for no dtype."""
    if not on:
        yield
        return
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widened():
            yield
    finally:
        torch.set_default_dtype(default)


class _Widened(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            return Tensor.double(*args, **(kwargs or {}))
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in (kwargs or {}).items()}
        return func(*args, **kwargs)
