"""What a node calls and what it is given.

torch.fx types an argument as everything that a graph may hold, so `node.args[0].meta` has no meaning to a
type checker, and none to a reader who does not know the op. Here an argument is read as what the op takes it
for: a value of the graph (`operand`), or a constant (`argument`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, TypeGuard

import torch
from torch import fx

from tedfx import ops
from tedfx._torch import OpOverload, overload_name, qualified_name
from tedfx.errors import TedfxError, user_line

__all__ = [
    "REGROUPS",
    "argument",
    "arguments",
    "function",
    "is_elementwise",
    "is_operator",
    "is_sequence",
    "is_tensor",
    "leading_to",
    "namespace",
    "op_name",
    "operand",
    "operand_or_none",
    "operands",
    "operator_of",
    "overload",
    "reached_from",
    "results",
    "short_name",
]

_BATCHED = frozenset(ops.BATCHED.values())


def op_name(node: fx.Node) -> str:
    """``aten.linear`` for any overload; ``getitem``; the function's name for plain functions."""
    target = node.target
    if is_operator(target):
        return qualified_name(target).replace("::", ".")
    return getattr(target, "__name__", str(target))


def short_name(node: fx.Node) -> str:
    """The op without its namespace: ``linear``, ``combine``, ``getitem``."""
    return op_name(node).rpartition(".")[2]


def overload(node: fx.Node) -> str:
    """``dtype`` of ``aten.view.dtype``; "" for what is no operator of torch's."""
    return overload_name(node.target) if is_operator(node.target) else ""


def namespace(node: fx.Node) -> str:
    """``aten`` of an operator of torch's own; "" for what is no operator."""
    return node.target.namespace if is_operator(node.target) else ""


def function(node: fx.Node) -> Callable[..., Any]:
    """What a call calls. TedfxError where the node calls nothing, or a method by its name."""
    if isinstance(node.target, str):
        raise TedfxError(f"{node.name} is a {node.op}, not the call of a function | at {user_line(node)}")
    return node.target


def is_operator(target: object) -> TypeGuard[OpOverload[..., Any]]:
    """Whether it is an operator of torch's, or one registered with it."""
    return isinstance(target, OpOverload)


def operator_of(node: fx.Node) -> OpOverload[..., Any]:
    """The operator of torch's that a call calls. TedfxError where it is something else."""
    target = node.target
    if is_operator(target):
        return target
    raise TedfxError(f"{node.name} calls {op_name(node)}, no operator of torch's | at {user_line(node)}")


def is_elementwise(node: fx.Node) -> bool:
    """Whether torch itself tags the operator as pointwise."""
    return is_operator(node.target) and torch.Tag.pointwise in node.target.tags


def results(node: fx.Node) -> list[Any]:
    """The fake values of what a node makes: one, or one per output."""
    value = node.meta.get("val")
    return [*value] if is_sequence(value) else [value]


def is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether it is a list or a tuple, of whatever."""
    return isinstance(value, (list, tuple))


def is_tensor(node: object) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def argument(node: fx.Node, index: int, name: str = "", default: Any = None) -> Any:
    """An argument given by position or by name."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """All that is given by position: what each is, the op knows."""
    return node.args


def operand(node: fx.Node, index: int, name: str = "") -> fx.Node:
    """The value of the graph that a call is given by position or by name. TedfxError, with the user's line,
    where there is a constant or nothing."""
    found = argument(node, index, name)
    if not isinstance(found, fx.Node):
        raise TedfxError(
            f"{node.name}: argument {name or index} of {op_name(node)} is {found!r}, not a value of the "
            f"graph | at {user_line(node)}"
        )
    return found


def operand_or_none(node: fx.Node, index: int, name: str = "") -> fx.Node | None:
    """As `operand`; None where there is a constant or nothing."""
    found = argument(node, index, name)
    return found if isinstance(found, fx.Node) else None


def operands(node: fx.Node) -> list[fx.Node]:
    """Tensor operands in argument order, with repetitions (lists flattened). Of an item of a batched op, the
    one value that it is made of."""
    if node.target is operator.getitem and operand(node, 0).target in _BATCHED:
        values = argument(operand(node, 0), 0)
        return [values[argument(node, 1)]]
    found: list[fx.Node] = []

    def visit(arg: Any) -> None:
        if isinstance(arg, fx.Node):
            if is_tensor(arg):
                found.append(arg)
        elif is_sequence(arg):
            for item in arg:
                visit(item)

    visit(node.args)
    for value in node.kwargs.values():
        visit(value)
    return found


# Operators that give the same elements in the same order, in other dims.
REGROUPS = frozenset("view reshape _unsafe_view flatten unflatten squeeze".split())


def leading_to(node: fx.Node, inside: Container[fx.Node] | None = None) -> dict[fx.Node, None]:
    """The node and all that it is computed from, the nearest first; of those `inside` alone, where given."""
    found, todo = {node: None}, [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in found and (inside is None or source in inside):
                found[source] = None
                todo.append(source)
    return found


def reached_from(graph: fx.Graph, start: Iterable[fx.Node]) -> set[fx.Node]:
    """These nodes and all that is computed from them."""
    found = set(start)
    for node in graph.nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found
