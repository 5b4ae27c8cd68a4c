"""The graph as runs of nodes of one layer, and which of these runs are the same.

A **segment** is a run of nodes below one indexed module path (`model.layers.3`). Two are the same if they
differ in nothing but the index: ops and their arguments, how the nodes are connected, shapes, dtypes, types,
the user's lines, what they send in each phase, where they are recomputed, which parameters train. A fold
never hides a difference; what two calls of one op must differ in by nature (`_NAMES`) is none.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tedfx import ops
from tedfx.analysis.cost import Cost
from tedfx.analysis.layers import layer_of, layers, path_of
from tedfx.placement.types import format_type
from tedfx.report.words import full_line_of
from tedfx.trace.global_graph import Trace

# An argument that only names the call, as each call in a graph needs a name of its own: its position and its
# keyword. Within a segment the names are numbered in order.
_NAMES = {
    ops.gather_parameters: (3, "number"),
    ops.draw: (3, "site"),
    ops.dropout: (3, "site"),
    ops.multinomial: (4, "site"),
}


@dataclass
class Segment:
    """A run of nodes below one indexed module path, or between such runs (path "").

    members   the paths that it stands for, its own first
    like      the earlier segment that is the same
    """

    path: str
    nodes: list[fx.Node]
    parameters: list[fx.Node] = field(default_factory=list)
    members: list[str] = field(default_factory=list)
    like: Segment | None = None


def segments(trace: Trace, graph: fx.Graph, folded: Cost | None = None) -> list[Segment]:
    """The graph as segments, in order.

    trace    whose parameters and buffers the placeholders are
    folded   the costs of a local graph: segments that repeat an earlier one then point to it
    """
    found = _runs(graph)
    free = _give_parameters(found, graph, {*trace.parameters, *trace.buffers, *trace.stacked})
    for segment in found:
        segment.members = [segment.path]
    if folded is not None:
        known: dict[Hashable, Segment] = {}
        identity = _Identity(found, graph, folded)
        for i, segment in enumerate(found):
            if segment.path:
                first = known.setdefault(identity.of(i), segment)
                if first is not segment:
                    segment.like = first
                    first.members.append(segment.path)
    return [Segment("", free, members=[""]), *found] if free else found


def _runs(graph: fx.Graph) -> list[Segment]:
    found: list[Segment] = []
    for node, path in layers(graph).items():
        if not found or found[-1].path != path:
            found.append(Segment(path, []))
        found[-1].nodes.append(node)
    return found


def _give_parameters(found: list[Segment], graph: fx.Graph, names: set[str]) -> list[fx.Node]:
    """Parameters and buffers, in the order of use, to the one layer that uses them; the placeholders that are
    nobody's."""
    users: dict[fx.Node, list[Segment]] = {}
    for segment in found:
        for node in dict.fromkeys(i for n in segment.nodes for i in n.all_input_nodes):
            users.setdefault(node, []).append(segment)
    owned = set()
    for node, mine in users.items():
        if node.op == "placeholder" and node.name in names and len(mine) == 1 and mine[0].path:
            mine[0].parameters.append(node)
            owned.add(node)
    return [node for node in graph.find_nodes(op="placeholder") if node not in owned]


