"""Small sums that do not wait for each other go in one collective."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import ClassVar

from tedfx.emission import schedule
from tedfx.layers import layers
from tedfx.passes.base import Pass, PassResult
from torch import fx

from tedfx import ops


@dataclass(frozen=True)
class BatchCollectives(Pass):
    """The row "batch" of the collective algebra: all-reduces of one layer over the same axes and of one dtype become one, of their operands laid end to end.

    limit   bytes of an operand up to which a collective costs its start-up and little else. An operand that grows with the batch is never small.

    1. In the order of the graph each small all-reduce joins the first group (axes, dtype, layer) of which it needs no member, directly or through others.
    2. A group of two or more becomes `all_reduce_batched`. It stands where its last member stood; what needs an earlier member moves behind it.
    """

    limit: int = 65536

    requires: ClassVar[frozenset[str]] = frozenset({"local"})

    def __call__(self, program) -> PassResult:
        graph, result = program.graph_module.graph, PassResult()
        if "batch" not in program.plan.algebra:
            return result
        layer = layers(graph)
        small = [n for n in graph.nodes if n.target is ops.all_reduce and self._small(n)]
        result.matches = len(small)
        keys: dict[tuple, list[fx.Node]] = {}
        for node in small:
            keys.setdefault((node.args[1], node.meta["val"].dtype, layer[node]), []).append(node)
        for nodes in keys.values():
            while nodes:
                group, nodes = _independent(nodes)
                if len(group) > 1:
                    _merge(graph, group)
                    result.changes += len(group)
        if result.changes:
            _sort(graph)
        return result

    def _small(self, node: fx.Node) -> bool:
        shape = node.meta["local_shape"]
        return all(isinstance(s, int) for s in shape) and prod(shape) * node.meta["val"].dtype.itemsize <= self.limit


def _independent(nodes: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The first node and those of the others of which none needs another, and the rest. Asked anew after each merge, which makes new paths."""
    group, behind, rest = [nodes[0]], _followers(nodes[0]), []
    for node in nodes[1:]:
        after = _followers(node)
        if node in behind or any(n in after for n in group):
            rest.append(node)
        else:
            group.append(node)
            behind |= after
    return group, rest


def _followers(node: fx.Node) -> set[fx.Node]:
    found, todo = set(), [node]
    while todo:
        for user in todo.pop().users:
            if user not in found:
                found.add(user)
                todo.append(user)
    return found


def _merge(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    last, axes = nodes[-1], nodes[0].args[1]
    with graph.inserting_after(last):
        batched = graph.call_function(ops.all_reduce_batched, ([n.args[0] for n in nodes], axes))
    batched.meta.update({k: last.meta[k] for k in ("stack_trace", "nn_module_stack") if k in last.meta})
    batched.meta["differentiable"] = any(n.meta.get("differentiable") for n in nodes)
    after = batched
    for index, node in enumerate(nodes):
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (batched, index))
        after.meta.update(node.meta)
        node.replace_all_uses_with(after)
        graph.erase_node(node)


def _sort(graph: fx.Graph) -> None:
    """Each node behind what it needs; where there is a choice, as before."""
    order = schedule(graph)
    for before, node in pairwise(order):
        before.append(node)
