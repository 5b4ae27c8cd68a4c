"""New nodes: with their fake value, and the provenance of the node that they stand for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tedfx._torch import enable_python_dispatcher
from tedfx.errors import TedfxError

__all__ = ["emit", "evaluate", "fake_mode"]


def fake_mode(graph: fx.Graph) -> Any:
    """The mode that the graph's fake values belong to."""
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode
    return contextlib.nullcontext()


def evaluate(graph: fx.Graph, target: Callable, args: tuple, kwargs: dict) -> Any:
    """The fake value of `target(*args, **kwargs)`, nodes standing for their `meta['val']`. No size may become
    fixed by it.

    Python decompositions come before the kernels of composite operators, as in torch.export: some of those
    kernels (matmul's before torch 2.13) ask for sizes as numbers."""
    args, kwargs = fx.map_arg((args, kwargs), lambda n: n.meta.get("val"))
    mode = fake_mode(graph)
    env = getattr(mode, "shape_env", None)
    fixed = len(env.replacements) if env is not None else 0
    with torch.no_grad(), mode, enable_python_dispatcher():
        value = target(*args, **kwargs)
    if env is not None and len(env.replacements) > fixed:
        raise TedfxError(f"{target} ties sizes of the graph to each other or to numbers: {env.replacements}")
    return value


def emit(
    graph: fx.Graph, target: Callable, args: tuple, kwargs: dict | None = None, *, like: fx.Node
) -> fx.Node:
    """Insert a call at the graph's insertion point, with its fake value, and the provenance (line, module) of
    `like`."""
    kwargs = kwargs or {}
    node = graph.call_function(target, args, kwargs)
    for key in ("stack_trace", "nn_module_stack"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    node.meta["val"] = evaluate(graph, target, args, kwargs)
    return node
