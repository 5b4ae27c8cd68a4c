"""Random inputs of a few tokens for a trace: what the capture check runs the graph and the model on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import nn

from tedfx._torch import pytree
from tedfx.trace.calls import leaves_with_path
from tedfx.trace.global_graph import Trace

__all__ = ["attempts", "random_inputs"]

SIZES = (3, 7)  # of batch and sequence: neither divides the other, and neither is often a size of a model
FEWEST = (2, 3)  # the same, where a model is large
_MOST = 64  # tried sizes beyond the first


def attempts(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Bounds (from, below) of the integers among the inputs, in the order in which they are tried: ids of the
    smallest embedding; 0 and 1, since other integers are masks or classes; ones."""
    vocabulary = min((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=2)
    return iter(dict.fromkeys([(0, vocabulary), (0, 2), (1, 2)]))


def random_inputs(
    captured: Trace,
    bounds: tuple[int, int],
    least: tuple[int, int] = SIZES,
    seed: int = 0,
    alike: bool = False,
) -> dict[str, Any]:
    """A call by keyword, in the containers of the traced one: normal floats, integers within `bounds`, at the
    smallest sizes from `least` on that the trace accepts. `alike`: the same in every place of a free dim, so
    that a router sends all tokens to the same experts."""
    sizes = _accepted(captured, least)
    placeholders = {n.name: n for n in captured.graph_module.graph.find_nodes(op="placeholder")}
    generator = torch.Generator().manual_seed(seed)
    leaves = dict(captured.values)
    for name, path in captured.inputs.items():
        fake = placeholders[name].meta["val"]
        shape = [int(s.node.expr.subs(sizes)) if isinstance(s, torch.SymInt) else s for s in fake.shape]
        if fake.is_floating_point() or fake.is_complex():
            drawn = torch.complex64 if fake.is_complex() else torch.float32
            value = torch.randn(shape, generator=generator, dtype=drawn).to(fake.dtype)
        else:
            low, below = (0, 2) if fake.dtype == torch.bool and bounds[0] == 0 else bounds
            below = max(min(below, captured.limits.get(path, below)), low + 1)
            value = torch.randint(low, below, shape, generator=generator).to(fake.dtype)
        for d, size in enumerate(fake.shape):
            if alike and isinstance(size, torch.SymInt):
                value = value.narrow(d, 0, 1).expand_as(value).clone()
        leaves[path] = value.to(captured.device).requires_grad_(fake.requires_grad)
    _, places = pytree.tree_unflatten(list(range(captured.in_spec.num_leaves)), captured.in_spec)
    order = {index: leaves.get(path) for path, index in leaves_with_path(places) if index is not None}
    return pytree.tree_unflatten(
        [order.get(i) for i in range(captured.in_spec.num_leaves)], captured.in_spec
    )[1]


def _accepted(captured: Trace, least: tuple[int, int]) -> dict[sympy.Symbol, int]:
    symbols = list(captured.sizes.values())
    ranges = []
    for symbol, size in zip(symbols, least):
        low, high = captured.bounds.get(symbol, (1, None))
        first = max(size, low)
        ranges.append(
            range(first, first + _MOST)
            if high is None
            else range(min(first, high), min(first + _MOST, high + 1))
        )
    for sizes in sorted(itertools.product(*ranges), key=lambda sizes: (sum(sizes), sizes)):
        found = list(zip(symbols, sizes))
        if not any(condition.subs(found) == sympy.false for condition in captured.conditions):
            return dict(found)
    return dict(zip(symbols, (r[0] for r in ranges)))
