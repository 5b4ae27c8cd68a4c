"""Which values backward computes again rather than keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tedfx.analysis.activations import Ledger, Sizing
from tedfx.analysis.attention_cores import attention_cores
from tedfx.analysis.cost import Cost
from tedfx.analysis.layers import layers
from tedfx.analysis.saved import repeated, saves
from tedfx.analysis.text import format_bytes
from tedfx.errors import ConfigError, TedfxError, user_line
from tedfx.graph.emission import schedule
from tedfx.graph.facts import REGION, VAL
from tedfx.graph.nodes import op_name, short_name
from tedfx.ops.properties import properties
from tedfx.options import Options, parse_policy
from tedfx.passes.base import Pass, PassResult
from tedfx.stages.graphs import LocalGraph

# Operators of torch that choose (`Op.decides` of tedfx/ops/properties.py, which no tag says).
_DECISIONS = frozenset(
    "topk sort argsort msort kthvalue median mode argmax argmin multinomial unique unique_consecutive "
    "nonzero".split()
)


@dataclass(frozen=True)
class Checkpoint(Pass[LocalGraph]):
    """Annotates nodes that backward recomputes: `meta["region"]`, a number per region. The graph itself stays
    as it is.

    policy     "none"
               "comm"       maximal regions of local work inside a layer: no collective, no choice (top-k,
                            sort, routing) and no host copy is inside one, so recompute repeats none of them
               "budget=N"   those of comm's regions that have to be recomputed for the kept activations of a
                            rank to fit in N bytes (N may have a unit: 8GiB): the others, most recomputed
                            FLOPs per byte first, keep what they save
               "selective"  the cores of attentions
               "full"       each layer is a region, collectives and all: what recompute then repeats is
                            counted in its own phase
    batch, sequence   one rank's sizes, for bytes; those of the example inputs if not given.
    decide_again      full: whether choices (top-k, sort, routing) are in the regions as well. Eager recompute
                      runs the same kernels on the same values and chooses the same; compiled kernels are
                      fused otherwise in backward, round otherwise, and could choose experts that do not fit
                      what was exchanged. So with `compile=True` it is False; a layer is then two regions or
                      three, and keeps what goes from one to the next.

    1. A node has a label: its layer if it may be recomputed, else none. Outside of all layers nothing is
       recomputed.
    2. Its level is the largest number of times that a path to it changes the label. Levels never fall along a
       path, so nodes of equal label and level form regions that no path leaves and enters again, and regions
       do not wait for each other in a circle. What is made of parameters alone, for one use, has the level of
       that use.
    3. Regions are the connected parts of these. Under comm, one that would keep as much as it frees (a view,
       a bare sum) is dropped.
    """

    policy: str = Options.checkpoint
    batch: int | None = None
    sequence: int | None = None
    decide_again: bool = True

    provides: ClassVar[frozenset[str]] = frozenset({"regions"})

    def __post_init__(self):
        parse_policy(self.policy)

    def check_compiled(self, compiled: bool) -> None:
        if compiled and self.decide_again and self.policy == "full":
            raise ConfigError(
                "compile= and passes= with a Checkpoint('full') that decides again: compiled kernels could "
                "choose other experts in backward; make it by tedfx.default_passes(compile=True, ..)"
            )

    def __call__(self, program: LocalGraph) -> PassResult:
        kind, limit = parse_policy(self.policy)
        result = PassResult()
        if kind == "none":
            return result
        graph = program.graph_module.graph
        sizing = Sizing(self._values(program))
        regions = _candidates(program, kind, self.decide_again)
        result.matches = len(regions)
        ledger = Ledger(graph, regions, sizing)
        if kind in ("comm", "budget"):
            # Regions without savings go first: what they kept for their own sake then weighs on none of the
            # others.
            regions = _drop(ledger, regions)
        if kind == "budget":
            regions = _spend(ledger, regions, sizing, limit, self._sizes(program))
        for number, nodes in enumerate(regions):
            for node in nodes:
                REGION[node] = number
        result.changes = len(regions)
        result.notes.append(self._note(graph, ledger, regions, sizing, program))
        schedule(graph)
        if kind != "full":
            assert_no_recomputed_collectives(program)
        return result

    def _values(self, program: LocalGraph) -> dict:
        given = {"batch": self.batch, "sequence": self.sequence}
        values = {**program.plan.hints, **program.setting.example}
        return {
            **values,
            **{
                program.trace.sizes[name]: n
                for name, n in given.items()
                if n is not None and name in program.trace.sizes
            },
        }

    def _sizes(self, program: LocalGraph) -> str:
        values = self._values(program)
        return ", ".join(
            f"{name} = {int(values[symbol])}"
            for name, symbol in program.trace.sizes.items()
            if symbol in values
        )

    def _note(self, graph, ledger, regions, sizing, program: LocalGraph) -> str:
        work = sum(sizing.flops(n) for nodes in regions for n in repeated(nodes))
        everything = sum(sizing.flops(n) for n in graph.nodes)
        plain = Ledger(graph, [], sizing).total
        return (
            f"{self.policy}: {len(regions)} regions; at {self._sizes(program)} a rank keeps about "
            f"{format_bytes(ledger.total)} of activations "
            f"(none: {format_bytes(plain)}) and repeats {work / max(everything, 1):.0%} of the "
            "forward's FLOPs"
        )


def barrier(node: fx.Node, communicating: Iterable[str]) -> str:
    """Why a node must not run twice; "" for one that may. `communicating`: names of nodes that communicate in
    forward."""
    target, ours = node.target, properties(node.target)
    tags = target.tags if isinstance(target, torch._ops.OpOverload) else ()
    if node.name in communicating:
        return "communicates"
    if _decides(node):
        return "decides a routing or an order"
    if (
        (ours is not None and ours.waits)
        or torch.Tag.data_dependent_output in tags
        or torch.Tag.dynamic_output_shape in tags
    ):
        return "makes the host wait for the device"
    if torch.Tag.nondeterministic_seeded in tags and op_name(node) != "aten.scaled_dot_product_attention":
        return "draws from a generator"
    return ""


def _decides(node: fx.Node) -> bool:
    ours, name = properties(node.target), short_name(node)
    if ours is not None:
        return ours.decides
    return name in _DECISIONS or (name in ("max", "min") and isinstance(VAL.get(node), (tuple, list)))


def communicating_nodes(program: LocalGraph) -> set[str]:
    """Names of the nodes that run a collective in forward, as `tedfx/analysis/cost.py` counts them."""
    return {item.node for item in Cost(program).items if item.phase == "forward"}


def assert_no_recomputed_collectives(program: LocalGraph) -> None:
    """TedfxError, naming the node, where a region of the final graph holds a collective, a routing decision
    or a host copy."""
    communicating = communicating_nodes(program)
    for node in program.graph.nodes:
        if node in REGION and node.op == "call_function":
            why = barrier(node, communicating)
            if why:
                raise TedfxError(
                    f"{node.name} is recomputed in region {REGION[node]}, but it {why} ({user_line(node)})"
                )


def _candidates(program: LocalGraph, kind: str, decide_again: bool) -> list[list[fx.Node]]:
    graph = program.graph_module.graph
    communicating = communicating_nodes(program)
    if kind == "selective":
        return [
            nodes for nodes in attention_cores(graph) if not any(barrier(n, communicating) for n in nodes)
        ]
    output = next(iter(graph.find_nodes(op="output")))
    written = set(
        output.args[0][: len(program.trace.mutated_buffers)]
    )  # the new value of a buffer is made once, at no cost
    label = {}
    for node, layer in layers(graph).items():
        if short_name(node) == "getitem":
            label[node] = label.get(node.args[0])  # one of several results goes where they are made
        elif (
            layer
            and node not in written
            and (decide_again or not _decides(node) if kind == "full" else not barrier(node, communicating))
        ):
            label[node] = layer
    return [nodes for nodes in regions_of(graph, label) if any(saves(n) for n in nodes)]


def regions_of(graph: fx.Graph, label: Mapping[fx.Node, str | None]) -> list[list[fx.Node]]:
    """Convex, connected sets of nodes of one label, in the order of the graph; see `Checkpoint`."""
    level: dict[fx.Node, int] = {}
    alone: dict[
        fx.Node, None
    ] = {}  # made of placeholders for one user, such as a cast of a weight: they go where they are used
    for node in graph.nodes:
        level[node] = max(
            (level[i] + (label.get(i) != label.get(node)) for i in node.all_input_nodes), default=0
        )
        if (
            label.get(node) is not None
            and len(node.users) == 1
            and all(i.op == "placeholder" or i in alone for i in node.all_input_nodes)
        ):
            alone[node] = None
    for node in reversed(alone):
        (user,) = node.users
        level[node] = level[user] - (label.get(user) != label[node])

    parent: dict[fx.Node, fx.Node] = {}

    def find(node):
        while parent[node] is not node:
            parent[node] = node = parent[parent[node]]
        return node

    for node in graph.nodes:
        mine = label.get(node)
        parent[node] = node
        for source in node.all_input_nodes:
            if mine is not None and (label.get(source), level[source]) == (mine, level[node]):
                parent[find(source)] = find(node)
    regions: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if label.get(node) is not None:
            regions.setdefault(find(node), []).append(node)
    return list(regions.values())


def _drop(ledger: Ledger, regions: list[list[fx.Node]]) -> list[list[fx.Node]]:
    left = []
    for nodes in reversed(regions):
        if ledger.keep(nodes) > 0:
            ledger.recompute(nodes)
            left.append(nodes)
    return left[::-1]


def _spend(ledger: Ledger, regions, sizing: Sizing, limit: int, sizes: str) -> list[list[fx.Node]]:
    """Keep what the regions save, those first that spare most FLOPs per byte, as long as it fits; the regions
    that remain."""
    if ledger.total > limit:
        raise ConfigError(
            f"checkpoint='budget={limit}': at {sizes} a rank keeps at least "
            f"{int(-(-ledger.total // 1))} bytes ({format_bytes(ledger.total)}) "
            "of activations even when every region is recomputed (checkpoint='comm'): take a larger "
            "budget, fewer rows per rank, or checkpoint='full', which repeats "
            "collectives too"
        )
    worth = {}
    for at, nodes in enumerate(regions):
        worth[at] = sum(sizing.flops(n) for n in repeated(nodes)) / max(ledger.keep(nodes), 1.0)
        ledger.recompute(nodes)
    kept = set()
    for at in sorted(worth, key=lambda a: (-worth[a], a)):
        ledger.keep(regions[at])
        if ledger.total > limit:
            ledger.recompute(regions[at])
        else:
            kept.add(at)
    return [nodes for at, nodes in enumerate(regions) if at not in kept]


__all__ = ["Checkpoint", "assert_no_recomputed_collectives", "regions_of"]
