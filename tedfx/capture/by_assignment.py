"""Values with an entry per assignment, between the layout that the model has them in and [N, K, ..]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tedfx.capture.routing import Dims, Routing, shape_of
from tedfx.errors import CaptureError

__all__ = ["laid_out", "natural"]

aten = torch.ops.aten
Make = Callable[..., fx.Node]


def natural(value: fx.Node, dims: Dims, routing: Routing, make: Make, wrong: CaptureError) -> fx.Node:
    """Rows of features whose leading dims have these labels, as [N, K, H]; dims of size 1 are expanded."""
    shape, width, choices = shape_of(value), shape_of(value)[-1], routing.choices
    lead: list[Any] = [_size(dim, routing) for dim in dims]
    if len(shape) != len(dims) + 1:
        raise wrong
    if shape[:-1] != lead:
        if any(a != b and (a != 1 or not isinstance(b, int)) for a, b in zip(shape, lead)):
            raise wrong
        sizes = [-1 if a == b else b for a, b in zip(shape, lead)]
        value = make(aten.expand.default, value, [*sizes, -1])
    labels = [label for dim in dims for label in dim]
    tokens = tuple(label for label in labels if label != "k")
    if tokens != routing.tokens or "k" in labels[1:-1]:
        raise wrong
    if labels[:1] == ["k"] and len(labels) > 1:
        return make(aten.permute.default, make(aten.reshape.default, value, [choices, -1, width]), [1, 0, 2])
    return make(aten.reshape.default, value, [-1, choices, width])


def laid_out(value: fx.Node, dims: Dims, routing: Routing, make: Make, wrong: CaptureError) -> fx.Node:
    """[N, K, H] with leading dims of these labels."""
    labels = [label for dim in dims for label in dim]
    width = shape_of(value)[-1]
    if labels[:1] == ["k"] and len(labels) > 1:
        value = make(aten.permute.default, value, [1, 0, 2])
    free = [dim for dim in dims if not isinstance(_size(dim, routing), int)]
    sizes: list[Any] = []
    for dim in dims:
        size = _size(dim, routing)
        if isinstance(size, int):
            sizes.append(size)
        elif len(free) == 1:
            sizes.append(-1)
        else:
            if dim not in routing.dims:
                raise wrong
            at = routing.dims.index(dim)
            sizes.append(make(aten.sym_size.int, routing.node, at))
    return make(aten.reshape.default, value, [*sizes, width])


def _size(dim: tuple[str, ...], routing: Routing) -> Any:
    size: Any = 1
    for label in dim:
        size = size * routing.sizes[label]
    return size
