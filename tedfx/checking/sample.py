"""Which gradients of a large model are compared: those of sampled parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tedfx.analysis.layers import layer_of
from tedfx.trace.global_graph import Trace

__all__ = ["FULL", "sample", "widest"]

FULL = 2**25  # elements of parameters whose gradients are compared: 256 MiB in float64, in some five copies


# ----------------------------------------------------------------------------------------------------------


def _groups(model: nn.Module, captured: Trace) -> list[list[str]]:
    """Names of the parameters, those that the graph stacks together."""
    distinct = dict(model.named_parameters())
    stacks = [[n for n in names if n in distinct] for names in captured.stacked.values()]
    stacked = {name for names in stacks for name in names}
    return [names for names in stacks if names] + [[name] for name in distinct if name not in stacked]


def _elements(model: nn.Module, names: Sequence[str]) -> int:
    return sum(model.get_parameter(name).numel() for name in names)


def widest(model: nn.Module, captured: Trace) -> int:
    return max((_elements(model, group) for group in _groups(model, captured)), default=0)


def sample(model: nn.Module, captured: Trace, limit: int | None = None) -> frozenset[str] | None:
    """Names of the parameters whose gradients are compared; None where that is all of them, since there are
    at most `limit` (`FULL`) elements."""
    limit = FULL if limit is None else limit
    groups = _groups(model, captured)
    if sum(_elements(model, group) for group in groups) <= limit:
        return None
    by_layer: dict[str, list[list[str]]] = {}
    for group in groups:
        if all(model.get_parameter(name).requires_grad for name in group):
            by_layer.setdefault(layer_of(group[0]), []).append(group)
    indexed = sorted(
        (name for name in by_layer if name),
        key=lambda name: [int(part) if part.isdigit() else part for part in name.split(".")],
    )
    stacked = {layer_of(names[0]) for names in captured.stacked.values()} | {
        layer_of(name) for name in captured.captured
    }
    mixtures = [name for name in indexed if name in stacked] or indexed
    wanted = dict.fromkeys(
        [*mixtures[-1:], *indexed[:1], *indexed[len(indexed) // 2 : len(indexed) // 2 + 1], ""]
    )
    taken: list[str] = []
    for layer in wanted:
        for group in sorted(by_layer.get(layer, ()), key=lambda group: _elements(model, group)):
            if _elements(model, taken) + _elements(model, group) <= limit:
                taken.extend(group)
    return frozenset(taken)
