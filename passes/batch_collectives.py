"""Small collectives of one kind that do not wait for each other go in one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import NamedTuple

from torch import fx

from tedfx import ops
from tedfx.analysis.layers import layers
from tedfx.graph.emission import schedule
from tedfx.graph.emit import insert
from tedfx.graph.facts import DIFFERENTIABLE, LOCAL_SHAPE, RUNS, VAL, take_over
from tedfx.graph.nodes import argument, function
from tedfx.passes.base import Pass, PassResult
from tedfx.placement.sizes import Size
from tedfx.stages.graphs import LocalGraph


class Kind(NamedTuple):
    """What the pass has to know of an op; its batched form is in `ops.BATCHED`."""

    axes: Callable[[fx.Node], tuple]
    operand: Callable[[fx.Node], Sequence[Size]]  # the local shape of what a node hands to the collective
    arguments: Callable[[list[fx.Node]], tuple]  # of the batched op, behind values and axes
    may: Callable[[fx.Node], bool] = lambda node: True


def _totals(node: fx.Node) -> tuple:
    shape, dim = LOCAL_SHAPE[node], argument(node, 1)
    return (*shape[:dim], RUNS[node], *shape[dim + 1 :])


KINDS = {
    ops.all_reduce: Kind(lambda n: argument(n, 1), lambda n: LOCAL_SHAPE[n], lambda nodes: ()),
    ops.cumsum: Kind(
        lambda n: argument(n, 2),
        _totals,
        lambda nodes: ([n.args[1] for n in nodes], [n.args[3] for n in nodes], VAL[nodes[0]].dtype),
        may=lambda n: not VAL[n].dtype.is_floating_point and not VAL[n].dtype.is_complex,
    ),
}


@dataclass(frozen=True)
class BatchCollectives(Pass[LocalGraph]):
    """The row "batch" of the collective algebra: all-reduces of one layer over the same axes and of one dtype
    become one, of their operands laid end to end. So do prefix sums of integers, of which the totals are
    exchanged; those with gradients stay as they are (`ops.cumsum_batched` has no backward).

    limit   bytes of an operand up to which a collective costs its start-up and little else. An operand that
            grows with the batch is never small.

    1. In the order of the graph each small collective joins the first group (op, axes, dtype, layer) of which
       it needs no member, directly or through others.
    2. A group of two or more becomes the op's batched form (`ops.BATCHED`). It stands where its last member
       stood; what needs an earlier member moves behind it.
    """

    limit: int = 65536

    def __call__(self, program: LocalGraph) -> PassResult:
        graph, result = program.graph_module.graph, PassResult()
        if "batch" not in program.plan.algebra:
            return result
        layer = layers(graph)
        small = [n for n in graph.nodes if n.target in KINDS and KINDS[n.target].may(n) and self._small(n)]
        result.matches = len(small)
        keys: dict[tuple, list[fx.Node]] = {}
        for node in small:
            keys.setdefault(
                (node.target, KINDS[node.target].axes(node), VAL[node].dtype, layer[node]), []
            ).append(node)
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
        shape = KINDS[node.target].operand(node)
        return all(isinstance(s, int) for s in shape) and prod(shape) * VAL[node].dtype.itemsize <= self.limit


def _independent(nodes: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The first node and those of the others of which none needs another, and the rest. Asked anew after each
    merge, which makes new paths."""
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
    last, kind = nodes[-1], KINDS[nodes[0].target]
    with graph.inserting_after(last):
        batched = insert(
            graph,
            ops.BATCHED[function(last)],
            [n.args[0] for n in nodes],
            kind.axes(last),
            *kind.arguments(nodes),
            like=last,
        )
    DIFFERENTIABLE[batched] = any(DIFFERENTIABLE.get(n) for n in nodes)
    after = batched
    for index, node in enumerate(nodes):
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (batched, index))
        take_over(node, after)
        node.replace_all_uses_with(after)
        graph.erase_node(node)


def _sort(graph: fx.Graph) -> None:
    """Each node behind what it needs; where there is a choice, as before."""
    for before, node in pairwise(schedule(graph)):
        assert isinstance(before, fx.Node) and isinstance(node, fx.Node)  # `checkpoint` draws regions, later
        before.append(node)
