"""What gradient accumulation over several micro-batches costs a rank, one after another or layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tabulate import tabulate

from tedfx.analysis.activations import Ledger, Sizing
from tedfx.analysis.communication import GATHER_PARAMETERS, SCATTER_GRADIENTS, Communication
from tedfx.analysis.cost import Cost, parameter_nodes
from tedfx.analysis.layers import regions
from tedfx.analysis.text import format_bytes
from tedfx.errors import TedfxError
from tedfx.placement.types import R
from tedfx.runtime.layered import turns
from tedfx.state.layouts import placed_on_first


@dataclass(frozen=True)
class Schedule:
    """One way to run a step's micro-batches; counts are of collectives per step, bytes of one rank.

    gathers, gathered      gathers of parameters (ZeRO-3) and what they send on the wire.
    sums, summed           collectives that sum gradients, and what they send on the wire.
    activations            kept from forward to backward, at most; rows after routing as if balanced.
    gradients              held at most, in the dtype that they are summed in: whole ones as far as they are
                           not in shares.
    """

    name: str
    gathers: int
    gathered: float
    sums: int
    summed: float
    activations: float
    gradients: int


def schedules(compilation, cost: Cost, values: Mapping[str, int], count: int) -> list[Schedule]:
    """`no_sync()` around all micro-batches but the last, and `ParallelModule.layered`. values: one
    micro-batch's sizes on a rank, by name."""
    graph = compilation.graph_module.graph
    sizing = Sizing({symbol: values[name.name] for symbol, name in cost.sizes.names.items()})
    kept = Ledger(graph, list(regions(graph).values()), sizing).total

    def wire(item: Communication) -> float:
        found = cost.number(item.payload * item.factor, values)
        if found is None:
            raise TedfxError(f"what {item.node} sends follows from sizes that are not among {dict(values)}")
        return float(found)

    def sent(*ops, phases=("forward", "recompute", "backward", "boundary")):
        items = [i for i in cost.items if i.op in ops and i.phase in phases]
        return len(items), sum(map(wire, items))

    gathers, gathered = sent(GATHER_PARAMETERS)
    scatters, scattered = sent(SCATTER_GRADIENTS)  # inside a compiled graph: once per run of it
    boundary = [i for i in cost.items if i.phase == "boundary" and i.node == "(gradients)"]
    sums, summed = len(boundary), sum(map(wire, boundary))
    apart, layered = _gradients(compilation)
    return [
        Schedule(
            "one after another",
            count * gathers,
            count * gathered,
            count * scatters + sums,
            count * scattered + summed,
            kept,
            apart,
        ),
        Schedule(
            "layer by layer", gathers, gathered, scatters + sums, scattered + summed, count * kept, layered
        ),
    ]


def _gradients(compilation) -> tuple[int, int]:
    """Bytes of gradients that a rank holds at most: with `no_sync`, and layer by layer."""
    graph, stage = compilation.graph_module.graph, compilation.options.zero
    place = turns(graph)
    apart = shares = 0
    layer: dict[int, int] = {}
    for node in parameter_nodes(compilation):
        if node.name not in compilation.trainable:
            continue
        size, placed = (
            (compilation.options.gradient_dtype or node.meta["val"].dtype).itemsize,
            placed_on_first(compilation, node, stage),
        )
        whole, share = placed.whole.numel * size, placed.share.numel * size
        summed = any(p == R for p in node.meta["type"].values()) and placed.cut is not None
        inside = any(u.meta.get("in_graph") for u in node.users)
        stays = stage < 2 or not summed
        apart += share if inside else whole
        shares += whole if stays else share
        if not stays:
            first = min((place[u] for u in node.users if u in place), default=0)
            layer[first] = layer.get(first, 0) + whole
    return apart, shares + max(layer.values(), default=0) + (
        min(compilation.options.bucket_bytes, sum(layer.values())) if layer else 0
    )


def table(found: list[Schedule], count: int) -> str:
    rows = [
        [
            s.name,
            s.gathers,
            format_bytes(s.gathered),
            s.sums,
            format_bytes(s.summed),
            "~" + format_bytes(s.activations),
            format_bytes(s.gradients),
        ]
        for s in found
    ]
    headers = [
        "",
        "gathers",
        "on the wire",
        "sums of gradients",
        "on the wire",
        "activations kept",
        "gradients held",
    ]
    return (
        f"accumulation of {count} micro-batches of these sizes, per rank and step (no_sync, or layered())\n"
        + tabulate(rows, headers=headers)
    )
