"""From an annotated graph to one that recomputes: each region a submodule run through
`torch.utils.checkpoint`.

The annotated graph stays what is printed and costed; what comes out of here is what runs. A region is called
where the earliest of its nodes stood, or later, when its operands are there: the order follows from the graph
alone, hence is the same on every rank.
"""

from __future__ import annotations

import heapq
import operator
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from tedfx._torch import checkpointed
from tedfx.errors import TedfxError, user_line
from tedfx.graph.facts import REGION
from tedfx.ops import context

Unit: TypeAlias = fx.Node | int
"""A node, or the number of a region."""


class Region(nn.Module):
    """Runs `body` and keeps its inputs only; backward runs it again.

    Draws are functions of a seed that is an input, so no generator's state is kept. Backward runs after the
    call's run-time context was left, on a thread of autograd's: the recompute enters it anew.
    """

    def __init__(self, body: fx.GraphModule):
        super().__init__()
        self.body = body

    def forward(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            # The body is traced once, here, where the context is known; what is recomputed is then the
            # compiler's graph.
            return checkpointed(self.body.forward, *inputs)
        return checkpointed(self._run, context.active(), *inputs)

    def _run(self, where: context.RankContext | None, *inputs: Any) -> Any:
        # `forward`, not the module: recompute ends early by an exception, and an fx module reads tracebacks
        # when it sees one.
        with context.use(where):
            return self.body.forward(*inputs)


def emit(flat: fx.GraphModule) -> fx.GraphModule:
    """The graph that runs: nodes of equal `meta["region"]` in one `Region`. The graph itself where there is
    none."""
    regions: dict[int, list[fx.Node]] = {}
    for node in flat.graph.nodes:
        if node in REGION:
            regions.setdefault(REGION[node], []).append(node)
    if not regions:
        return flat
    root, graph = nn.Module(), fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for unit in schedule(flat.graph):
        if isinstance(unit, int):
            _emit_region(root, graph, new, f"region_{unit}", regions[unit])
        else:
            new[unit] = graph.node_copy(unit, lambda n: new[n])
    graph.lint()
    return fx.GraphModule(root, graph)


def _emit_region(
    root: nn.Module, graph: fx.Graph, new: dict[fx.Node, fx.Node], name: str, nodes: list[fx.Node]
) -> None:
    """Add the region's body to `root`, a call of it to `graph`, and what it makes for others to `new`."""
    members = set(nodes)
    inputs = list(dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in members))
    outputs = [n for n in nodes if any(u not in members for u in n.users)]
    body = fx.Graph()
    local = {node: body.placeholder(node.name) for node in inputs}
    for node in nodes:
        local[node] = body.node_copy(node, lambda n: local[n])
    body.output(tuple(local[n] for n in outputs))
    root.add_module(name, Region(fx.GraphModule({}, body)))
    call = graph.create_node("call_module", name, tuple(new[i] for i in inputs))
    for index, node in enumerate(outputs):
        new[node] = graph.call_function(operator.getitem, (call, index))


def schedule(graph: fx.Graph) -> list[Unit]:
    """Nodes and region numbers in an order in which each follows what it needs: of those that are ready, the
    earliest of the flat graph.

    TedfxError where there is none: a path leaves a region and enters it again, by itself or through other
    regions.
    """
    position: dict[Unit, int] = {}
    unit_of: dict[fx.Node, Unit] = {}
    waits: dict[Unit, set[Unit]] = {}
    users: dict[Unit, list[Unit]] = {}
    for index, node in enumerate(graph.nodes):
        unit = unit_of[node] = REGION.get(node, node)
        position.setdefault(unit, index)
    for node, unit in unit_of.items():
        waits.setdefault(unit, set()).update(unit_of[i] for i in node.all_input_nodes)
    for unit, needed in waits.items():
        needed.discard(unit)
        for each in needed:
            users.setdefault(each, []).append(unit)
    units = {position[unit]: unit for unit in waits}
    ready = [position[unit] for unit, needed in waits.items() if not needed]
    heapq.heapify(ready)
    order: list[Unit] = []
    while ready:
        unit = units[heapq.heappop(ready)]
        order.append(unit)
        for user in users.get(unit, ()):
            waits[user].discard(unit)
            if not waits[user]:
                heapq.heappush(ready, position[user])
    if len(order) < len(waits):
        stuck = next(unit for unit, needed in waits.items() if needed and isinstance(unit, int))
        node = next(n for n in graph.nodes if REGION.get(n) == stuck)
        raise TedfxError(
            f"region {stuck} is not convex: a path leaves it and comes back ({node.name}, {user_line(node)})"
        )
    return order
