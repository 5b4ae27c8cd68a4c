"""`explain`: what a rank holds, runs and sends, as text and as JSON.

The table lists the local graph, layer by layer; layers that are the same are shown once, with a count
(`tedfx/report/folding.py`).
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import fx

from tedfx.analysis.cost import Cost
from tedfx.analysis.local_names import LocalSizes
from tedfx.analysis.text import format_bytes, format_formula
from tedfx.options import bytes_of
from tedfx.placement.types import format_type
from tedfx.report import accumulation, holdings
from tedfx.report.as_json import as_json
from tedfx.report.folding import Segment, segments
from tedfx.report.tables import tabulated, wrap
from tedfx.report.uncompiled import Uncompiled
from tedfx.report.words import (
    communication_of,
    line_of,
    op_of,
    ranges_of,
    roles_of,
    shared_names,
    signature_of,
    state_name,
)
from tedfx.trace.global_graph import Trace

DEFAULT_SIZES = {"batch": 1, "sequence": 4096}

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class View:
    """What `explain` was asked to show; see there."""

    rows: str = "layers"
    batch: int | None = None
    sequence: int | None = None
    fold: bool = True
    timings: bool = False
    title: str = ""
    stages: Mapping[str, float] = field(default_factory=dict)
    micro_batches: int | None = None
    memory: int | None = None

    def __post_init__(self):
        if self.rows not in ("layers", "all"):
            raise ValueError(f"rows={self.rows!r}: 'layers' or 'all'")
        if self.micro_batches is not None and self.micro_batches < 1:
            raise ValueError(f"micro_batches={self.micro_batches}: at least 1")


def explain(
    source,
    *,
    rows: str = "layers",
    batch: int | None = None,
    sequence: int | None = None,
    fold: bool = True,
    timings: bool = False,
    title: str = "",
    stages: Mapping[str, float] | None = None,
    micro_batches: int | None = None,
    memory: int | str | None = None,
) -> Explanation | Uncompiled:
    """Explain a ParallelModule (its last signature) or a LocalGraph.

    rows             "layers": each distinct layer in full, of the rest only what communicates; "all": every
                     node.
    batch, sequence  one rank's sizes, for the numbers; 1 and 4096 (less where the model allows less) if not
                     given.
    fold             False: identical layers are not folded.
    timings          add the seconds of each pass, and of `stages` (name -> seconds) before them.
    micro_batches    add what accumulating so many costs, one after another and layer by layer
                     (`ParallelModule.layered`).
    memory           bytes that a rank has, or a text such as "80GiB": warn where it holds more.

    ValueError for `rows` and `micro_batches` that cannot be, ConfigError for a `memory` that is none.
    """
    limit = bytes_of("memory", memory) if isinstance(memory, str) else memory
    view = View(rows, batch, sequence, fold, timings, title, dict(stages or {}), micro_batches, limit)
    if hasattr(source, "graph_module"):
        return Explanation(source, view)
    last = source.last_signature
    program = source.programs.get(last) if last is not None else None
    if program is None or program.compilation is None:
        return Uncompiled(source, program, "" if program is None else str(last))
    return Explanation(program.compilation, view, str(last))


def default_values(
    compilation, batch: int | None = None, sequence: int | None = None, sizes: LocalSizes | None = None
) -> dict[str, int]:
    """One rank's sizes by name: those given, else as `default_size`."""
    given = {"batch": batch, "sequence": sequence}
    return {
        name.name: default_size(compilation.trace, symbol, name.name, given.get(name.name))
        for symbol, name in (sizes or LocalSizes(compilation)).names.items()
    }


def default_size(trace: Trace, symbol: sympy.Symbol, name: str, given: int | None = None) -> int:
    """The size that a symbol of the inputs has by default: 4096 for a sequence, else 1, and less where the
    model allows less."""
    if given is not None:
        return int(given)
    high, default = trace.bounds.get(symbol, (1, None))[1], DEFAULT_SIZES.get(name, 1)
    return default if high is None else min(default, int(high))


