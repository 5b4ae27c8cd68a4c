"""Reading a node: what it calls, and its arguments."""

from __future__ import annotations

import torch
from torch import fx

from tedfx.errors import TedfxError, user_line

__all__ = ["REGROUPS", "op_name", "operand", "short_name"]


def op_name(node: fx.Node) -> str:
    """``aten.linear`` for any overload; ``getitem``; the function's name for plain functions."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[1]}"
    return getattr(target, "__name__", str(target))


def short_name(node: fx.Node) -> str:
    """The op without its namespace: ``linear``, ``combine``, ``getitem``."""
    return op_name(node).rpartition(".")[2]


def operand(node: fx.Node, index: int, name: str = "") -> fx.Node:
    """The value of the graph that a call is given by position or by name. TedfxError, with the user's line,
    where there is a constant or nothing."""
    found = node.args[index] if index < len(node.args) else node.kwargs.get(name)
    if not isinstance(found, fx.Node):
        raise TedfxError(
            f"{node.name}: argument {name or index} of {op_name(node)} is {found!r}, not a value of the "
            f"graph | at {user_line(node)}"
        )
    return found


# Operators that give the same elements in the same order, in other dims.
REGROUPS = frozenset("view reshape _unsafe_view flatten unflatten squeeze".split())
