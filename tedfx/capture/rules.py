"""What an operator of an expert's body becomes when all experts' bodies are computed at once.

A batched value stands for E values, one per expert. It is one of

- `rows`: the experts' rows one after the other. In the model's value the dims `rank - right - span` up to
  `rank - right` count rows (span > 1 where tokens were never flattened); the batched node has one dim for
  them.
- `stacked`: one entry per expert, dim 0 of the batched node is the expert (span 0: no dim of the model's
  value is it).
- `shared`: one value for all experts: the model's own node.

The rules keep the model's operator and its line, and hold for every expert because no rule lets one row reach
another: element by element, along dims that are not the rows', and layouts that keep the rows together.
Anything else is refused by name.

A stacked value that meets rows element by element goes through `expert_rows`. Matrix products and norms are
in contractions.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from tedfx._torch import pytree
from tedfx.capture.routing import argument, name_of, product
from tedfx.errors import CaptureError, user_line
from tedfx.graph.nodes import REGROUPS
from tedfx.ops.function import kept_of
from tedfx.placement.factors import as_size

__all__ = ["Batched", "aligned", "apply_rule", "is_pointwise", "is_value", "refuse", "unknown"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Batched:
    kind: str
    node: fx.Node | None
    like: fx.Node  # the model's node, of the first expert
    right: int = 0
    span: int = 0
    of: Any = None  # what an `index`, a `weight` or a `weighted` value is about (bodies.py)

    @property
    def shape(self) -> list:
        return [as_size(size) for size in self.like.meta["val"].shape]

    @property
    def start(self) -> int:
        return len(self.shape) - self.right - self.span


def is_value(x: Any) -> bool:
    return isinstance(x, Batched)


def refuse(what: str, node: fx.Node, fix: str) -> CaptureError:
    return CaptureError(f"cannot capture the loop over experts: {what} | at {user_line(node)} | {fix}")


_POINTWISE = {
    "dropout",
    "to",
    "_to_copy",
    "contiguous",
    "detach",
    "alias",
    "clone",
    "type_as",
    "hardswish",
    "log_sigmoid",
    "alpha_dropout",
    "lift_fresh_copy",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "bernoulli",
}
_ALONG = {
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
_OVER = {
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


def is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or name_of(node) in _POINTWISE


def apply_rule(batch, like: fx.Node, args: tuple, kwargs: dict) -> Batched:
    """The batched value of `like`, whose operands are rows, stacked or shared; `batch` emits and knows the
    rows."""
    from tedfx.capture.contractions import linear, norm  # which need `aligned`

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
        return _view(batch, like, args[0])
    if name in ("cat", "stack"):
        return _cat(batch, like, name, args, kwargs)
    first = args[0] if args and isinstance(args[0], Batched) else None
    if first is None or any(
        isinstance(a, Batched) and a.kind != "shared" for a in _leaves((args[1:], kwargs))
    ):
        raise unknown(like)
    if name == "getitem":
        return replace(first, node=batch.emit(like.target, (first.node, args[1]), {}, like), like=like)
    if name in _ALONG | _OVER | {"select", "unbind", "unsqueeze"}:
        return _along(batch, like, name, first)
    if name in ("permute", "transpose", "t"):
        return _permute(batch, like, name, first)
    raise unknown(like)


def unknown(like: fx.Node) -> CaptureError:
    return refuse(
        f"{name_of(like) if kept_of(like.target) else like.target} in an expert's body may mix the rows "
        "of one expert with another's",
        like,
        "use operators that work on each row alone",
    )


def _leaves(tree) -> list:
    return pytree.tree_leaves(tree, is_leaf=is_value)


def _lead(values: list[Batched], like: fx.Node) -> Batched:
    """The operand that says where the rows are (or that all are stacked)."""
    rows = [v for v in values if v.kind == "rows"]
    if any((v.right, v.span) != (rows[0].right, rows[0].span) for v in rows[1:]):
        raise refuse("rows meet along different dims", like, "keep the rows in one dim")
    return rows[0] if rows else max((v for v in values if v.kind == "stacked"), key=lambda v: v.right)


# --- element by element -------------------------------------------------------------------------------------


def _pointwise(batch, like: fx.Node, args: tuple, kwargs: dict) -> Batched:
    values = [v for v in _leaves((args, kwargs)) if isinstance(v, Batched)]
    lead = _lead(values, like)

    def operand(value):
        return aligned(batch, like, value, lead) if isinstance(value, Batched) else value

    new_args, new_kwargs = (pytree.tree_map(operand, x, is_leaf=is_value) for x in (args, kwargs))
    node = batch.emit(like.target, new_args, new_kwargs, like)
    if lead.kind == "stacked":
        return Batched("stacked", node, like, right=like.meta["val"].dim())
    return Batched("rows", node, like, lead.right, lead.span)


def aligned(batch, like: fx.Node, value: Batched, lead: Batched) -> fx.Node:
    """`value` so that it broadcasts (from the right) against the batched `lead`."""
    if not isinstance(value.like.meta["val"], torch.Tensor):
        return value.node
    shape, right = value.shape, lead.right
    if value.kind == "rows":
        return value.node
    if lead.kind == "stacked":
        if value.kind == "shared" or value.right == right:
            if value.kind == "shared" and len(shape) > right:
                raise refuse("a value of higher rank meets a parameter", like, "reshape the parameter first")
            return value.node
        return batch.emit(
            aten.reshape.default,
            (value.node, [batch.experts] + [1] * (right - value.right) + shape),
            {},
            like,
        )
    over = shape[: len(shape) - right] if len(shape) > right else []  # dims at and before the rows
    if any(size != 1 for size in over):
        if value.kind == "shared":
            return batch.tokens(value, like).node
        raise refuse("a parameter is as long as the rows", like, "use operators that work on each row alone")
    if value.kind == "shared":
        return (
            batch.emit(aten.reshape.default, (value.node, shape[len(over) :]), {}, like)
            if over and lead.span > 1
            else value.node
        )
    inner = shape[len(over) :]
    inner = [1] * (right - len(inner)) + inner
    node = value.node
    if inner != shape:
        node = batch.emit(aten.reshape.default, (node, [batch.experts, *inner]), {}, like)
    return batch.expert_rows(node, lead, like)


def _function(batch, like: fx.Node, args: tuple) -> Batched:
    """A Function of the user's own: one call for all experts is E calls only where nothing in it, forward or
    backward, goes from one element to another."""
    from tedfx.rules.functions import is_elementwise  # rules of types, which nothing else here needs

    values = [a for a in args if isinstance(a, Batched)]
    lead = _lead([v for v in values if v.kind != "shared"], like)
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
    return replace(lead, node=node, like=like)


# --- dims ---------------------------------------------------------------------------------------------------


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


def _along(batch, like: fx.Node, name: str, value: Batched) -> Batched:
    """Operators with a `dim`."""
    given = argument(like, "dim")
    if given is None:
        raise refuse(f"{like.target} over all the rows", like, "work on each row alone")
    dims = list(given) if isinstance(given, (list, tuple)) else [given]
    rank, moved = len(value.shape), [_move(value, d, like, int(name == "unsqueeze")) for d in dims]
    kwargs = {spec.name: argument(like, spec.name) for spec in like.target._schema.arguments[1:]}
    kwargs["dim"] = moved if isinstance(given, (list, tuple)) else moved[0]
    positional = [kwargs.pop(spec.name) for spec in like.target._schema.arguments[1:] if not spec.kwarg_only]
    node = batch.emit(like.target, (value.node, *positional), kwargs, like)
    after = (
        sum(d % rank >= value.start + value.span for d in dims)
        if name != "unsqueeze"
        else sum(d < 0 for d in moved)
    )
    right = value.right
    if name == "unsqueeze":
        right += after
    elif name in ("select", "unbind") or (name in _OVER and not argument(like, "keepdim")):
        right -= after
    return replace(value, node=node, like=like, right=right)


def _view(batch, like: fx.Node, value: Batched) -> Batched:
    """A change of shape that keeps the rows together: the sizes before, of and after the rows stay what they
    are."""
    shape, out = value.shape, [as_size(size) for size in like.meta["val"].shape]
    if value.kind == "stacked":
        node = batch.emit(aten.reshape.default, (value.node, [batch.experts, *out]), {}, like)
        return Batched("stacked", node, like, right=len(out))

    left, rows = product(shape[: value.start]), product(shape[value.start : value.start + value.span])
    for start in range(len(out)):
        for stop in range(start + 1, len(out) + 1):
            if product(out[:start]) == left and product(out[start:stop]) == rows:
                sizes = [*out[:start], -1, *out[stop:]]
                if all(isinstance(size, int) for size in sizes):
                    same = out == shape or [as_size(s) for s in value.node.meta["val"].shape][1:] == sizes[1:]
                    node = (
                        value.node
                        if same
                        else batch.emit(aten.reshape.default, (value.node, sizes), {}, like)
                    )
                    return Batched("rows", node, like, len(out) - stop, stop - start)
    raise refuse(f"{like.target} mixes rows with features", like, "keep the rows in a dim of their own")


def _permute(batch, like: fx.Node, name: str, value: Batched) -> Batched:
    rank = len(value.shape)
    order = list(range(rank))
    if name == "permute":
        order = [d % rank for d in like.args[1]]
    elif rank > 1:
        one, other = (0, 1) if name == "t" else (like.args[1] % rank, like.args[2] % rank)
        order[one], order[other] = order[other], order[one]
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


def _cat(batch, like: fx.Node, name: str, args: tuple, kwargs: dict) -> Batched:
    values = [v for v in args[0]]
    lead = _lead(values, like)
    if any((v.kind, v.right, v.span) != (lead.kind, lead.right, lead.span) for v in values):
        raise unknown(like)
    given = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    dim = _move(lead, given, like, int(name == "stack"))
    node = batch.emit(like.target, ([v.node for v in values], dim), {}, like)
    return replace(lead, node=node, like=like, right=lead.right + int(name == "stack" and dim < 0))
