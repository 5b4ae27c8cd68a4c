"""`explain`: what a rank holds, runs and sends, as text and as JSON.

The table lists the local graph, layer by layer. A **layer** is a run of nodes below the same indexed module
path (`model.layers.3`); layers whose paths differ only in the index and whose nodes are the same (ops, how
they are connected, shapes, types, lines) are shown once, with a count (`tedfx/analysis/layers.py`).
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import torch
from tabulate import tabulate
from torch import fx

from tedfx._version import __version__
from tedfx.analysis.cost import Cost, LocalSizes, format_bytes, format_formula, parameter_nodes
from tedfx.analysis.layers import layer_of as _layer_of
from tedfx.analysis.layers import layers
from tedfx.analysis.layers import path_of as _path
from tedfx.errors import user_line
from tedfx.placement.types import Shard, format_type
from tedfx.report import accumulation

SCHEMA = 1
WIDTH = 160
DEFAULT_SIZES = {"batch": 1, "sequence": 4096}

__all__ = ["Explanation", "explain"]


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
) -> "Explanation":
    """Explain a ParallelModule (its last signature) or a LocalGraph.

    rows             "layers": each distinct layer in full, of the rest only what communicates; "all": every
                     node.
    batch, sequence  one rank's sizes, for the numbers; 1 and 4096 (less where the model allows less) if not
                     given.
    fold             False: identical layers are not folded.
    timings          add the seconds of each pass, and of `stages` (name -> seconds) before them.
    micro_batches    add what accumulating so many costs, one after another and layer by layer
                     (`ParallelModule.layered`).
    """
    if rows not in ("layers", "all"):
        raise ValueError(f"rows={rows!r}: 'layers' or 'all'")
    options = dict(
        rows=rows,
        batch=batch,
        sequence=sequence,
        fold=fold,
        timings=timings,
        title=title,
        stages=dict(stages or {}),
        micro_batches=micro_batches,
    )
    if micro_batches is not None and micro_batches < 1:
        raise ValueError(f"micro_batches={micro_batches}: at least 1")
    if hasattr(source, "graph_module"):
        return Explanation(source, **options)
    return _of_module(source, options)


def default_values(
    compilation, batch: int | None = None, sequence: int | None = None, sizes: LocalSizes | None = None
) -> dict[str, int]:
    """One rank's sizes by name: those given, else as `default_size`."""
    given = {"batch": batch, "sequence": sequence}
    return {
        name.name: default_size(compilation.trace, symbol, name.name, given.get(name.name))
        for symbol, name in (sizes or LocalSizes(compilation)).names.items()
    }


def default_size(trace, symbol, name: str, given: int | None = None) -> int:
    """The size that a symbol of the inputs has by default: 4096 for a sequence, else 1, and less where the
    model allows less."""
    if given is not None:
        return int(given)
    high, default = trace.bounds.get(symbol, (1, None))[1], DEFAULT_SIZES.get(name, 1)
    return default if high is None else min(default, int(high))


