"""What an operator of an expert's body becomes when all experts' bodies are computed at once.

The rules keep the model's operator and its line, and hold for every expert because no rule lets one row reach
another: element by element, along dims that are not the rows', and layouts that keep the rows together.
Anything else is refused by name.

A stacked value that meets rows element by element goes through `expert_rows`. Matrix products and norms are
in contractions.py.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from tedfx._torch import pytree
from tedfx.capture.batched import (
    Batch,
    Batched,
    aligned,
    is_pointwise,
    is_value,
    leading,
    leaves,
    refuse,
    unknown,
)
from tedfx.capture.batched_dims import ALONG, OVER, along, cat, permute, view
from tedfx.capture.contractions import linear, norm
from tedfx.capture.routing import TRANSPOSES, name_of
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import REGROUPS
from tedfx.ops.function import kept_of

__all__ = ["apply_rule"]


def apply_rule(batch: Batch, like: fx.Node, args: tuple, kwargs: dict) -> Batched:
    """The batched value of `like`, whose operands are rows, stacked or shared; `batch` emits and knows the
    rows."""
    name = name_of(like)
    if kept_of(like.target) is not None:
        return _function(batch, like, args)
    if is_pointwise(like):
        return _pointwise(batch, like, args, kwargs)
    if name in ("linear", "matmul", "mm", "addmm"):
        return linear(batch, like, name, args)
    if name in ("layer_norm", "rms_norm"):
        return norm(batch, like, name, args, kwargs)
    if name in REGROUPS:
        return view(batch, like, args[0])
    if name in ("cat", "stack"):
        return cat(batch, like, name, args, kwargs)
    first = args[0] if args and isinstance(args[0], Batched) else None
    if first is None or any(
        isinstance(a, Batched) and a.kind != "shared" for a in leaves((args[1:], kwargs))
    ):
        raise unknown(like)
    if name == "getitem":
        return replace(first, made=batch.emit(like.target, (first.node, args[1]), {}, like), like=like)
    if name in ALONG | OVER | {"select", "unbind", "unsqueeze"}:
        return along(batch, like, name, first)
    if name in TRANSPOSES:
        return permute(batch, like, name, first)
    raise unknown(like)


def _pointwise(batch: Batch, like: fx.Node, args: tuple, kwargs: dict) -> Batched:
    values = [v for v in leaves((args, kwargs)) if isinstance(v, Batched)]
    lead = leading(values, like)

    def operand(value: object) -> object:
        return aligned(batch, like, value, lead) if isinstance(value, Batched) else value

    new_args, new_kwargs = (pytree.tree_map(operand, x, is_leaf=is_value) for x in (args, kwargs))
    node = batch.emit(like.target, new_args, new_kwargs, like)
    if lead.kind == "stacked":
        return Batched("stacked", node, like, right=VAL[like].dim())
    return Batched("rows", node, like, lead.right, lead.span)


def _function(batch: Batch, like: fx.Node, args: tuple) -> Batched:
    """A Function of the user's own: one call for all experts is E calls only where nothing in it, forward or
    backward, goes from one element to another."""
    from tedfx.rules.functions import is_elementwise  # rules of types, which nothing else here needs

    values = [a for a in args if isinstance(a, Batched)]
    lead = leading([v for v in values if v.kind != "shared"], like)
    if not is_elementwise(like) or any(
        v.kind == "shared" and any(size != 1 for size in v.shape) for v in values
    ):
        raise unknown(like)
    if any(
        v.kind != "shared" and (v.kind, v.right, v.span) != (lead.kind, lead.right, lead.span) for v in values
    ):
        raise refuse(
            f"{name_of(like)} of rows and of parameters",
            like,
            "let all its operands be rows of tokens, or all of them parameters",
        )
    node = batch.emit(like.target, tuple(a.node if isinstance(a, Batched) else a for a in args), {}, like)
    return replace(lead, made=node, like=like)
