"""A value of an expert's body, for all experts at once.

A batched value stands for E values, one per expert. It is one of

- `rows`: the experts' rows one after the other. In the model's value the dims `rank - right - span` up to
  `rank - right` count rows (span > 1 where tokens were never flattened); the batched node has one dim for
  them.
- `stacked`: one entry per expert, dim 0 of the batched node is the expert (span 0: no dim of the model's
  value is it).
- `shared`: one value for all experts: the model's own node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import torch
from torch import fx

from tedfx._torch import pytree
from tedfx.capture.routing import name_of, shape_of
from tedfx.errors import CaptureError, TedfxError, user_line
from tedfx.graph.facts import VAL
from tedfx.ops.function import kept_of
from tedfx.placement.sizes import Size

__all__ = [
    "Batch",
    "Batched",
    "aligned",
    "is_pointwise",
    "is_value",
    "leading",
    "leaves",
    "refuse",
    "unknown",
]

aten = torch.ops.aten


@dataclass(frozen=True)
class Batched:
    kind: str
    made: fx.Node | None  # None of what is no value of the graph: an `index`, a `weight`, a `count`
    like: fx.Node  # the model's node, of the first expert
    right: int = 0
    span: int = 0
    of: Any = None  # what an `index`, a `weight` or a `weighted` value is about (bodies.py)
    dropped: int = 0  # so many leading dims of the model's node this value has not

    @property
    def node(self) -> fx.Node:
        if self.made is None:
            raise TedfxError(f"{self.kind} of an expert is no value of the graph | at {user_line(self.like)}")
        return self.made

    @property
    def shape(self) -> list[Size]:
        return shape_of(self.like)[self.dropped :]

    @property
    def start(self) -> int:
        return len(self.shape) - self.right - self.span


class Batch(Protocol):
    """What rules ask of the body that they are for (`Rows` in rows.py): it makes nodes and knows the rows."""

    experts: int
    transposes: dict[fx.Node, fx.Node]

    def emit(self, target: Any, args: tuple, kwargs: dict, like: fx.Node) -> fx.Node: ...

    def tokens(self, value: Batched, like: fx.Node) -> Batched: ...

    def grouped(self, rows: fx.Node, weight: fx.Node, transposed: bool, like: fx.Node) -> fx.Node: ...

    def expert_rows(self, param: fx.Node, lead: Batched, like: fx.Node) -> fx.Node: ...


def is_value(x: object) -> TypeGuard[Batched]:
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


def is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or name_of(node) in _POINTWISE


def unknown(like: fx.Node) -> CaptureError:
    return refuse(
        f"{name_of(like) if kept_of(like.target) else like.target} in an expert's body may mix the rows "
        "of one expert with another's",
        like,
        "use operators that work on each row alone",
    )


def leaves(tree: Any) -> list[Any]:
    return pytree.tree_leaves(tree, is_leaf=is_value)


def numbers(sizes: list[Size], like: fx.Node) -> list[Size]:
    """Sizes of what each expert has for itself, which are known numbers: no dims of tokens."""
    if not all(isinstance(size, int) for size in sizes):
        raise refuse(
            "what is taken for a parameter of each expert has a dim of tokens", like, "take each expert alone"
        )
    return sizes


def leading(values: list[Batched], like: fx.Node) -> Batched:
    """The operand that says where the rows are (or that all are stacked)."""
    rows = [v for v in values if v.kind == "rows"]
    if any((v.right, v.span) != (rows[0].right, rows[0].span) for v in rows[1:]):
        raise refuse("rows meet along different dims", like, "keep the rows in one dim")
    return rows[0] if rows else max((v for v in values if v.kind == "stacked"), key=lambda v: v.right)


def aligned(batch: Batch, like: fx.Node, value: Batched, lead: Batched) -> fx.Node:
    """`value` so that it broadcasts (from the right) against the batched `lead`."""
    if not isinstance(VAL[value.like], torch.Tensor):
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
            (value.node, [batch.experts] + [1] * (right - value.right) + numbers(shape, like)),
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
        node = batch.emit(aten.reshape.default, (node, [batch.experts, *numbers(inner, like)]), {}, like)
    return batch.expert_rows(node, lead, like)
