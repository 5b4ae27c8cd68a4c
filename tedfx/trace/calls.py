"""A call of the model: its inputs by name, and where in it each tensor sits.

A *path* is where an input sits in the call, ("input_ids",) or ("images", 0).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tedfx._torch import pytree
from tedfx.errors import TraceError
from tedfx.ops.autocast import Autocast


def infer_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Example inputs of a model that reads token ids: `input_ids`, and `labels` where `forward` accepts
    them."""
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" not in parameters:
        raise TraceError(
            f"{type(model).__name__}.forward({', '.join(parameters)}) takes no input_ids, so its inputs "
            "cannot be "
            "guessed: pass example inputs, as in trace(model, kwargs={'x': torch.randn(6, 10, 64)})"
        )
    ids = torch.zeros(6, 10, dtype=torch.int64)
    return {name: ids.clone() for name in ("input_ids", "labels") if name in parameters}


def bind(signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call by keyword. Positional arguments beyond the named ones are refused."""
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise TraceError(f"the inputs do not fit the model's forward: {error}") from None
    call = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            call.update(value)
        elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise TraceError(
                f"argument '{name}' of forward has no keyword: wrap the model in one whose inputs have names"
            )
        else:
            call[name] = value
    return call


def leaves_with_path(tree: Any) -> list[tuple[tuple, Any]]:
    leaves, _ = pytree.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    return [
        (tuple(getattr(k, "key", getattr(k, "idx", getattr(k, "name", None))) for k in path), x)
        for path, x in leaves
    ]


def shown(path: tuple) -> str:
    return str(path[0]) + "".join(f"[{p!r}]" for p in path[1:])


@dataclasses.dataclass
class Subject:
    """A call that is traced, and what there is to say of it.

    call       the call by keyword
    roles      for each leaf of it, dim -> "batch" or "sequence"
    around     the autocast region around the call
    static     one line for every size that the model fixes or bounds
    notes, captured   what the frontends say, and the modules that they prepared
    """

    model: nn.Module
    signature: inspect.Signature
    call: dict[str, Any]
    roles: Sequence[dict[int, str] | None]
    device: torch.device
    around: Autocast | None
    static: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    captured: list[str] = dataclasses.field(default_factory=list)