class Explanation:
    """The text is `str(explanation)`; `to_json()` is the same as a dict of plain values."""

    def __init__(
        self,
        compilation,
        *,
        rows,
        batch,
        sequence,
        fold,
        timings,
        title,
        stages,
        micro_batches=None,
        signature="",
    ):
        self.compilation, self.options = compilation, dict(rows=rows, fold=fold, timings=timings)
        self.title, self.stages, self.signature = title, stages, signature or _signature(compilation)
        self.sizes = LocalSizes(compilation)
        self.values = default_values(compilation, batch, sequence, self.sizes)
        self.cost = Cost(compilation, self.sizes)
        self.segments = segments(compilation, self.sizes, fold)
        self.micro_batches = micro_batches
        self.schedules = (
            []
            if micro_batches is None
            else accumulation.schedules(compilation, self.cost, self.values, micro_batches)
        )

    def number(self, formula):
        return self.cost.number(formula, self.values)

    # ---- text ----------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        accumulated = accumulation.table(self.schedules, self.micro_batches) if self.schedules else ""
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

    def _head(self) -> str:
        c, mesh, data = self.compilation, self.compilation.roles.mesh, self._parameters()
        name = f"{self.title} on " if self.title else ""
        lines = [f"{name}mesh {mesh} ({mesh.world} rank{'s' * (mesh.world > 1)}); the graph of one rank"]
        lines.append("roles       " + _roles(c.roles))
        lines.append("signature   " + self.signature)
        lines.append("outputs     " + ", ".join(_fold_names(c.setting.output_names)))
        lines.append(
            "sizes       "
            + ", ".join(f"{k} = {v}" for k, v in self.values.items())
            + " per rank (numbers below are for these; see the formulas for others)"
        )
        total, local = data["total"], data["local"]
        share = f" ({local / total:.1%})" if total else ""
        lines.append(
            f"parameters  {_count(total)} in {data['tensors']} tensors; on a rank "
            f"{_count(local)}{share}, {format_bytes(data['local_bytes'])} of "
            f"{format_bytes(data['total_bytes'])}"
        )
        for group in data["groups"]:
            where = f"split over {', '.join(group['axes'])}" if group["axes"] else "whole"
            line = f"  {where:<22} {group['tensors']:>4} tensors, {_count(group['total'])}"
            if group["axes"]:
                line += f", {_count(group['local'])} on a rank"
            elif data["whole"]:
                shown = [
                    f"{w['name']} {w['shape']}" + (f" x{w['count']}" if w["count"] > 1 else "")
                    for w in data["whole"]
                ]
                line += ": " + ", ".join(shown)
            lines.append(line)
        return "\n".join(_wrap(line) for line in lines)

    def _table(self) -> str:
        everything = self.options["rows"] == "all" or not any(s.path for s in self.segments)
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

    def rows_of(self, segment: "Segment") -> list["Row"]:
        found = []
        for node in [*segment.parameters, *segment.nodes]:
            shape = self.sizes.shape(node)
            items = self.cost.by_node.get(node.name, ())
            name = self.state_name(node, segment.path)
            found.append(
                Row(
                    name,
                    op_of(node),
                    line_of(node),
                    "" if shape is None else "[" + ", ".join(str(s) for s in shape) + "]",
                    format_type(node.meta.get("type"), node.meta.get("dims")),
                    _describe([(i, self.number(i.payload)) for i in items]),
                    shape is not None
                    or (
                        node.op == "call_function"
                        and "nn_module_stack" in node.meta
                        and node.target is not operator.getitem
                    ),
                    node.op == "placeholder",
                    str(node.meta.get("region", "")),
                )
            )
        return found

    def state_name(self, node: fx.Node, path: str = "") -> str:
        return state_name(self.compilation.trace, node, path)

    def communication(self) -> str:
        """The table of collectives: by phase and axes, formulas and numbers."""
        listed = []
        for t in self.cost.totals():
            payload, wire = self.number(t.payload), self.number(t.wire)
            about = "~" if t.ragged else ""
            listed.append(
                [
                    t.phase,
                    ",".join(t.axes),
                    t.ranks,
                    t.op,
                    t.count,
                    about + format_formula(t.payload),
                    about + format_bytes(payload),
                    about + format_bytes(wire),
                ]
            )
        if not listed:
            return "communication: none"
        text = tabulated(
            listed,
            [
                "phase",
                "axes",
                "ranks",
                "collective",
                "count",
                "operand on this rank",
                "= bytes",
                "on the wire",
            ],
            [8, 4, 5, 22, 5, 40, 10, 10],
        )
        sums = [
            f"{t.phase} {','.join(t.axes)} {format_bytes(self.number(t.wire))}"
            for t in self.cost.totals(by_op=False)
        ]
        text += "\n" + _wrap("on the wire, per rank and step: " + "; ".join(sums))
        for lint in self.cost.redundant():
            amount = format_bytes(self.number(lint.payload) or 0)
            text += "\n" + _wrap(
                f"redundant: ~{amount} of a rank's all-to-alls over {','.join(lint.axes)}, since the "
                f"ranks over {','.join(lint.copies)} send the same rows; removed by "
                "drop_duplicate_tokens (dedup=True)"
            )
        if any(t.ragged for t in self.cost.totals()):
            text += (
                "\n~ rows after routing, counted as if every expert were chosen equally often; the "
                "run's own number differs with the routing"
            )
        return text

    def _passes(self) -> str:
        timed = self.options["timings"]
        listed = [
            [record.text, record.result.matches, record.result.changes]
            + ([f"{record.seconds:.2f}"] if timed else [])
            for record in self.compilation.history
        ]
        if timed:
            listed = [[name, "", "", f"{seconds:.2f}"] for name, seconds in self.stages.items()] + listed
            passes = sum(r.seconds for r in self.compilation.history)
            listed.append(["passes together", "", "", f"{passes:.2f}"])
        return tabulated(listed, ["pass", "matched", "changed"] + ["seconds"] * timed, [20, 8, 8, 8])

    def _notes(self) -> str:
        notes = self._all_notes()
        return (
            ""
            if not notes
            else "notes\n"
            + "\n".join(
                _wrap(f"  {where}: {note}" + (f" (x{n})" if n > 1 else ""))
                for (where, note), n in notes.items()
            )
        )

    def _all_notes(self) -> dict[tuple[str, str], int]:
        found: dict[tuple[str, str], int] = {}
        trace = self.compilation.trace
        told = [("fixed by the model", s) for s in trace.static] + [("trace", n) for n in trace.notes]
        told += [(record.name, note) for record in self.compilation.history for note in record.result.notes]
        for each in told:
            found[each] = found.get(each, 0) + 1
        return found

    # ---- numbers -------------------------------------------------------------------------------------------

    def _parameters(self) -> dict[str, Any]:
        """How many there are in all, on a rank, and split over what."""
        groups: dict[tuple, list] = {}
        for node in parameter_nodes(self.compilation):
            axes = tuple(a for a, p in node.meta["type"].items() if isinstance(p, Shard))
            groups.setdefault(axes, []).append(node)
        names = self.compilation.roles.mesh.names
        order = sorted(groups, key=lambda axes: (not axes, [names.index(a) for a in axes]))
        total = lambda nodes: sum(int(n.meta["val"].numel()) for n in nodes)
        local = lambda nodes: sum(int(self.sizes.elements(n)) for n in nodes)
        size = lambda nodes, count: sum(count([n]) * n.meta["val"].dtype.itemsize for n in nodes)
        nodes = [n for axes in order for n in groups[axes]]
        whole: dict[tuple, dict] = {}
        for node in groups.get((), ()):
            name, shape = _star(self.state_name(node)), [int(s) for s in node.meta["val"].shape]
            entry = whole.setdefault((name, tuple(shape)), {"name": name, "shape": shape, "count": 0})
            entry["count"] += 1
        largest = sorted(whole.values(), key=lambda w: -prod(w["shape"]) * w["count"])
        return {
            "tensors": len(nodes),
            "total": total(nodes),
            "local": local(nodes),
            "total_bytes": size(nodes, total),
            "local_bytes": size(nodes, local),
            "groups": [
                {
                    "axes": list(a),
                    "tensors": len(groups[a]),
                    "total": total(groups[a]),
                    "local": local(groups[a]),
                }
                for a in order
            ],
            "whole": largest[:8],
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values: what the text says, formulas as strings in the size names, bytes as numbers."""
        c, mesh = self.compilation, self.compilation.roles.mesh

        def communication(item):
            return {
                "collective": item.op,
                "axes": list(item.axes),
                "ranks": item.ranks,
                "phase": item.phase,
                "formula": str(item.payload),
                "bytes": self.number(item.payload),
                "expected": item.ragged,
            }

        def node(n, path):
            shape = self.sizes.shape(n)
            return {
                "name": n.name,
                "state": self.state_name(n) if n.op == "placeholder" else None,
                "op": op_of(n),
                "line": user_line(n) if n.meta.get("stack_trace") else None,
                "module": _path(n),
                "inputs": [i.name for i in n.all_input_nodes],
                "shape": None if shape is None else [s if isinstance(s, int) else str(s) for s in shape],
                "dtype": str(n.meta["val"].dtype).removeprefix("torch.")
                if isinstance(n.meta.get("val"), torch.Tensor)
                else None,
                "type": None
                if n.meta.get("type") is None
                else {a: _placement(n, p) for a, p in n.meta["type"].items()},
                "region": n.meta.get("region"),
                "communication": [communication(i) for i in self.cost.by_node.get(n.name, ())],
            }

        return {
            "schema": SCHEMA,
            "tedfx": __version__,
            "torch": torch.__version__,
            "title": self.title,
            "mesh": dict(zip(mesh.names, mesh.sizes)),
            "world": mesh.world,
            "roles": {role: list(getattr(c.roles, role)) for role in _ROLES},
            "signature": self.signature,
            "outputs": list(c.setting.output_names),
            "sizes": dict(self.values),
            "parameters": self._parameters(),
            "layers": [
                {
                    "path": s.path,
                    "count": len(s.members),
                    "members": s.members,
                    "nodes": [node(n, s.path) for n in [*s.parameters, *s.nodes]],
                }
                for s in self.segments
                if s.like is None
            ],
            "totals": [
                {
                    "phase": t.phase,
                    "collective": t.op,
                    "axes": list(t.axes),
                    "ranks": t.ranks,
                    "count": t.count,
                    "formula": str(t.payload),
                    "bytes": self.number(t.payload),
                    "wire_formula": str(t.wire),
                    "wire_bytes": self.number(t.wire),
                    "expected": t.ragged,
                }
                for t in self.cost.totals()
            ],
            "accumulation": {
                "micro_batches": self.micro_batches,
                "schedules": [asdict(s) for s in self.schedules],
            }
            if self.schedules
            else None,
            "redundant": [
                {
                    "axes": list(r.axes),
                    "copies": list(r.copies),
                    "formula": str(r.payload),
                    "bytes": self.number(r.payload),
                }
                for r in self.cost.redundant()
            ],
            "passes": [
                {
                    "name": r.name,
                    "text": r.text,
                    "matches": r.result.matches,
                    "changes": r.result.changes,
                    "notes": list(r.result.notes),
                    "seconds": r.seconds,
                }
                for r in c.history
            ],
            "stages": dict(self.stages),
            "notes": [
                {"from": where, "note": note, "count": n} for (where, note), n in self._all_notes().items()
            ],
        }

    def dumps(self, **options) -> str:
        return json.dumps(self.to_json(), **{"indent": 1, **options})


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


# ---- layers ------------------------------------------------------------------------------------------------


@dataclass
class Segment:
    """A run of nodes below one indexed module path, or between such runs (path ""). `like`: the earlier
    segment that is the same."""

    path: str
    nodes: list[fx.Node]
    parameters: list[fx.Node] = field(default_factory=list)
    members: list[str] = field(default_factory=list)
    like: "Segment | None" = None


def _star(name: str) -> str:
    """The first index of a path as `*`."""
    layer = _layer_of(name)
    return name if not layer else layer.rpartition(".")[0] + ".*" + name[len(layer) :]


def segments(compilation, sizes: LocalSizes | None, fold: bool = True) -> list[Segment]:
    """The graph as segments, in order; with `fold`, those that repeat an earlier one point to it."""
    graph = compilation.graph_module.graph
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    where = layers(graph)
    segments: list[Segment] = []
    for node in nodes:
        path = where[node]
        if not segments or segments[-1].path != path:
            segments.append(Segment(path, []))
        segments[-1].nodes.append(node)
    runs: dict[fx.Node, set[int]] = {}  # the segments that use a value
    for i, segment in enumerate(segments):
        for node in segment.nodes:
            for source in node.all_input_nodes:
                runs.setdefault(source, set()).add(i)
    shared = {node for node, users in runs.items() if len(users) > 1}
    owned: set[fx.Node] = set()
    known: dict[Any, Segment] = {}
    names = compilation.parameter_names | set(compilation.trace.buffers)
    for segment in segments:
        if segment.path:
            used = dict.fromkeys(
                i
                for n in segment.nodes
                for i in n.all_input_nodes
                if i.op == "placeholder" and i.name in names
            )
            segment.parameters = [p for p in used if p not in shared]
            owned.update(segment.parameters)
        segment.members = [segment.path]
        if segment.path and fold:
            first = known.setdefault(_fingerprint(segment, sizes, shared), segment)
            if first is not segment:
                segment.like = first
                first.members.append(segment.path)
    free = [n for n in graph.find_nodes(op="placeholder") if n not in owned]
    return [Segment("", free, members=[""]), *segments] if free else segments


def _fingerprint(segment: Segment, sizes: LocalSizes | None, shared: set[fx.Node]) -> tuple:
    """Equal for segments that differ in nothing but the index of their path. A value from outside that
    several segments use (a mask) is itself; of others (what the layer before made) shape and type count."""
    number = {node: i for i, node in enumerate([*segment.parameters, *segment.nodes])}

    def reference(arg):
        if isinstance(arg, fx.Node):
            return (
                number[arg]
                if arg in number
                else (
                    "outside",
                    arg.name if arg in shared and not _layer_of(_path(arg)) else _shape_and_type(arg, sizes),
                )
            )
        if isinstance(arg, (list, tuple)):
            return tuple(reference(a) for a in arg)
        return repr(arg) if isinstance(arg, (slice, float)) else arg

    return (
        _star(segment.path),
        *(_shape_and_type(p, sizes) for p in segment.parameters),
        *(
            (
                n.target,
                _path(n)[len(segment.path) :] if _path(n).startswith(segment.path) else "",
                line_of(n),
                "region" in n.meta,
                _shape_and_type(n, sizes),
                reference(n.args),
                tuple((k, reference(v)) for k, v in n.kwargs.items()),
            )
            for n in segment.nodes
        ),
    )


def _shape_and_type(node: fx.Node, sizes: LocalSizes | None) -> tuple:
    if sizes is None:
        value = node.meta.get("val")
        return tuple(str(s) for s in value.shape) if isinstance(value, torch.Tensor) else ()
    return (
        tuple(node.meta.get("local_shape") or ()),
        format_type(node.meta.get("type"), node.meta.get("dims")),
    )


# ---- a ParallelModule --------------------------------------------------------------------------------------


def _of_module(pm, options) -> "Explanation | Plain":
    """The last signature; before the first call, what is known without one."""
    last = getattr(pm, "_last", None)
    program = pm.programs.get(last) if last is not None else None
    if program is not None and program.compilation is not None:
        return Explanation(program.compilation, signature=str(last), **options)
    return Plain(pm, program, str(last) if program is not None else "")


class Plain:
    """What can be said of a ParallelModule without a compilation: mesh, roles, parameters."""

    def __init__(self, pm, program, signature):
        self.pm, self.program, self.signature = pm, program, signature

    def to_json(self) -> dict[str, Any]:
        mesh, roles = self.pm.device_mesh, getattr(self.pm, "roles", None)
        sizes = dict(zip(mesh.mesh_dim_names, mesh.mesh.shape))
        groups: dict[tuple, list] = {}
        for layout in self.pm.layouts:
            axes = tuple(a for a, _ in layout.shards if sizes[a] > 1)
            groups.setdefault(axes, []).append(layout)
        total = lambda layouts: sum(prod(layout.shape) for layout in layouts)
        local = lambda axes, layouts: total(layouts) // prod(sizes[a] for a in axes)
        return {
            "schema": SCHEMA,
            "tedfx": __version__,
            "mesh": sizes,
            "world": mesh.size(),
            "roles": {role: list(getattr(roles, role)) for role in _ROLES} if roles is not None else None,
            "compiled": self.program is not None,
            "signature": self.signature or None,
            "parameters": {
                "tensors": len(self.pm.layouts),
                "total": total(self.pm.layouts),
                "local": sum(local(axes, layouts) for axes, layouts in groups.items()),
                "groups": [
                    {"axes": list(a), "tensors": len(g), "total": total(g), "local": local(a, g)}
                    for a, g in groups.items()
                ],
            },
        }

    def __str__(self) -> str:
        data = self.to_json()
        mesh = ",".join(f"{a}={n}" for a, n in data["mesh"].items())
        lines = [f"ParallelModule on mesh {mesh} ({data['world']} ranks)"]
        if data["roles"]:
            lines.append(
                "roles       " + "  ".join(f"{r}={','.join(a)}" for r, a in data["roles"].items() if a)
            )
        p = data["parameters"]
        lines.append(
            f"parameters  {_count(p['total'])} in {p['tensors']} tensors; on a rank {_count(p['local'])}"
            + (f" ({p['local'] / p['total']:.1%})" if p["total"] else "")
        )
        for group in p["groups"]:
            where = f"split over {', '.join(group['axes'])}" if group["axes"] else "whole"
            lines.append(
                f"  {where:<22} {group['tensors']:>4} tensors, {_count(group['total'])}, "
                f"{_count(group['local'])} on a rank"
            )
        if self.program is None:
            lines.append(
                "not compiled yet: call the module once, then print(pm) shows the graph of this rank "
                "and what it communicates"
            )
        else:
            lines.append(
                f"signature   {self.signature}; {len(self.program.graph_module.graph.nodes)} nodes, "
                "compiled without a record to explain"
            )
        return "\n".join(_wrap(line) for line in lines)

    __repr__ = __str__

    def dumps(self, **options) -> str:
        return json.dumps(self.to_json(), **{"indent": 1, **options})


# ---- words -------------------------------------------------------------------------------------------------

_ROLES = ("batch", "tensor", "expert", "expert_tensor", "context", "stage")


def _roles(roles) -> str:
    return "  ".join(f"{role}={','.join(getattr(roles, role))}" for role in _ROLES if getattr(roles, role))


def _signature(compilation) -> str:
    trace = compilation.trace
    nodes = {n.name: n for n in compilation.graph_module.graph.find_nodes(op="placeholder")}
    words = []
    for name, path in trace.inputs.items():
        dtype = str(nodes[name].meta["val"].dtype).removeprefix("torch.") if name in nodes else "?"
        words.append(
            f"{path[0]}{''.join(f'[{p!r}]' for p in path[1:])}: "
            f"{dtype}[{nodes[name].meta['val'].dim() if name in nodes else '?'}]"
        )
    words += [
        f"{'.'.join(map(str, path))}={value!r}" for path, value in trace.values.items() if value is not None
    ]
    return f"forward({', '.join(words)}) {'train' if trace.training else 'eval'}"


def op_of(node: fx.Node) -> str:
    target = node.target
    if node.op == "placeholder":
        return ""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def state_name(trace, node: fx.Node, path: str = "") -> str:
    """The user's name of a parameter or buffer, without `path`; other nodes' own."""
    name = trace.parameters.get(node.name) or trace.buffers.get(node.name)
    if name is None and node.name in trace.stacked:
        from tedfx.state.layouts import stack_name

        name = stack_name(trace.stacked[node.name])
    return node.name if name is None else name.removeprefix(path + ".")


_LINES: dict[str, str] = {}


def line_of(node: fx.Node) -> str:
    """`file.py:12`, without the directory."""
    text = node.meta.get("stack_trace")
    if not text:
        return ""
    if text not in _LINES:
        if len(_LINES) > 20000:
            _LINES.clear()
        _LINES[text] = os.path.basename(user_line(node))
    return _LINES[text]


def _placement(node: fx.Node, placement) -> str:
    return format_type({"": placement}, node.meta.get("dims")).removeprefix(":")


def _describe(items) -> str:
    """`fwd all_reduce tp 8 MiB`; equal ones added up, equal ways written once."""
    sums: dict[tuple, list] = {}
    for item, value in items:
        entry = sums.setdefault((item.phase, item.op, item.axes, item.ragged), [0, 0])
        entry[0], entry[1] = entry[0] + 1, entry[1] + value
    words: dict[str, list[str]] = {}
    for (phase, op, axes, ragged), (n, value) in sums.items():
        text = f"{f'{n} ' if n > 1 else ''}{op} {','.join(axes)} {'~' if ragged else ''}{format_bytes(value)}"
        words.setdefault(text, []).append({"forward": "fwd", "recompute": "rec", "backward": "bwd"}[phase])
    return "; ".join(f"{'+'.join(phases)} {text}" for text, phases in words.items())


def _count(n: int) -> str:
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.3g} {unit}" if n / size < 100 else f"{n / size:.0f} {unit}"
    return str(n)


def _fold_names(names) -> list[str]:
    """router_logits[0], router_logits[1] -> router_logits[0..1]."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition("[")[0], []).append(name)
    return [g[0] if len(g) == 1 else f"{base}[0..{len(g) - 1}]" for base, g in groups.items()]


def _banner(segment: Segment) -> str:
    n = len(segment.members)
    if n == 1:
        return f"-- {segment.path}"
    index = [m.rpartition(".")[2] for m in segment.members]
    numbers, runs = [int(i) for i in index], []
    for i in numbers:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs[:6]) + (
        ", .." if len(runs) > 6 else ""
    )
    return f"-- {segment.path}  x{n}: layers {text}"


def _wrap(line: str) -> str:
    if len(line) <= WIDTH:
        return line
    import textwrap

    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return "\n".join(
        textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_long_words=True, break_on_hyphens=False)
    )


def tabulated(rows, headers, least) -> str:
    """Rows of equal length, or of one cell (a banner across the table). No line is wider than WIDTH: columns
    give way, from the first to the last and each down to its `least` width."""
    full = [[str(c) for c in r] for r in rows if len(r) > 1]
    if not full:
        return "\n".join(str(r[0]) for r in rows)
    need = [max(len(h), *(len(r[i]) for r in full)) for i, h in enumerate(headers)]
    over = sum(need) + 2 * (len(headers) - 1) - WIDTH
    for i, width in enumerate(least[: len(need)]):
        give = max(0, min(over, need[i] - max(width, len(headers[i]))))
        need[i], over = need[i] - give, over - give
    cut = lambda text, width: text if len(text) <= width else text[: width - 2] + ".."
    table = tabulate(
        [[cut(c, w) for c, w in zip(r, need)] for r in full],
        headers=headers,
        tablefmt="plain",
        disable_numparse=True,
    ).splitlines()
    body = iter(table[1:])
    return "\n".join([table[0].rstrip(), *(next(body).rstrip() if len(r) > 1 else str(r[0]) for r in rows)])
