"""Rows that the model sorts by expert become those of a dispatch; where it puts them back, a combine.

    order = ids.flatten().argsort()                                     sorted by expert
    rows = x[order // K]
    hidden = F.grouped_mm(rows, w1, offs=counts.cumsum(0))              every expert on its run,
    parts = [expert(run) for run in rows.split(counts.tolist())]        or one by one, in Python
    out = zeros.index_copy(0, order, torch.cat(parts)).view(N, K, H) * w[..., None]).sum(1)
    out = zeros.index_add(0, order // K, rows * w.flatten()[order, None])

Algorithm, in one walk over the graph (what its nodes are: tedfx/capture/sorted_rows.py):
1. A sorted value that meets an expert is dispatched: by token, or by assignment where it was computed from
   values of assignments (a score that is multiplied before the experts). Its rows stand as the model's do: by
   expert, and the order within an expert's run reaches no result.
2. A grouped product whose offsets are the ends of the experts' runs is a `grouped_linear`. The bodies of runs
   that Python cut (tedfx/frontends/runs.py) are walked in lock-step (tedfx/capture/bodies.py).
3. What follows must work on each row alone. A sorted weight that multiplies rows is carried to the end.
4. Rows that are put back at their assignments, or added at their tokens, are a `combine`; a weighted sum over
   the choices behind it is part of it.
5. Runs that are left are those of a loop, which adds expert by expert (capture_loops.py), or not understood.
   Sorted values without an expert stay the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tedfx.capture.chains import is_zero
from tedfx.capture.masks import facts
from tedfx.capture.routing import Fact, argument, name_of, shape_of
from tedfx.capture.sorted_bodies import RowsOf, SortedRows, refuse
from tedfx.capture.sorted_rows import Sorted, sorted_facts
from tedfx.capture.stacks import Stacks
from tedfx.errors import user_line
from tedfx.frontends import answers
from tedfx.graph import nodes
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import operand, overload
from tedfx.passes.base import Pass, PassResult
from tedfx.stages.graphs import GlobalGraph

__all__ = ["CaptureSorted"]

aten, ops = torch.ops.aten, torch.ops.tedfx
_GROUPED = ("_grouped_mm", "grouped_mm")


@dataclass(frozen=True)
class CaptureSorted(Pass[GlobalGraph]):
    """See the module's docstring."""

    requires: ClassVar[frozenset[str]] = frozenset({"functional"})
    provides: ClassVar[frozenset[str]] = frozenset({"sorted rows captured"})

    def __call__(self, program: GlobalGraph) -> PassResult:
        graph, trace = program.graph_module.graph, program.trace
        result = PassResult()
        if not any(name_of(n) in (*_GROUPED, "expert_run") for n in graph.nodes):
            return result
        known = facts(graph)
        stacks = Stacks(trace, program.trainable)
        walk = _Walk(graph, known, sorted_facts(graph, known), stacks)
        for node in list(graph.nodes):
            if node.op == "call_function" and not node._erased:
                walk.visit(node)
        answers.settle(trace, walk.captured)
        graph.eliminate_dead_code(lambda node: node.is_impure() and node.target is not aten.item.default)
        stacks.finish()
        result.matches = result.changes = len(walk.ends)
        result.notes += [f"rows sorted by expert, put back at {line}" for line in walk.ends]
        if stacks.made and answers.took_for_granted(trace):
            result.notes.append(answers.SKIPPED)
        return result


_ELEMENTS = ("gather", "scatter", "scatter_add")  # an index for each element
_SHAPES = ("sym_size", "empty_like", "zeros_like", "new_empty", "new_zeros", "new_full", "full_like")


