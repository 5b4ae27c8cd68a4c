"""What a rank holds: its parameters, and the bytes of a training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from tedfx import ops
from tedfx.analysis.activations import Ledger, Sizing
from tedfx.analysis.cost import parameter_nodes
from tedfx.analysis.layers import regions
from tedfx.analysis.local_names import LocalSizes
from tedfx.analysis.saved import dtype_of
from tedfx.analysis.text import format_bytes
from tedfx.placement.types import Shard
from tedfx.report.folding import starred
from tedfx.report.words import count_of, state_name
from tedfx.state.layouts import placed_on_first


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank in a training step, on the mesh's first rank.

    parameters   this rank's shards, or its shares of them (ZeRO-3)
    buffers      this rank's shards
    gradients    held at most, when backward has ended and nothing is summed yet; shares where ZeRO sums on
                 the way (stage 2 and 3)
    optimizer    of AdamW by `ShardedOptimizer`: two float32 moments, and a float32 master of what has fewer
                 bits, of this rank's share (ZeRO-1 and above)
    activations  kept from forward to backward; rows after routing as if balanced
    at_hand      beside these, for the layer at hand: what a region that is recomputed saves again, whole
                 parameters that ZeRO-3 gathers, gradients that ZeRO-2 has not summed yet
    """

    parameters: int
    buffers: int
    gradients: int
    optimizer: int
    activations: float
    at_hand: float

    @property
    def peak(self) -> float:
        """All of it: of a step whose gradients are there when its activations are (accumulation). What a
        kernel takes for itself is not in it."""
        return sum(asdict(self).values())

    def to_json(self) -> dict[str, Any]:
        return {name: int(value) for name, value in {**asdict(self), "peak": self.peak}.items()}


def memory(compilation, sizes: LocalSizes, values: Mapping[str, int]) -> Memory:
    """values: one rank's sizes by name."""
    graph, stage = compilation.graph_module.graph, compilation.options.zero
    parameters = gradients = optimizer = whole_gradients = 0
    for node in parameter_nodes(compilation):
        dtype, placed = node.meta["val"].dtype, placed_on_first(compilation, node, stage)
        whole, share = placed.whole.numel, placed.share.numel if stage else placed.whole.numel
        parameters += (share if stage == 3 else whole) * dtype.itemsize
        if node.name in compilation.trainable:
            size = (compilation.options.gradient_dtype or dtype).itemsize
            whole_gradients += whole * size
            gradients += (share if stage >= 2 else whole) * size
            wide = max(dtype.itemsize, torch.float32.itemsize)
            optimizer += share * wide * (2 + (dtype.itemsize < wide))
    sizing = Sizing({symbol: values[name.name] for symbol, name in sizes.names.items()})
    again = list(regions(graph).values())
    ledger = Ledger(graph, again, sizing)
    gathers = {n: _made(n, sizing) for n in graph.nodes if n.target is ops.gather_parameters}
    layer = [ledger.again(nodes) + sum(gathers.get(n, 0.0) for n in nodes) for nodes in again]
    alone = [made for n, made in gathers.items() if "region" not in n.meta]
    at_hand = max([*layer, *alone], default=0.0) + max(gathers.values(), default=0.0)
    if stage >= 2:
        at_hand += min(compilation.options.bucket_bytes, whole_gradients)
    return Memory(parameters, _buffers(compilation, sizing), gradients, optimizer, ledger.total, at_hand)


def _made(gather: fx.Node, sizing: Sizing) -> float:
    """Bytes of the whole parameters that a gather makes."""
    return sum(sizing.elements(whole) * dtype_of(whole).itemsize for whole in gather.users)


def _buffers(compilation, sizing: Sizing) -> int:
    held = {**compilation.trace.buffers, **compilation.trace.constants}
    nodes = compilation.graph_module.graph.find_nodes(op="placeholder")
    return sum(int(sizing.elements(n)) * dtype_of(n).itemsize for n in nodes if n.name in held)


def memory_lines(held: Memory, limit: int | None) -> list[str]:
    """The line of a report; where more is held than `limit` bytes, a warning after it."""
    words = [
        f"{name.replace('_', ' ')} {'~' * isinstance(value, float)}{format_bytes(value)}"
        for name, value in asdict(held).items()
        if value
    ]
    lines = [f"memory      ~{format_bytes(held.peak)} at the peak of a training step: " + ", ".join(words)]
    if limit is not None and held.peak > limit:
        over = format_bytes(held.peak - limit)
        lines.append(f"warning     that is ~{over} more than the {format_bytes(limit)} that a rank has")
    return lines


def parameters(compilation, sizes: LocalSizes) -> dict[str, Any]:
    """How many there are in all, on a rank, and split over what; the largest of those that are whole."""
    groups: dict[tuple[str, ...], list[fx.Node]] = {}
    for node in parameter_nodes(compilation):
        axes = tuple(a for a, p in node.meta["type"].items() if isinstance(p, Shard))
        groups.setdefault(axes, []).append(node)
    names = compilation.roles.mesh.names
    order = sorted(groups, key=lambda axes: (not axes, [names.index(a) for a in axes]))
    nodes = [n for axes in order for n in groups[axes]]
    total = {n: int(n.meta["val"].numel()) for n in nodes}
    local = {n: int(sizes.elements(n)) for n in nodes}
    size = {n: n.meta["val"].dtype.itemsize for n in nodes}
    whole: dict[tuple, dict[str, Any]] = {}
    for node in groups.get((), ()):
        name, shape = starred(state_name(compilation.trace, node)), [int(s) for s in node.meta["val"].shape]
        entry = whole.setdefault((name, tuple(shape)), {"name": name, "shape": shape, "count": 0})
        entry["count"] += 1
    return {
        "tensors": len(nodes),
        "total": sum(total.values()),
        "local": sum(local.values()),
        "total_bytes": sum(total[n] * size[n] for n in nodes),
        "local_bytes": sum(local[n] * size[n] for n in nodes),
        "groups": [
            {
                "axes": list(axes),
                "tensors": len(groups[axes]),
                "total": sum(total[n] for n in groups[axes]),
                "local": sum(local[n] for n in groups[axes]),
            }
            for axes in order
        ],
        "whole": sorted(whole.values(), key=lambda w: -prod(w["shape"]) * w["count"])[:8],
    }


def parameter_lines(data: Mapping[str, Any]) -> list[str]:
    """`parameters` as lines of a report."""
    total, local = data["total"], data["local"]
    share = f" ({local / total:.1%})" if total else ""
    lines = [
        f"parameters  {count_of(total)} in {data['tensors']} tensors; on a rank {count_of(local)}{share}, "
        f"{format_bytes(data['local_bytes'])} of {format_bytes(data['total_bytes'])}"
    ]
    for group in data["groups"]:
        where = f"split over {', '.join(group['axes'])}" if group["axes"] else "whole"
        line = f"  {where:<22} {group['tensors']:>4} tensors, {count_of(group['total'])}"
        if group["axes"]:
            line += f", {count_of(group['local'])} on a rank"
        elif data["whole"]:
            line += ": " + ", ".join(
                f"{w['name']} {w['shape']}" + (f" x{w['count']}" if w["count"] > 1 else "")
                for w in data["whole"]
            )
        lines.append(line)
    return lines
