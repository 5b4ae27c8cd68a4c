"""Matrix products and norms of an expert's body, batched (the terms are in rules.py).

- A linear or matmul of rows with stacked matrices is a `grouped_linear`, its bias a row per expert, added.
  With one shared matrix it is what it was. Of two matrices of the expert it is one product per expert.
- A norm with stacked weights is the norm without them, then a product with and a sum of rows of the weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tedfx.capture.batched import Batch, Batched, aligned, refuse, unknown
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import operator_of

__all__ = ["linear", "norm"]

aten = torch.ops.aten


def linear(batch: Batch, like: fx.Node, name: str, args: tuple) -> Batched:
    bias, rows, weight = None, *args[:2]
    if name == "linear":
        bias = args[2] if len(args) > 2 else None
    elif name == "addmm":
        bias, rows, weight = args[:3]
        if like.kwargs:
            raise unknown(like)
    if rows.kind == "stacked" and bias is None:
        return _of_parameters(batch, like, name, rows, weight)
    if weight.kind == "rows" or rows.kind == "stacked":
        raise unknown(like)
    if rows.kind == "shared":
        rows = batch.tokens(rows, like)
    if rows.right != 1:
        raise refuse("a matrix product over the rows", like, "keep the rows in a dim of their own")
    if weight.kind == "shared":
        given = (rows.node, weight.node)
        node = batch.emit(aten.linear.default if name == "linear" else aten.matmul.default, given, {}, like)
    else:
        if VAL[rows.node].dim() != 2 or weight.right != 2:
            raise refuse(
                "a matrix product of an expert that is not (rows, features) by (features, features)",
                like,
                "reshape to rows first",
            )
        base = batch.transposes.get(weight.node)
        transposed = (name != "linear") == (base is None)
        node = batch.grouped(rows.node, weight.node if base is None else base, transposed, like)
    out = Batched("rows", node, like, 1, rows.span)
    if bias is not None:
        node = batch.emit(aten.add.Tensor, (node, aligned(batch, like, bias, out)), {}, like)
    return replace(out, made=node)


def _of_parameters(batch: Batch, like: fx.Node, name: str, left: Batched, right: Batched) -> Batched:
    """The product of an expert's matrix with another, as of a low-rank pair."""
    if right.kind not in ("stacked", "shared") or any(
        len(v.shape) != 2 or (v.kind == "stacked" and v.right != 2) for v in (left, right)
    ):
        raise unknown(like)
    other = right.node
    if name == "linear":
        other = batch.emit(aten.transpose.int, (other, -2, -1), {}, like)
    return Batched("stacked", batch.emit(aten.matmul.default, (left.node, other), {}, like), like, right=2)


def norm(batch: Batch, like: fx.Node, name: str, args: tuple, kwargs: dict) -> Batched:
    def given(name: str) -> Any:
        for position, spec in enumerate(operator_of(like)._schema.arguments):
            if spec.name == name:
                return args[position] if position < len(args) else kwargs.get(name, spec.default_value)
        return None

    source, shape = given("input"), given("normalized_shape")
    if source.kind == "shared":
        source = batch.tokens(source, like)
    if source.kind != "rows" or len(shape) > source.right:
        raise refuse(f"{name} over the rows", like, "normalise the features of each row")
    weight, bias, eps = given("weight"), given("bias"), given("eps")
    plain = (source.node, shape, None, None, eps) if name == "layer_norm" else (source.node, shape, None, eps)
    out = Batched("rows", batch.emit(like.target, plain, {}, like), like, source.right, source.span)
    for target, value in ((aten.mul.Tensor, weight), (aten.add.Tensor, bias)):
        if value is not None:
            out = replace(
                out, made=batch.emit(target, (out.node, aligned(batch, like, value, out)), {}, like)
            )
    return out
