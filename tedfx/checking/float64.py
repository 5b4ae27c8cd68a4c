"""Any program read in float64: every dtype of fewer bits stands for float64 while `Float64` is on.

Two programs that compute the same function differ by rounding, and where a router is near a tie rounding
decides where a token goes. In float64 the first is 1e-15 and the second does not happen, so that a difference
is one of the programs. A model need not be cast for it, nor traced again: the mode stands below autograd and
gives every operator float64 where its operands, or the dtype that it is told (casts, factories,
`softmax(dtype=)`, `sum(dtype=)`), are of fewer bits. What moves elements and changes none (views, lookups)
runs on what it is given, so that a table is not cast for a few of its rows.

Draws are replaced by a typical value, the same in both programs (`tedfx/ops/distributions.py`): `bernoulli_`
fills its p, so that dropout is the identity. An operator that has none (randperm, poisson, ..) raises
`Draws`. Views of bits as another dtype raise `NoFloat64`.

Python still reads the dtypes: `torch.finfo(x.dtype)` is answered for the dtype that the model was traced in,
see `reading`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from tedfx._torch import TorchDispatchMode, is_view, op_name, written
from tedfx.graph.draws import reads
from tedfx.ops.distributions import DISTRIBUTIONS

__all__ = ["Draws", "Float64", "NoFloat64", "reading", "wide"]

aten = torch.ops.aten


class Draws(Exception):
    """An operator that draws at random, with no value that could stand for the draw; its name."""


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


def wide(dtype: torch.dtype) -> torch.dtype:
    """float64 for a floating dtype, complex128 for a complex one, else the dtype itself."""
    return torch.float64 if dtype.is_floating_point else torch.complex128 if dtype.is_complex else dtype


class Float64(TorchDispatchMode):
    """See the module's docstring. `steps` of the program and its backward both run under it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (aten.native_dropout.default, aten.native_dropout_backward.default):
            return (
                (args[0].clone(), torch.ones_like(args[0], dtype=torch.bool))
                if func is aten.native_dropout.default
                else args[0].clone()
            )
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            return _typical(func, args, {k: value for k, value in kwargs.items() if k != "generator"})
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


def _typical(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> torch.Tensor:
    """What stands for the draw that `func` makes. Raises `Draws`."""
    made = reads(func, args, kwargs)
    if made is None and func is aten.multinomial.default:
        return _likeliest(*args, **kwargs)
    if made is None:
        raise Draws(op_name(func))
    parameters = (p.to(wide(p.dtype)) if isinstance(p, torch.Tensor) else p for p in made.parameters)
    value = DISTRIBUTIONS[made.distribution].typical(*parameters)
    if func._schema.is_mutable:
        return args[0].copy_(value) if isinstance(value, torch.Tensor) else args[0].fill_(value)
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    if made.shape == "sizes":
        integers = made.distribution == "integers" and dtype is None
        dtype = torch.int64 if integers else wide(dtype or torch.float64)
        sizes = next(x for x in (*args, *kwargs.values()) if isinstance(x, (list, tuple)))
        return torch.full(sizes, value, dtype=dtype, device=device)
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    if made.shape == "like":
        return torch.full_like(tensors[0], value, dtype=wide(dtype or tensors[0].dtype), device=device)
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    return value.to(wide(tensors[0].dtype)).expand(shape).contiguous().clone()


def _likeliest(weights: torch.Tensor, num_samples: int, replacement: bool = False) -> torch.Tensor:
    if replacement:
        return weights.argmax(-1, keepdim=True).expand(*weights.shape[:-1], num_samples).clone()
    return weights.topk(num_samples, -1).indices


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