class _Identity:
    """`of(i)`: equal for segments that are the same."""

    def __init__(self, found: list[Segment], graph: fx.Graph, cost: Cost):
        self.found, self.cost = found, cost
        self.home = {node: i for i, segment in enumerate(found) for node in segment.nodes}
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.layers_before = [0]  # of the segments before each, how many are layers
        for segment in found:
            self.layers_before.append(self.layers_before[-1] + bool(segment.path))
        self.readers: dict[fx.Node, set[int]] = {}
        for node, i in self.home.items():
            for source in node.all_input_nodes:
                self.readers.setdefault(source, set()).add(i)
        self.name_users: dict[tuple, set[int]] = {}
        for node, i in self.home.items():
            if node.target in _NAMES:
                self.name_users.setdefault((node.target, _name_of(node)), set()).add(i)

    def of(self, i: int) -> Hashable:
        segment = self.found[i]
        inside: dict[fx.Node, int] = {
            node: at for at, node in enumerate([*segment.parameters, *segment.nodes])
        }
        outside = self._outside(i, inside)
        names: dict[Any, int] = {}
        regions: dict[int, int] = {}

        def reference(arg: Any) -> Hashable:
            if isinstance(arg, fx.Node):
                return inside[arg] if arg in inside else outside[arg]
            if isinstance(arg, (list, tuple)):
                return (type(arg).__name__, *map(reference, arg))
            if isinstance(arg, dict):
                return tuple((key, reference(value)) for key, value in arg.items())
            if isinstance(arg, slice):
                return ("slice", reference(arg.start), reference(arg.stop), reference(arg.step))
            return (type(arg).__name__, repr(arg))  # 1, 1.0 and True are equal, and not the same

        def called(node: fx.Node) -> Hashable:
            args, kwargs = node.args, dict(node.kwargs)
            name = _name_of(node) if node.target in _NAMES else None
            if name is not None and self.name_users[node.target, name] == {i}:
                position, keyword = _NAMES[node.target]  # type: ignore[index]
                own = ("named", names.setdefault((node.target, name), len(names)))
                args = tuple(own if at == position else arg for at, arg in enumerate(args))
                kwargs = {key: own if key == keyword else arg for key, arg in kwargs.items()}
            return (node.target, reference(args), reference(kwargs))

        return (
            starred(segment.path),
            tuple((self._looks(p), tuple(map(str, p.meta["val"].shape))) for p in segment.parameters),
            tuple(
                (
                    called(n),
                    self._looks(n),
                    self._sends(n),
                    path_of(n)[len(segment.path) :] if path_of(n).startswith(segment.path) else "",
                    full_line_of(n),
                    regions.setdefault(n.meta["region"], len(regions)) if "region" in n.meta else None,
                    any(user.op == "output" for user in n.users),
                )
                for n in segment.nodes
            ),
        )

    def _outside(self, i: int, inside: dict[fx.Node, int]) -> dict[fx.Node, Hashable]:
        """What a segment reads from outside, told without names: how many layers lie between, and which of
        several such values it is. So a layer that reads the one before is like the first, which reads the
        embedding, and one that reads further back is not. What is given or made outside of layers for several
        of them (a mask) is itself."""
        read: dict[int, list[fx.Node]] = {}
        found: dict[fx.Node, Hashable] = {}
        for node in dict.fromkeys(a for n in self.found[i].nodes for a in n.all_input_nodes):
            if node in inside:
                continue
            source = self.home.get(node, -1)
            if (source < 0 or not self.found[source].path) and len(self.readers[node]) > 1:
                found[node] = ("itself", node.name)
            else:
                read.setdefault(self.layers_before[i] - self.layers_before[source + 1], []).append(node)
        for between, nodes in read.items():
            for at, node in enumerate(sorted(nodes, key=self.order.__getitem__)):
                found[node] = (between, at, self._looks(node))
        return found

    def _looks(self, node: fx.Node) -> Hashable:
        """A value for itself: shape, dtype, type, whether it has a gradient, whether it is to be trained."""
        value = node.meta.get("val")
        return (
            value.dtype if isinstance(value, torch.Tensor) else None,
            tuple(node.meta.get("local_shape") or ()),
            format_type(node.meta.get("type"), node.meta.get("dims")),
            bool(node.meta.get("differentiable")),
            node.name in self.cost.compilation.trainable,
        )

    def _sends(self, node: fx.Node) -> Hashable:
        items = self.cost.by_node.get(node.name, ())
        return tuple((i.phase, i.op, i.axes, i.elements, i.dtype, i.ragged) for i in items)


def _name_of(node: fx.Node) -> Any:
    position, keyword = _NAMES[node.target]  # type: ignore[index]
    return node.args[position] if len(node.args) > position else node.kwargs.get(keyword)


def starred(path: str) -> str:
    """The first index of a path as `*`."""
    layer = layer_of(path)
    return path if not layer else layer.rpartition(".")[0] + ".*" + path[len(layer) :]
