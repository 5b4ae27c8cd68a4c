"""Rules (rules.py) of operators along dims, and of those that move dims: the rows stay together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tedfx.capture.batched import Batch, Batched, leading, numbers, refuse, unknown
from tedfx.capture.routing import argument, product, shape_of, swapped
from tedfx.graph.nodes import operator_of
from tedfx.placement.sizes import Size

__all__ = ["ALONG", "OVER", "along", "cat", "permute", "view"]

aten = torch.ops.aten
ALONG = {
    "softmax",
    "_softmax",
    "log_softmax",
    "_log_softmax",
    "cumsum",
    "cumprod",
    "sort",
    "argsort",
    "topk",
    "glu",
    "slice",
    "narrow",
    "chunk",
    "split",
    "split_with_sizes",
    "tensor_split",
    "flip",
}
OVER = {
    "sum",
    "mean",
    "amax",
    "amin",
    "max",
    "min",
    "argmax",
    "argmin",
    "any",
    "all",
    "var",
    "std",
    "logsumexp",
    "prod",
    "linalg_vector_norm",
    "norm",
}


def _move(value: Batched, dim: int, like: fx.Node, extra: int = 0) -> int:
    """A dim of the model's value as a dim of the batched one; `extra` is 1 where it is the place of a new
    dim."""
    rank = len(value.shape) + extra
    dim = dim % rank
    if dim >= value.start + value.span and (extra == 0 or value.span or value.kind == "stacked"):
        return dim - rank
    if dim < value.start + extra:
        return dim
    raise refuse(f"{like.target} along the rows", like, "work on each row alone")


def along(batch: Batch, like: fx.Node, name: str, value: Batched) -> Batched:
    """Operators with a `dim`."""
    given = argument(like, "dim")
    if given is None:
        raise refuse(f"{like.target} over all the rows", like, "work on each row alone")
    dims: Sequence[int] = given if isinstance(given, (list, tuple)) else [given]
    rank, moved = len(value.shape), [_move(value, d, like, int(name == "unsqueeze")) for d in dims]
    others = operator_of(like)._schema.arguments[1:]
    kwargs: dict[str, Any] = {spec.name: argument(like, spec.name) for spec in others}
    kwargs["dim"] = moved if isinstance(given, (list, tuple)) else moved[0]
    positional = [kwargs.pop(spec.name) for spec in others if not spec.kwarg_only]
    node = batch.emit(like.target, (value.node, *positional), kwargs, like)
    after = (
        sum(d % rank >= value.start + value.span for d in dims)
        if name != "unsqueeze"
        else sum(d < 0 for d in moved)
    )
    right = value.right
    if name == "unsqueeze":
        right += after
    elif name in ("select", "unbind") or (name in OVER and not argument(like, "keepdim")):
        right -= after
    return replace(value, made=node, like=like, right=right)


def view(batch: Batch, like: fx.Node, value: Batched) -> Batched:
    """A change of shape that keeps the rows together: the sizes before, of and after the rows stay what they
    are."""
    shape, out = value.shape, shape_of(like)
    if value.kind == "stacked":
        node = batch.emit(aten.reshape.default, (value.node, [batch.experts, *numbers(out, like)]), {}, like)
        return Batched("stacked", node, like, right=len(out))

    left, rows = product(shape[: value.start]), product(shape[value.start : value.start + value.span])
    for start in range(len(out)):
        for stop in range(start + 1, len(out) + 1):
            if product(out[:start]) == left and product(out[start:stop]) == rows:
                sizes: list[Size] = [*out[:start], -1, *out[stop:]]
                if all(isinstance(size, int) for size in sizes):
                    same = out == shape or shape_of(value.node)[1:] == sizes[1:]
                    node = (
                        value.node
                        if same
                        else batch.emit(aten.reshape.default, (value.node, sizes), {}, like)
                    )
                    return Batched("rows", node, like, len(out) - stop, stop - start)
    raise refuse(f"{like.target} mixes rows with features", like, "keep the rows in a dim of their own")


def permute(batch: Batch, like: fx.Node, name: str, value: Batched) -> Batched:
    rank = len(value.shape)
    order = swapped(like, name, rank)
    if value.kind == "stacked":
        node = batch.emit(aten.permute.default, (value.node, [0, *(d + 1 for d in order)]), {}, like)
        if order == [1, 0]:
            batch.transposes[node] = value.node
        return Batched("stacked", node, like, right=rank)
    region = list(range(value.start, value.start + value.span))
    at = order.index(value.start)
    if order[at : at + value.span] != region:
        raise refuse(f"{like.target} takes the tokens' dims apart", like, "flatten the tokens first")
    kept = [d for d in order if d not in region[1:]]
    emitted = [d if d <= value.start else d - value.span + 1 for d in kept]
    node = batch.emit(aten.permute.default, (value.node, emitted), {}, like)
    return Batched("rows", node, like, rank - at - value.span, value.span)


def cat(batch: Batch, like: fx.Node, name: str, args: tuple, kwargs: dict) -> Batched:
    values: list[Batched] = list(args[0])
    lead = leading(values, like)
    if any((v.kind, v.right, v.span) != (lead.kind, lead.right, lead.span) for v in values):
        raise unknown(like)
    given = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    dim = _move(lead, given, like, int(name == "stack"))
    node = batch.emit(like.target, ([v.node for v in values], dim), {}, like)
    return replace(lead, made=node, like=like, right=lead.right + int(name == "stack" and dim < 0))
