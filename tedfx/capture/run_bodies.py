"""What experts compute on rows that stand in runs, one run per expert: grouped products.

    hidden = F.grouped_mm(rows, w1, offs=ends)

Rows between the runs, as those that fill a run up to a multiple, reach no token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from tedfx.capture.batched import Batched
from tedfx.capture.routing import Dims, argument, known_of, shape_of
from tedfx.capture.scattered import refuse
from tedfx.capture.slot_bodies import SlotBodies
from tedfx.capture.slot_runs import ends_of
from tedfx.capture.slots import Counts, SlotFact
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import operand

__all__ = ["GROUPED", "RunBodies"]

GROUPED = ("_grouped_mm", "grouped_mm")


class RunBodies(SlotBodies):
    """`runs`: the part of which the runs are as long (slot_runs.py)."""

    def __init__(self, known: Mapping[fx.Node, SlotFact], runs: tuple[Any, ...], *args: Any):
        super().__init__(*args)
        self.facts, self.runs = known, runs

    def _entry(self, node: fx.Node, name: str) -> tuple[Batched, Dims] | None:
        if name not in GROUPED:
            return super()._entry(node, name)
        rows, weight = operand(node, 0), operand(node, 1)
        given = node.kwargs["offs"] if "offs" in node.kwargs else argument(node, "offs")
        ends = known_of(self.facts, given)
        if not isinstance(ends, Counts) or ends.routing is not self.routing or ends_of(ends) != self.runs:
            raise refuse(
                "nothing proves that a grouped product cuts the rows where the experts' runs end",
                node,
                "count both from one number of rows: ends = padded.cumsum(0), starts = ends - padded",
            )
        if VAL[weight].dim() != 3 or shape_of(weight)[0] != self.experts or weight in self.inside:
            return None
        if rows not in self.inside or any(node.kwargs.get(x) is not None for x in ("bias", "out_dtype")):
            return None
        value = self.value(rows)
        if value.kind != "rows" or (value.right, value.span, value.start) != (1, 1, 0):
            return None
        made = self.grouped(value.node, weight, True, node)
        return Batched("rows", made, node, right=1, span=1), self.labels[rows]
