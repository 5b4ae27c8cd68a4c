"""Any program read in float64: every dtype of fewer bits stands for float64 while `Float64` is on.

Two programs that compute the same function differ by rounding, and where a router is near a tie rounding
decides where a token goes. In float64 the first is 1e-15 and the second does not happen, so that a difference
is one of the programs. A model need not be cast for it, nor traced again: the mode stands below autograd and
gives every operator float64 where its operands, or the dtype that it is told (casts, factories,
`softmax(dtype=)`, `sum(dtype=)`), are of fewer bits. What moves elements and changes none (views, lookups)
runs on what it is given, so that a table is not cast for a few of its rows.

Draws are replaced by their mean, the same in both programs: `bernoulli_` fills its p, so that dropout is the
identity. What has no such mean (multinomial, randint, ..) raises `Draws`. Views of bits as another dtype
raise `NoFloat64`.

Python still reads the dtypes: `torch.finfo(x.dtype)` is answered for the dtype that the model was traced in,
see `reading`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from tedfx._torch import TorchDispatchMode, is_view, op_name, written

__all__ = ["Draws", "Float64", "NoFloat64", "reading", "wide"]

aten = torch.ops.aten


class Draws(Exception):
    """An operator that draws at random and has no mean that could stand for the draw; its name."""


class NoFloat64(Exception):
    """The program looks at the bits of a value, which are others in float64."""


_MOVES = {  # results are elements of an operand, unchanged
    aten.embedding.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.clone.default,
    aten.stack.default,
    aten.cat.default,
}
# Draws and what stands for them. In place: the mean, from the arguments behind the tensor.
_MEANS = {
    "bernoulli_": lambda p=0.5: p,
    "uniform_": lambda low=0.0, high=1.0: (low + high) / 2,
    "normal_": lambda mean=0.0, std=1.0: mean,
}
_FRESH = {"rand": 0.5, "rand_like": 0.5, "randn": 0.0, "randn_like": 0.0}


def wide(dtype: torch.dtype) -> torch.dtype:
    """float64 for a floating dtype, complex128 for a complex one, else the dtype itself."""
    return torch.float64 if dtype.is_floating_point else torch.complex128 if dtype.is_complex else dtype


class Float64(TorchDispatchMode):
    """See the module's docstring. `steps` of the program and its backward both run under it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = op_name(func) if isinstance(func, torch._ops.OpOverload) else str(func)
        if func in (aten.native_dropout.default, aten.native_dropout_backward.default):
            return (
                (args[0].clone(), torch.ones_like(args[0], dtype=torch.bool))
                if func is aten.native_dropout.default
                else args[0].clone()
            )
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            return _mean(
                func, name, args, {key: value for key, value in kwargs.items() if key != "generator"}
            )
        if (
            func is aten.view.dtype
            and args[0].dtype != args[1]
            and any(dtype.is_floating_point or dtype.is_complex for dtype in (args[0].dtype, args[1]))
        ):
            raise NoFloat64("it views a value's bits as another dtype")
        keep = {id(x) for x in written(func, args, kwargs)} if func._schema.is_mutable else ()
        moves = func in _MOVES or is_view(func)

        def read(x: Any) -> Any:
            if isinstance(x, torch.dtype):
                return wide(x)
            if isinstance(x, torch.Tensor) and not moves and id(x) not in keep and x.dtype != wide(x.dtype):
                return x.to(wide(x.dtype))
            return [read(each) for each in x] if isinstance(x, (list, tuple)) else x

        return func(*map(read, args), **{key: read(value) for key, value in kwargs.items()})


def _mean(func, name: str, args: tuple, kwargs: dict) -> torch.Tensor:
    if name in _MEANS:
        x, *rest = args
        mean = _MEANS[name](*rest, **kwargs)
        return x.copy_(mean) if isinstance(mean, torch.Tensor) else x.fill_(mean)
    if name in _FRESH:
        dtype = kwargs.pop("dtype", None)
        like = {"device": kwargs.get("device"), "dtype": wide(dtype) if dtype is not None else None}
        return (
            torch.full_like(args[0], _FRESH[name], **like)
            if name.endswith("_like")
            else torch.full(args[0], _FRESH[name], **{**like, "dtype": like["dtype"] or torch.float64})
        )
    if name == "bernoulli" and len(args) == 1:
        return args[0].to(wide(args[0].dtype), copy=True)
    raise Draws(name)


@contextlib.contextmanager
def reading(as_dtype: torch.dtype | None) -> Iterator[None]:
    """`Float64`, with new tensors in float64 by default. `torch.finfo` of float64 answers for `as_dtype`: a
    trace has `finfo(x.dtype).eps` as a number."""
    finfo, default = torch.finfo, torch.get_default_dtype()

    def answer(dtype: torch.dtype | None = None) -> torch.finfo:
        dtype = torch.get_default_dtype() if dtype is None else dtype
        return finfo(as_dtype if as_dtype is not None and dtype == torch.float64 else dtype)

    torch.set_default_dtype(torch.float64)
    if as_dtype is not None:
        torch.finfo = answer
    try:
        with Float64():
            yield
    finally:
        torch.finfo = finfo
        torch.set_default_dtype(default)
