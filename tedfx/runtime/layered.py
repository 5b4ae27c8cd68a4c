"""Layered gradient accumulation: all micro-batches of a layer before the next layer (arXiv 2106.02679).

The graph of a call becomes that of several calls: what depends on a call's inputs stands there once per
micro-batch, what is made of parameters alone stands there once. Its order is layer by layer. Autograd runs
backward in the reverse of the order in which forward ran, so backward is layer by layer as well, and a
parameter's gradient is complete, its bucket ready to be summed, as soon as its layer's last micro-batch is
done. So a step gathers each parameter once per direction (ZeRO-3) and sums each gradient once, and at ZeRO's
stages 2 and 3 no rank ever holds whole gradients of more than the layers whose buckets are under way. The
price is activations: those of all micro-batches are there when backward begins.

Nothing else has to know: regions that are computed again, dropout's draws (a seed per micro-batch), buffers
that forward writes to (a micro-batch reads what the one before it wrote) and compilation see a graph.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import fx

from tedfx.analysis.layers import layers
from tedfx.ops.gather import gather_parameters
from tedfx.runtime.program import Program


def interleave(program: Program, count: int, sum_dtype: torch.dtype | None = None) -> Program:
    """`program` for `count` micro-batches at once.

    Its inputs (the call's tensors, and the seed if there is one) and outputs follow each other micro-batch by
    micro-batch; new values of buffers stand first, as ever. sum_dtype: where a graph is to be compiled its
    gradients are summed inside of it, over the micro-batches; in this dtype where it is wider than the
    parameter's.
    """
    made = _Interleaving(program, count, sum_dtype)
    module = fx.GraphModule(program.graph_module, made.graph)
    return replace(
        program, graph_module=module, output_names=list(program.output_names) * count, compilation=None
    )


def turns(graph: fx.Graph) -> dict[fx.Node, int]:
    """Contiguous pieces of the graph's order: one begins where a layer does, and one where the last layer has
    ended."""
    where, found, at, current = layers(graph), {}, 0, ""
    last = max((i for i, node in enumerate(graph.nodes) if where.get(node)), default=-1)
    for i, node in enumerate(graph.nodes):
        layer = where.get(node)
        if (layer and layer != current) or i == last + 1:
            at, current = at + 1, layer or current
        found[node] = at
    return found


class _Interleaving:
    """What becomes of each node: `self.new[node, m]`, m None for what all micro-batches share."""

    def __init__(self, program: Program, count: int, sum_dtype: torch.dtype | None):
        self.count, self.sum_dtype = count, sum_dtype
        self.old, self.graph, self.new = program.graph_module.graph, fx.Graph(), {}
        self.wide: dict[fx.Node, fx.Node] = {}
        self.narrow: dict[tuple[fx.Node, int], fx.Node] = {}
        placeholders = self.old.find_nodes(op="placeholder")
        kept = len(program.parameters) + len(program.buffers) + len(program.constants)
        buffers = dict(zip(program.buffers, placeholders[len(program.parameters) :]))
        self.output = next(iter(self.old.find_nodes(op="output")))
        values = list(self.output.args[0])
        self.written = {
            buffers[name]: value for name, value in zip(program.mutated_buffers, values) if name in buffers
        }
        self.first_leaf = len(program.mutated_buffers)
        self.regions: dict[int, list[fx.Node]] = {}
        for node in self.old.nodes:
            if "region" in node.meta:
                self.regions.setdefault(node.meta["region"], []).append(node)
        # Backward of a compiled graph gathers a region's parameters once only if all micro-batches are in it.
        self.together = {
            number
            for number, nodes in self.regions.items()
            if any(n.target is gather_parameters and n.meta.get("in_graph") for n in nodes)
        }
        self.renumbered = {number: max(self.regions) + 1 + i * count for i, number in enumerate(self.regions)}
        self.apart = self._apart(placeholders[kept:])

        for node in placeholders[:kept]:
            self._copy(node, None)
        for m in range(count):
            for node in placeholders[kept:]:
                self._copy(node, m)
        for node, m in self._order():
            self._copy(node, m)
        self._output(values)
        self.graph.lint()

    def _apart(self, inputs: Iterable[fx.Node]) -> set[fx.Node]:
        """Nodes of which each micro-batch has its own."""
        apart, size = {*inputs, *self.written}, -1
        while len(apart) > size:
            size = len(apart)
            for node in self.old.nodes:
                if node.op not in ("placeholder", "output") and (
                    _draws(node) or _from_store(node) or any(i in apart for i in node.all_input_nodes)
                ):
                    apart.add(node)
            for number, nodes in self.regions.items():
                if number not in self.together and any(n in apart for n in nodes):
                    apart.update(nodes)
        return apart

    def _order(self) -> list[tuple[fx.Node, int | None]]:
        """Turn by turn, in each micro-batch by micro-batch, as far as operands allow: only a buffer
        that is written late and read early can ask for another order."""
        place, position = turns(self.old), {node: i for i, node in enumerate(self.old.nodes)}
        units = [
            (node, m)
            for node in self.old.nodes
            if node.op not in ("placeholder", "output")
            for m in (range(self.count) if node in self.apart else (None,))
        ]
        key = {
            unit: (place[unit[0]], -1 if unit[1] is None else unit[1], position[unit[0]]) for unit in units
        }
        waits, users = {}, {}
        for unit in units:
            needed = {self._source(i, unit[1]) for i in unit[0].all_input_nodes}
            waits[unit] = {n for n in needed if n in key}
            for each in waits[unit]:
                users.setdefault(each, []).append(unit)
        ready = [(key[unit], unit) for unit in units if not waits[unit]]
        heapq.heapify(ready)
        order = []
        while ready:
            _, unit = heapq.heappop(ready)
            order.append(unit)
            for user in users.get(unit, ()):
                waits[user].discard(unit)
                if not waits[user]:
                    heapq.heappush(ready, (key[user], user))
        return order

    def _source(self, node: fx.Node, m: int | None) -> tuple[fx.Node, int | None]:
        """Whose value micro-batch `m` reads for `node`."""
        if node not in self.apart:
            return node, None
        if node in self.written:  # the buffer itself for the first
            return (node, None) if not m else self._source(self.written[node], m - 1)
        return node, m

    def _value(self, node: fx.Node, m: int | None) -> fx.Node:
        source, whose = self._source(node, m)
        value = self.new[source, whose]
        return (
            self._widened(source, value, m)
            if whose is None and m is not None and self._is_narrow(source)
            else value
        )

    def _is_narrow(self, node: fx.Node) -> bool:
        """Whether gradients of a shared value would be summed over micro-batches in fewer bits than asked
        for."""
        value = node.meta.get("val")
        return (
            self.sum_dtype is not None
            and isinstance(value, torch.Tensor)
            and bool(node.meta.get("differentiable"))
            and value.dtype.itemsize < self.sum_dtype.itemsize
        )

    def _widened(self, node: fx.Node, value: fx.Node, m: int) -> fx.Node:
        """The value for one micro-batch by way of `sum_dtype`: the same value, and its adjoint is summed
        there."""
        if node not in self.wide:
            assert self.sum_dtype is not None  # _is_narrow asked
            self.wide[node] = self._cast(value, self.sum_dtype, node)
        if (node, m) not in self.narrow:
            self.narrow[node, m] = self._cast(self.wide[node], node.meta["val"].dtype, node)
        return self.narrow[node, m]

    def _cast(self, value: fx.Node, dtype: torch.dtype, like: fx.Node) -> fx.Node:
        cast = self.graph.call_function(torch.ops.aten.to.dtype, (value, dtype))
        cast.meta.update({k: v for k, v in like.meta.items() if k not in ("relation", "val", "conversion")})
        cast.meta["val"] = like.meta["val"].to(dtype)
        return cast

    def _copy(self, node: fx.Node, m: int | None) -> None:
        suffix = "" if m is None else f"_mb{m}"
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda i: self._value(i, m))
        target = f"{node.target}{suffix}" if node.op == "placeholder" else node.target
        made = self.new[node, m] = self.graph.create_node(
            node.op, target, args, kwargs, name=f"{node.name}{suffix}", type_expr=node.type
        )
        made.meta = dict(node.meta)
        if m is not None:
            made.meta["micro_batch"] = m
            if "region" in node.meta and node.meta["region"] not in self.together:
                made.meta["region"] = self.renumbered[node.meta["region"]] + m

    def _output(self, values: list) -> None:
        last = self.count - 1
        read = lambda value, m: self.new[self._source(value, m)] if isinstance(value, fx.Node) else value
        outputs = [read(value, last) for value in values[: self.first_leaf]]
        for m in range(self.count):
            outputs += [read(value, m) for value in values[self.first_leaf :]]
        self.graph.output(type(self.output.args[0])(outputs)).meta = dict(self.output.meta)


def _draws(node: fx.Node) -> bool:
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
    )


def _from_store(node: fx.Node) -> bool:
    """A gather that the call's store makes: each micro-batch asks for it, the store makes it once, and sums
    the gradients in the dtype that was asked for (`tedfx/runtime/gathers.py`)."""
    return node.target is gather_parameters and not node.meta.get("in_graph")
