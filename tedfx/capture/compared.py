"""Masks that compare ids with one expert's number each become the entries of one gate.

    for e, expert in enumerate(self.experts):             ids [B], say: one of each sequence, and an input
        out = out + expert(x) * (ids.view(-1, 1, 1) == e)

Nothing says which ids there are, so no token can be dispatched. But a mask that weighs an expert's result for
every token is entry e of a gate [.., E], whatever the ids are: an id that is no expert's is a row of zeros.
With the gate written out, this is a loop over experts that all compute every token
(`passes/stack_experts.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tedfx.capture.routing import name_of, shape_of
from tedfx.dtypes import has_gradient
from tedfx.graph.emit import emit
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import REGROUPS, is_tensor, leading_to, operand, operand_or_none

__all__ = ["write_gates"]

aten = torch.ops.aten
_CASTS = ("to", "_to_copy", "type_as", "float")

# How ids came to the shape of a mask: operators with their other arguments, the last one first.
_Layout = tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...]


@dataclass(frozen=True)
class _Weighed:
    """`product` weighs `value` by the `mask` of one expert."""

    product: fx.Node
    value: fx.Node
    mask: fx.Node


def write_gates(graph: fx.Graph) -> None:
    """Write out the gates of all ids that are compared with 0, 1, .. one by one."""
    found: dict[tuple[fx.Node, _Layout], dict[int, list[_Weighed]]] = {}
    for node in graph.nodes:
        for value, mask in _sides(node):
            compared = _compared(mask)
            if compared is not None:
                ids, number, layout = compared
                weighed = _Weighed(node, value, mask)
                found.setdefault((ids, layout), {}).setdefault(number, []).append(weighed)
    for (ids, layout), by_number in found.items():
        experts = [by_number.get(e, []) for e in range(len(by_number))]
        if len(experts) > 1 and len({len(one) for one in experts}) == 1:
            for layer in zip(*experts):  # each in the order of the graph
                _write(graph, ids, layout, list(layer))


def _sides(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """(value, mask) of a product of rows of features with one number for each, or for several of them."""
    if name_of(node) != "mul" or not all(isinstance(x, fx.Node) and is_tensor(x) for x in node.args):
        return []
    first, second = operand(node, 0), operand(node, 1)
    return [(a, b) for a, b in ((first, second), (second, first)) if _per_row(node, a, b)]


def _per_row(node: fx.Node, value: fx.Node, mask: fx.Node) -> bool:
    shape, entries = shape_of(value), shape_of(mask)
    return (
        has_gradient(VAL[value].dtype)
        and (shape_of(node), VAL[node].dtype) == (shape, VAL[value].dtype)
        and len(entries) == len(shape) > 1
        and entries[-1] == 1
        and shape[-1] != 1
    )


def _compared(mask: fx.Node) -> tuple[fx.Node, int, _Layout] | None:
    """(ids, number, layout) of the views and casts of `ids == number`."""
    number, layout, node = None, list[tuple[Callable[..., Any], tuple[Any, ...]]](), mask
    while node.op == "call_function" and callable(node.target):
        name = name_of(node)
        if name == "eq" and number is None and type(node.args[1]) is int:
            number = node.args[1]
        elif name in REGROUPS or name == "unsqueeze":
            layout.append((node.target, tuple(map(_fixed, node.args[1:]))))
        elif name not in _CASTS or number is not None:
            break
        node = operand(node, 0)
    if number is None or not is_tensor(node) or VAL[node].dtype.is_floating_point:
        return None
    return node, number, tuple(layout)


def _fixed(argument: Any) -> Any:
    return tuple(argument) if isinstance(argument, list) else argument


def _sized(value: fx.Node, other: fx.Node) -> fx.Node | None:
    """A node with a value's leading sizes and nothing of its own expert's, which another has not."""
    own = _parameters(value) - _parameters(other)
    node, shape = value, shape_of(value)[:-1]
    while (before := operand_or_none(node, 0)) is not None and is_tensor(before):
        if shape_of(before)[:-1] != shape:
            break
        node = before
    return None if _parameters(node) & own else node


def _parameters(node: fx.Node) -> set[fx.Node]:
    return {n for n in leading_to(node) if n.op == "placeholder"}


def _write(graph: fx.Graph, ids: fx.Node, layout: _Layout, experts: list[_Weighed]) -> None:
    products = {one.product: one.value for one in experts}
    like = next(node for node in graph.nodes if node in products)
    value = products[like]
    sized = _sized(value, experts[like is experts[0].product].value)
    if sized is None or any(shape_of(one.value) != shape_of(value) for one in experts):
        return
    with graph.inserting_before(like):
        each = ids
        for target, others in reversed(layout):
            each = emit(graph, target, (each, *others), like=like)
        sizes = [
            size if isinstance(size, int) else emit(graph, aten.sym_size.int, (sized, d), like=like)
            for d, size in enumerate(shape_of(value)[:-1])
        ]
        each = emit(graph, aten.expand.default, (each, [*sizes, 1]), like=like)
        device = VAL[ids].device
        numbers = emit(graph, aten.arange.default, (len(experts),), {"device": device}, like=like)
        gate = emit(graph, aten.eq.Tensor, (each, numbers), like=like)
        gate = emit(graph, aten.to.dtype, (gate, VAL[value].dtype), like=like)
    for e, one in enumerate(experts):
        with graph.inserting_before(one.product):
            entry = emit(graph, aten.slice.Tensor, (gate, -1, e, e + 1), like=one.mask)
        one.product.replace_input_with(one.mask, entry)
