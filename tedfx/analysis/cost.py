"""What a local graph communicates: every collective of one step, by formula and by number.

Sizes are expressions in this rank's `batch` and `sequence` (`LocalSizes`); nothing here needs a process
group. For each node of the graph that communicates, forward and backward follow from the op and its adjoint
(`tedfx/analysis/sends.py`); backward counts only where a cotangent arrives: the value is differentiable and
the loss (without one, any output) depends on it. Recompute repeats the forward of checkpoint regions up to
their last saved tensor. The gradient boundary is counted from the types of the parameters, with the buckets
that `tedfx/runtime/gradients.py` fills.

Rows after routing are ragged: their number is only known at run time. They are counted as if the router
spread its choices evenly over the experts (`ragged=True` marks them), and dropped none; everything else is
exact, rows in slots (`tedfx/ops/slots.py`) too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from tedfx import ops
from tedfx.analysis.communication import (
    ALL_REDUCE,
    ALL_TO_ALL,
    PHASES,
    REDUCE_SCATTER,
    Communication,
    Redundancy,
    Size,
    Total,
)
from tedfx.analysis.layers import regions
from tedfx.analysis.local_names import LocalSizes
from tedfx.analysis.saved import repeated, saved, saves, viewed
from tedfx.analysis.sends import Counting, sent
from tedfx.graph.facts import DIFFERENTIABLE, IN_GRAPH, REGION, TYPE, VAL
from tedfx.placement.sizes import symbols_of
from tedfx.placement.types import I, P, R
from tedfx.state.layouts import placed_on_first


class Cost:
    """Every collective of one step of a compilation. `sizes` names its symbols."""

    def __init__(self, compilation: Any, sizes: LocalSizes | None = None):
        self.compilation, self.sizes = compilation, sizes or LocalSizes(compilation)
        self._numbers: dict[Any, int | float | None] = {}
        reached, counting = _reached(compilation), Counting(compilation.roles.mesh, self.sizes)
        self.items: list[Communication] = []
        for node in compilation.graph_module.graph.nodes:
            self.items += sent(node, counting, node in reached)
        self.items += self._recompute(reached)
        self.items += self._boundary()
        self.by_node: dict[str, list[Communication]] = {}
        for item in self.items:
            self.by_node.setdefault(item.node, []).append(item)

    # ---- sums ----------------------------------------------------------------------------------------------

    def totals(self, phases: Iterable[str] = PHASES, by_op: bool = True) -> list[Total]:
        """Sums by phase, axes and (unless `by_op` is false) collective, in the order of the mesh."""
        groups: dict[tuple, list[Communication]] = {}
        for item in self.items:
            if item.phase in phases:
                groups.setdefault((item.phase, item.axes, item.op if by_op else ""), []).append(item)
        names = self.compilation.roles.mesh.names
        order = sorted(groups, key=lambda k: (PHASES.index(k[0]), [names.index(a) for a in k[1]], k[2]))
        return [
            Total(
                phase,
                op,
                axes,
                group[0].ranks,
                len(group),
                _sum((i.payload, 1) for i in group),
                _sum((i.payload, i.factor) for i in group),
                any(i.ragged for i in group),
            )
            for (phase, axes, op), group in ((key, groups[key]) for key in order)
        ]

    def redundant(self) -> list[Redundancy]:
        """The lint of duplicate token dropping: rows that cross `axes` are replicated, or partial sums, on
        other axes."""
        mesh = self.compilation.roles.mesh
        nodes = {n.name: n for n in self.compilation.graph_module.graph.nodes}
        found: dict[tuple, list] = {}
        for item in self.items:
            if item.op == ALL_TO_ALL:
                type_ = TYPE[nodes[item.node]]
                copies = tuple(
                    a for a in mesh.wide(mesh.names) if a not in item.axes and type_[a] in (R, I, P)
                )
                if copies:
                    found.setdefault((item.axes, copies), []).append(
                        (item.payload, 1 - sympy.Rational(1, mesh.size(copies)))
                    )
        return [Redundancy(axes, copies, _sum(terms)) for (axes, copies), terms in found.items()]

    def number(self, expr: Size, values: Mapping[str, int]) -> int | float | None:
        """The value of a formula for sizes by name; None where a size is missing."""
        if isinstance(expr, int):
            return expr
        key = (expr, tuple(values.items()))
        if key not in self._numbers:
            value = sympy.sympify(expr).subs(
                {s: values[s.name] for s in symbols_of(expr) if s.name in values}
            )
            self._numbers[key] = (
                None if not value.is_number else int(value) if value.is_Integer else float(value)
            )
        return self._numbers[key]

    # ---- recompute -----------------------------------------------------------------------------------------

    def _recompute(self, reached: set[fx.Node]) -> list[Communication]:
        """The forward collectives of a region again, as far as its recompute runs; none where backward reads
        nothing of it."""
        again = {
            n.name
            for nodes in regions(self.compilation.graph_module.graph).values()
            if any(n in reached and saves(n) for n in nodes)
            for n in repeated(nodes)
        }
        again |= self._gathered_again(reached, again)
        return [
            replace(item, phase="recompute")
            for item in self.items
            if item.phase == "forward" and item.node in again
        ]

    def _gathered_again(self, reached: set[fx.Node], again: set[str]) -> set[str]:
        """Gathers of parameters outside of regions that recompute: backward repeats those of which it reads
        something."""
        graph = self.compilation.graph_module.graph
        if not graph.find_nodes(op="call_function", target=ops.gather_parameters):
            return set()
        read = {viewed(value) for node in graph.nodes if node in reached for value in saved(node)}
        return {
            n.name
            for n in graph.nodes
            if n.target is ops.gather_parameters
            and n.name not in again
            and any(whole in read for whole in n.users)
            and not self._in_work(n)
        }

    @staticmethod
    def _in_work(gather: fx.Node) -> bool:
        """Whether a gather stands in a recompute region with its users."""
        return gather in REGION and any(
            REGION.get(user) == REGION[gather] for whole in gather.users for user in whole.users
        )

    # ---- the gradient boundary -----------------------------------------------------------------------------

    def _boundary(self) -> list[Communication]:
        """One sum per bucket, and one of a flag per parameter (is its gradient there?) for each set of
        axes."""
        graph, mesh = self.compilation.graph_module.graph, self.compilation.roles.mesh
        position = {node: i for i, node in enumerate(graph.nodes)}
        parameters = [n for n in parameter_nodes(self.compilation) if n.name in self.compilation.trainable]
        parameters.sort(key=lambda n: min((position[u] for u in n.users), default=len(position)))
        options = self.compilation.options
        filling: dict[tuple, list[list[int]]] = {}  # [whole elements, elements that travel]
        flags: Counter = Counter()
        for node in reversed(parameters):
            axes = tuple(a for a in mesh.names if TYPE[node].get(a) == R)
            if not mesh.wide(axes) or any(IN_GRAPH.get(u) for u in node.users):
                continue
            flags[axes] += 1
            placed = placed_on_first(self.compilation, node, options.zero)
            dtype, elements = options.gradient_dtype or VAL[node].dtype, placed.whole.numel
            travels = elements if placed.cut is None else placed.cut.width * len(placed.cut.lengths)
            op = ALL_REDUCE if placed.cut is None else REDUCE_SCATTER
            buckets = filling.setdefault((axes, dtype, op), [[0, 0]])
            if buckets[-1][0] and (buckets[-1][0] + elements) * dtype.itemsize > options.bucket_bytes:
                buckets.append([0, 0])
            buckets[-1][0] += elements
            buckets[-1][1] += travels
        made = [
            Communication("(gradients)", op, axes, mesh.size(axes), "boundary", travels, dtype)
            for (axes, dtype, op), buckets in filling.items()
            for _, travels in buckets
        ]
        return made + [
            Communication("(gradient flags)", ALL_REDUCE, axes, mesh.size(axes), "boundary", n, torch.int32)
            for axes, n in flags.items()
        ]


def parameter_nodes(compilation) -> list[fx.Node]:
    """Placeholders that hold parameters, in order."""
    names = compilation.parameter_names
    return [
        n
        for n in compilation.graph_module.graph.find_nodes(op="placeholder")
        if n.name in names and n in TYPE
    ]


def _sum(terms: Iterable[tuple[Size, Size]]) -> Size:
    counts: Counter = Counter()
    for payload, factor in terms:
        counts[payload, factor] += 1
    total = sympy.expand(sympy.Add(*(payload * factor * n for (payload, factor), n in counts.items())))
    return int(total) if total.is_Integer else total


def _reached(compilation) -> set[fx.Node]:
    """Nodes at which a cotangent of the loss arrives; of every output, where none is called loss."""
    output = next(iter(compilation.graph_module.graph.find_nodes(op="output")))
    values = list(output.args[0])
    leaves_ = values[len(values) - len(compilation.setting.output_names) :]
    loss = [
        v for v, name in zip(leaves_, compilation.setting.output_names) if name == "loss" and v is not None
    ]
    todo = [v for v in (loss or leaves_) if isinstance(v, fx.Node) and DIFFERENTIABLE.get(v)]
    found = set(todo)
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in found and DIFFERENTIABLE.get(source):
                found.add(source)
                todo.append(source)
    return found