class _Walk:
    """rows: what is known of the model's nodes that are rows of a dispatch. captured: nodes of experts."""

    def __init__(
        self, graph: fx.Graph, known: Mapping[fx.Node, Fact], found: dict[fx.Node, Sorted], stacks: Stacks
    ):
        self.graph, self.found = graph, found
        self.sorted = SortedRows(graph, known, found, stacks)
        self.rows = self.sorted.rows
        self.captured: list[fx.Node] = []
        self.ends: list[str] = []

    def visit(self, node: fx.Node) -> None:
        name = name_of(node)
        made: RowsOf | None = None
        with self.graph.inserting_before(node):
            if name in _GROUPED:
                made = self._grouped(node)
            elif node.target is ops.join_runs.default:
                made = self.sorted.joined(node)
            elif any(n in self.rows for n in node.all_input_nodes):
                if self._put_back(node, name):
                    return
                made = self._following(node)
        if made is None:
            return
        if made.node is not node:
            self.captured.append(node)
            node.replace_all_uses_with(made.node, delete_user_cb=lambda user: user is not made.node)
        self.rows[made.node] = made

    def _grouped(self, node: fx.Node) -> RowsOf | None:
        rows, weight = operand(node, 0), operand(node, 1)
        offsets = argument(node, "offs") if "offs" not in node.kwargs else node.kwargs["offs"]
        ends = self.found.get(offsets) if isinstance(offsets, fx.Node) else None
        of = self.rows.get(rows) or self.sorted.dispatched(rows, node)
        if of is None or ends is None or ends.kind != "ends" or ends.routing is not of.routing:
            return None
        if of.weight is not None or VAL[weight].dim() != 3 or shape_of(weight)[0] != of.routing.experts:
            return None
        return of.through(
            self.sorted.emit(ops.grouped_linear.default, (of.node, weight, of.counts, True), node)
        )

    def _following(self, node: fx.Node) -> RowsOf | None:
        """A node that works on each row of its operands alone; nothing, for one that asks for their
        shape, or cuts them."""
        if name_of(node) in _SHAPES or node.target is ops.expert_run.default:
            return None
        mine = [self.rows[n] for n in node.all_input_nodes if n in self.rows]
        of = mine[0]
        if any(other.dispatch is not of.dispatch for other in mine):
            raise refuse("rows of two dispatches meet", node, "compute an expert's rows from one value")
        weights = [n for n in node.all_input_nodes if n in self.found and self.found[n].kind == "sorted"]
        weighted = [other for other in mine if other.weight is not None]
        if weights:
            (weight,) = weights if len(weights) == 1 else [None]
            natural = self.sorted.weight(weight, node) if weight is not None else None
            if name_of(node) != "mul" or natural is None or weighted or len(mine) != 1:
                raise refuse(
                    "rows of experts meet sorted values", node, "multiply by the sorted weights, once, last"
                )
            return RowsOf(of.dispatch, of.routing, of.node, of.counts, of.order, natural, of.per_token)
        if weighted and name_of(node) not in ("to", "_to_copy", "type_as"):
            raise refuse("rows are computed on after they were weighed", node, "weigh an expert's rows last")
        if not self.sorted.by_row(node, [n for n in node.all_input_nodes if n in self.rows]):
            raise refuse(
                f"{node.target} may mix the rows of one expert with another's",
                node,
                "use operators that work on each row alone",
            )
        if not weighted:
            return of.through(node)
        made = self.sorted.emit(node.target, (of.node, *node.args[1:]), node, **node.kwargs)
        return of.through(made)

    # --- the end ---

    def _put_back(self, node: fx.Node, name: str) -> bool:
        base, index, value = self._placed(node, name)
        of, by = self.rows.get(value), self.found.get(index)
        if of is None or by is None or by.routing is not of.routing:
            return False
        if name in _ELEMENTS and (shape_of(index) != shape_of(value) or "reduce" in overload(node)):
            return False  # some of the columns alone
        full = shape_of(base)[:1] == shape_of(value)[:1]
        if by.kind == "order" and name in ("index_copy", "index_put", "scatter") and full:
            if name == "index_put" and argument(node, "accumulate"):
                return False
            self._replace(*self.sorted.at_assignments(of, node))
        elif (
            by.kind == "order"
            and name == "index_add"
            and full
            and is_zero(base)
            and argument(node, "alpha") == 1
        ):
            self._replace(*self.sorted.at_assignments(of, node))
        elif by.kind == "inverse" and name in ("index", "index_select", "gather"):
            self._replace(*self.sorted.at_assignments(of, node))
        elif by.kind == "tokens" and name in ("index_add", "scatter_add", "scatter_reduce", "index_put"):
            if name == "scatter_reduce" and not (
                argument(node, "reduce") == "sum" and argument(node, "include_self")
            ):
                return False
            if name == "index_put" and not argument(node, "accumulate"):
                return False
            if name == "index_add" and argument(node, "alpha") != 1:
                return False
            self._replace(node, self.sorted.at_tokens(of, base, node))
        else:
            return False
        self.captured.append(node)
        self.ends.append(user_line(node))
        return True

    def _placed(self, node: fx.Node, name: str) -> tuple[fx.Node, fx.Node, fx.Node]:
        """(what is written to, where, what) of a node that places or takes rows in dim 0; the node thrice
        for any other."""
        none = (node, node, node)
        if name in ("index_copy", "index_add", "scatter_add", "scatter", "scatter_reduce"):
            dim, value = argument(node, "dim"), node.args[3] if len(node.args) > 3 else None
            return (
                (operand(node, 0), operand(node, 2), value)
                if dim == 0 and isinstance(value, fx.Node)
                else none
            )
        if name == "index_put" and len(nodes.argument(node, 1)) == 1:
            return operand(node, 0), nodes.argument(node, 1)[0], operand(node, 2)
        if name == "index" and len(nodes.argument(node, 1)) == 1:
            return operand(node, 0), nodes.argument(node, 1)[0], operand(node, 0)
        if name in ("index_select", "gather") and argument(node, "dim") == 0:
            return operand(node, 0), operand(node, 2), operand(node, 0)
        return none

    def _replace(self, node: fx.Node, made: fx.Node) -> None:
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
