"""`precision=`: the floating-point parameters of a model in another dtype, the user's model left as it is.

Buffers keep their dtype (tables of positions are float32 for a reason), and so do the parameters that a
Hugging Face model keeps in float32 in that dtype. What the model's code casts by itself, a norm or a router
in float32, it still does: no node is added.

A model is traced and checked in its cast form: `cast_parameters` puts cast tensors in the place of the
parameters and takes them out again. For a trace they have no values; the capture check has values, for as
long as it runs. What a rank holds is cast tensor by tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from tedfx import _transformers
from tedfx.dtypes import check_precision
from tedfx.errors import ConfigError


def parameter_dtypes(model: nn.Module, precision: str | None) -> dict[str, torch.dtype]:
    """{name: dtype} of every parameter under `precision`, tied ones by each of their names."""
    dtype, named = check_precision(precision), dict(model.named_parameters(remove_duplicate=False))
    own = {name: p.dtype for name, p in named.items()}
    if dtype is None:
        return own
    kept: dict[int, torch.dtype] = {}  # by tensor: what one of its names keeps, all have
    for prefix, module in model.named_modules():
        if _transformers.is_pretrained(module):
            for name, its in _transformers.dtype_plan(module, dtype).items():
                kept[id(module.get_parameter(name))] = its
    return {name: kept.get(id(p), dtype) if p.is_floating_point() else own[name] for name, p in named.items()}


def check_complex(dtypes: Mapping[str, torch.dtype], zero: int, gradient_dtype: torch.dtype | None) -> None:
    """ConfigError where an option would take a complex parameter for a real one."""
    name = next((name for name, dtype in dtypes.items() if dtype.is_complex), None)
    option = (
        f"zero={zero}" if zero else f"gradient_dtype={gradient_dtype}" if gradient_dtype is not None else ""
    )
    if name is not None and option:
        raise ConfigError(
            f"parameter {name} is {dtypes[name]}, which {option} does not take: leave "
            f"{option.split('=')[0]} out, or hold it as a real parameter of shape (.., 2) and use "
            "torch.view_as_complex(..)"
        )


@contextlib.contextmanager
def cast_parameters(model: nn.Module, dtypes: Mapping[str, torch.dtype], values: bool) -> Iterator[None]:
    """Under it the model's parameters have these dtypes; without `values` those that change are on the meta
    device. A tied tensor stays tied."""
    made: dict[int, nn.Parameter] = {}
    saved: list[tuple[dict, str, nn.Parameter]] = []
    try:
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            if parameter.dtype == dtypes[name]:
                continue
            if id(parameter) not in made:
                cast = (
                    parameter.detach().to(dtypes[name])
                    if values
                    else torch.empty_like(parameter, dtype=dtypes[name], device="meta")
                )
                made[id(parameter)] = nn.Parameter(cast, requires_grad=parameter.requires_grad)
            owner, _, last = name.rpartition(".")
            table = model.get_submodule(owner)._parameters
            saved.append((table, last, parameter))
            table[last] = made[id(parameter)]
        yield
    finally:
        for table, last, parameter in saved:
            table[last] = parameter


def cast_model(model: nn.Module, precision: str | None) -> nn.Module:
    """The model itself with its parameters cast for good, in place: the single device that `precision=` is
    compared with."""
    dtypes = parameter_dtypes(model, precision)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    return model


__all__ = [
    "cast_model",
    "cast_parameters",
    "check_complex",
    "parameter_dtypes",
]
