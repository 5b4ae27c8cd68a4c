"""Routing weights on their way through an expert's body.

A routing weight (`w[token, slot]`, `probs[token, e]`, the column of a gate matrix) is not computed on rows:
it is carried along through whatever commutes with a factor per row (products, casts, layouts, linears without
bias) and becomes the weights [N, K] of `combine`. An entry of a matrix over the experts is gathered by the
ids: for a token that chose e, that is the entry of e.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from tedfx._torch import pytree
from tedfx.capture.batched import Batch, Batched, is_pointwise, is_value, refuse
from tedfx.capture.routing import Dims, product, shape_of
from tedfx.capture.rules import apply_rule
from tedfx.graph.facts import VAL

__all__ = ["Weight", "weight", "weighted"]

_RESHAPES = {
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "alias",
    "clone",
    "contiguous",
}
_CASTS = {"to", "_to_copy", "type_as"}


@dataclass(frozen=True)
class Weight:
    """Entry [token, choice] of `node`, or [token, expert] of a matrix over the experts; `dims` are its
    labels, `casts` follow it."""

    node: fx.Node
    dims: Dims
    casts: tuple[torch.dtype, ...] = ()


def weight(like: fx.Node, dims: Dims, weight: Weight) -> Batched:
    """A weight per row; `dims` says which dim of `like` is the rows'."""
    at = [d for d, dim in enumerate(dims) if dim]
    span = at[-1] - at[0] + 1 if at else 1
    return Batched("weight", None, like, right=len(dims) - 1 - (at[-1] if at else 0), span=span, of=weight)


def weighted(batch: Batch, like: fx.Node, name: str, args: tuple, kwargs: dict) -> Batched:
    """A weight passes through what commutes with a factor per row."""
    leaves = pytree.tree_leaves((args, kwargs), is_leaf=is_value)
    carriers = [v for v in leaves if isinstance(v, Batched) and v.kind in ("weight", "weighted")]
    value = carriers[0]
    if len(carriers) > 1:
        raise refuse(f"{like.target} of two routing weights", like, "weigh an expert's result once")
    if value.kind == "weight":
        if name in _CASTS or name in _RESHAPES:
            return _reshaped(like, value)
        others = [v for v in leaves if isinstance(v, Batched) and v is not value]
        if name == "mul" and len(others) == 1:
            other = others[0]
            if other.kind == "shared":
                other = batch.tokens(other, like)
            if other.kind == "rows" and (other.right, other.span) == (value.right, value.span):
                return Batched("weighted", other.node, like, other.right, other.span, value.of)
        raise refuse(f"a routing weight in {like.target}", like, "multiply the expert's result by the weight")
    linear = (
        name in ("mul", "div", "neg", "dropout", "matmul", "mm")
        or name in _CASTS | _RESHAPES
        or (name == "linear" and not args[2:])
    )
    if not linear or (args[0] is not value and name != "mul"):
        raise refuse(
            f"{like.target} of rows that carry their routing weight",
            like,
            "multiply the expert's result by the weight last",
        )
    inner = replace(value, kind="rows", of=None)
    args, kwargs = pytree.tree_map(lambda v: inner if v is value else v, (args, kwargs), is_leaf=is_value)
    out = apply_rule(batch, like, args, kwargs)
    return replace(out, kind="weighted", of=value.of)


def _reshaped(like: fx.Node, value: Batched) -> Batched:
    shape, weight = shape_of(like), value.of
    if is_pointwise(like) and VAL[like].dtype != VAL[value.like].dtype:
        weight = replace(weight, casts=(*weight.casts, VAL[like].dtype))
    rows = product(value.shape)
    for start in range(len(shape)):
        for stop in range(start + 1, len(shape) + 1):
            if product(shape[start:stop]) == rows and product(shape[:start] + shape[stop:]) == 1:
                return Batched("weight", None, like, len(shape) - stop, stop - start, weight)
    raise refuse(f"{like.target} of a routing weight", like, "let it be one number per row")