@dataclass
class Row:
    name: str
    op: str
    line: str
    shape: str
    type: str
    collective: str
    typed: bool  # a tensor or an op that makes some; not the arithmetic of sizes
    held: bool  # a parameter, buffer or input
    region: str  # the number of the checkpoint region that recomputes it

    @property
    def label(self) -> str:
        """The name, and the op where the name does not say it."""
        return (
            self.name
            if self.op in ("", self.name) or self.name.startswith(self.op + "_")
            else f"{self.name} ({self.op})"
        )


class Explanation:
    """The text is `str(explanation)`; `to_json()` is the same as a dict of plain values."""

    def __init__(self, compilation, view: View, signature: str = ""):
        self.compilation, self.view = compilation, view
        self.signature = signature or signature_of(compilation)
        self.sizes = LocalSizes(compilation)
        self.values = default_values(compilation, view.batch, view.sequence, self.sizes)
        self.cost = Cost(compilation, self.sizes)
        graph = compilation.graph_module.graph
        self.segments = segments(compilation.trace, graph, self.cost if view.fold else None)
        self.parameters = holdings.parameters(compilation, self.sizes)
        self.memory = holdings.memory(compilation, self.sizes, self.values)
        self.schedules = (
            []
            if view.micro_batches is None
            else accumulation.schedules(compilation, self.cost, self.values, view.micro_batches)
        )

    def number(self, formula) -> int | float | None:
        return self.cost.number(formula, self.values)

    def state_name(self, node: fx.Node, path: str = "") -> str:
        return state_name(self.compilation.trace, node, path)

    def to_json(self) -> dict[str, Any]:
        """Plain values: what the text says, formulas as strings in the size names, bytes as numbers."""
        return as_json(self)

    def dumps(self, **options) -> str:
        return json.dumps(self.to_json(), **{"indent": 1, **options})

    def __str__(self) -> str:
        accumulated = (
            accumulation.table(self.schedules, self.view.micro_batches) if self.view.micro_batches else ""
        )
        parts = [
            self._head(),
            self._table(),
            self.communication(),
            accumulated,
            self._passes(),
            self._notes(),
        ]
        return "\n\n".join(p for p in parts if p)

    __repr__ = __str__

    # ---- text ----------------------------------------------------------------------------------------------

    def _head(self) -> str:
        c, mesh = self.compilation, self.compilation.roles.mesh
        name = f"{self.view.title} on " if self.view.title else ""
        sizes = ", ".join(f"{k} = {v}" for k, v in self.values.items())
        lines = [
            f"{name}mesh {mesh} ({mesh.world} rank{'s' * (mesh.world > 1)}); the graph of one rank",
            f"roles       {roles_of(c.roles)}",
            f"signature   {self.signature}",
            f"outputs     {', '.join(shared_names(c.setting.output_names))}",
            f"sizes       {sizes} per rank (numbers below are for these; see the formulas for others)",
            *holdings.parameter_lines(self.parameters),
            *holdings.memory_lines(self.memory, self.view.memory),
        ]
        return "\n".join(map(wrap, lines))

    def _table(self) -> str:
        everything = self.view.rows == "all" or not any(s.path for s in self.segments)
        regions = any("region" in n.meta for s in self.segments for n in s.nodes)
        listed: list[list[str]] = []
        for segment in self.segments:
            if segment.like is not None:
                continue
            layer = segment.path != ""
            if layer:
                listed.append([_banner(segment)])
            hidden = 0
            for row in self.rows_of(segment):
                if everything or ((layer or row.held) and row.typed) or row.collective:
                    listed.append(
                        [row.label, row.line, row.shape, row.type, row.collective] + [row.region] * regions
                    )
                else:
                    hidden += row.typed
            if hidden and not layer:
                listed.append([f"({hidden} nodes that do not communicate)"])
        return tabulated(
            listed,
            ["node", "line", "local shape", "type", "collective, bytes"] + ["region"] * regions,
            [30, 18, 28, 24, 40, 6],
        )

    def rows_of(self, segment: Segment) -> list[Row]:
        return [self._row(node, segment.path) for node in [*segment.parameters, *segment.nodes]]

    def _row(self, node: fx.Node, path: str) -> Row:
        shape = self.sizes.shape(node)
        of_the_model = (
            node.op == "call_function"
            and "nn_module_stack" in node.meta
            and node.target is not operator.getitem
        )
        return Row(
            self.state_name(node, path),
            op_of(node),
            line_of(node),
            "" if shape is None else "[" + ", ".join(str(s) for s in shape) + "]",
            format_type(node.meta.get("type"), node.meta.get("dims")),
            communication_of((i, self.number(i.payload)) for i in self.cost.by_node.get(node.name, ())),
            shape is not None or of_the_model,
            node.op == "placeholder",
            str(node.meta.get("region", "")),
        )

    def communication(self) -> str:
        """The table of collectives: by phase and axes, formulas and numbers."""
        totals = self.cost.totals()
        if not totals:
            return "communication: none"
        listed = []
        for t in totals:
            about = "~" if t.ragged else ""
            bytes_, wire = (about + format_bytes(self.number(formula)) for formula in (t.payload, t.wire))
            formula = about + format_formula(t.payload)
            listed.append([t.phase, ",".join(t.axes), t.ranks, t.op, t.count, formula, bytes_, wire])
        headers = "phase,axes,ranks,collective,count,operand on this rank,= bytes,on the wire".split(",")
        text = tabulated(listed, headers, [8, 4, 5, 22, 5, 40, 10, 10])
        sums = [
            f"{t.phase} {','.join(t.axes)} {format_bytes(self.number(t.wire))}"
            for t in self.cost.totals(by_op=False)
        ]
        text += "\n" + wrap("on the wire, per rank and step: " + "; ".join(sums))
        for lint in self.cost.redundant():
            text += "\n" + wrap(
                f"redundant: ~{format_bytes(self.number(lint.payload))} of a rank's all-to-alls over "
                f"{','.join(lint.axes)}, since the ranks over {','.join(lint.copies)} send the same rows; "
                "removed by drop_duplicate_tokens (dedup=True)"
            )
        if any(t.ragged for t in totals):
            text += (
                "\n~ rows after routing, counted as if every expert were chosen equally often; the "
                "run's own number differs with the routing"
            )
        return text

    def _passes(self) -> str:
        timed, history = self.view.timings, self.compilation.history
        listed = [[r.text, r.result.matches, r.result.changes, f"{r.seconds:.2f}"] for r in history]
        if timed:
            stages = [[name, "", "", f"{seconds:.2f}"] for name, seconds in self.view.stages.items()]
            together = ["passes together", "", "", f"{sum(r.seconds for r in history):.2f}"]
            listed = [*stages, *listed, together]
        columns = 3 + timed
        return tabulated(
            [row[:columns] for row in listed],
            ["pass", "matched", "changed", "seconds"][:columns],
            [20, 8, 8, 8][:columns],
        )

    def _notes(self) -> str:
        notes = self.notes()
        if not notes:
            return ""
        lines = [
            wrap(f"  {where}: {note}" + (f" (x{n})" if n > 1 else "")) for (where, note), n in notes.items()
        ]
        return "\n".join(["notes", *lines])

    def notes(self) -> dict[tuple[str, str], int]:
        """(who says it, what) -> how often."""
        trace = self.compilation.trace
        told = [("fixed by the model", s) for s in trace.static] + [("trace", n) for n in trace.notes]
        told += [(record.name, note) for record in self.compilation.history for note in record.result.notes]
        found: dict[tuple[str, str], int] = {}
        for each in told:
            found[each] = found.get(each, 0) + 1
        return found


def _banner(segment: Segment) -> str:
    n = len(segment.members)
    if n == 1:
        return f"-- {segment.path}"
    return f"-- {segment.path}  x{n}: layers {ranges_of(int(m.rpartition('.')[2]) for m in segment.members)}"
