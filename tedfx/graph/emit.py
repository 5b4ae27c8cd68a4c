"""New nodes: with their fake value, and the provenance of the node that they stand for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from tedfx._torch import enable_python_dispatcher
from tedfx.errors import TedfxError
from tedfx.graph.facts import VAL, copy_provenance, set_value

if TYPE_CHECKING:
    from tedfx.graph.facts import Dim, Placement

__all__ = ["emit", "emit_typed", "evaluate", "fake_mode", "insert"]


def fake_mode(graph: fx.Graph) -> Any:
    """The mode that the graph's fake values belong to."""
    for node in graph.nodes:
        mode = getattr(VAL.get(node), "fake_mode", None)
        if mode is not None:
            return mode
    return contextlib.nullcontext()


def evaluate(
    graph: fx.Graph, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The fake value of `target(*args, **kwargs)`, nodes standing for their `meta['val']`. No size may become
    fixed by it.

    Python decompositions come before the kernels of composite operators, as in torch.export: some of those
    kernels (matmul's before torch 2.13) ask for sizes as numbers."""
    args, kwargs = fx.map_arg((args, kwargs), VAL.get)
    mode = fake_mode(graph)
    env = getattr(mode, "shape_env", None)
    fixed = len(env.replacements) if env is not None else 0
    with torch.no_grad(), mode, enable_python_dispatcher():
        value = target(*args, **kwargs)
    if env is not None and len(env.replacements) > fixed:
        raise TedfxError(f"{target} ties sizes of the graph to each other or to numbers: {env.replacements}")
    return value


def emit(
    graph: fx.Graph,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    like: fx.Node,
) -> fx.Node:
    """Insert a call at the graph's insertion point, with its fake value, and the provenance (line, module) of
    `like`."""
    kwargs = kwargs or {}
    node = graph.call_function(target, args, kwargs)
    copy_provenance(like, node)
    VAL[node] = evaluate(graph, target, args, kwargs)
    return node


def insert(graph: fx.Graph, target: Callable[..., Any], *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
    """Insert a call that comes from where `like` does; nothing is said of its value."""
    node = graph.call_function(target, args, kwargs)
    copy_provenance(like, node)
    return node


def emit_typed(
    graph: fx.Graph,
    target: Callable[..., Any],
    *args: Any,
    like: fx.Node,
    dims: list[Dim],
    type_: Mapping[str, Placement],
    differentiable: bool,
    **kwargs: Any,
) -> fx.Node:
    """Insert a call into a typed graph: what it makes has these factors per dim and this type.

    Its fake value is not computed, since ops of ours run on local sizes; where it is that of another node the
    caller says so."""
    node = insert(graph, target, *args, like=like, **kwargs)
    set_value(node, dims, type_, differentiable)
    return node
