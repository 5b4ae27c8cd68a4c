"""One layer of the model as its author wrote it and as a rank runs it: as text (`tedfx explain --before`) and
as a picture (`tedfx/report/picture.py`)."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from tedfx import ops
from tedfx.analysis.layers import layer_of, path_of
from tedfx.errors import ConfigError
from tedfx.graph.nodes import operand
from tedfx.report.explanation import Explanation, View
from tedfx.report.folding import segments
from tedfx.report.tables import tabulated
from tedfx.report.words import line_of, op_of, state_name

__all__ = ["Step", "Views", "before_after"]


@dataclass
class Step:
    """One node. `sends`: (axes, bytes of a rank's payload) of each of its collectives, forward and
    backward."""

    node: fx.Node
    call: str
    op: str
    line: str
    shape: str
    type: str = ""
    collective: str = ""
    sends: list[tuple[str, float]] = field(default_factory=list)


@dataclass
class Views:
    """The part of the model at `path`: the single-device graph's steps, and those of one rank of `mesh`."""

    path: str
    mesh: str
    before: list[Step]
    after: list[Step]

    def __str__(self) -> str:
        listed = [[s.call, s.line, s.shape] for s in self.before]
        parts = (
            [
                f"{self.path}, the single-device graph (global shapes)\n"
                + tabulated(listed, ["node", "line", "shape"], [60, 18, 28])
            ]
            if listed
            else []
        )
        listed = [[s.call, s.shape, s.type, s.collective] for s in self.after]
        parts.append(
            f"{self.path}, the graph of one rank of {self.mesh} (local shapes)\n"
            + tabulated(listed, ["node", "local shape", "type", "collective, bytes"], [48, 28, 24, 40])
        )
        return "\n\n".join(parts)

    def draw(self, path: str) -> None:
        """Write a picture of both (.svg, .png, .pdf). Needs matplotlib."""
        from tedfx.report.picture import draw

        draw(self.before, self.after, path, f"one rank of {self.mesh}")


def before_after(
    compilation, before=None, *, layer: str = "", batch: int | None = None, sequence: int | None = None
) -> Views:
    """Both views of a layer; the first from the trace `before` the passes, where it is given.

    layer: a module path, "model.layers.0" or a part of one such as "model.layers.0.mlp"; if not given, the
    first layer that routes tokens to experts, else the first. ConfigError where the model has no layers, or
    nothing belongs to the path.
    """
    report = Explanation(compilation, View(batch=batch, sequence=sequence, fold=False))
    candidates = [s for s in report.segments if s.path]
    if not candidates:
        raise ConfigError("no part of the model has an indexed module path, so there is no layer to show")
    routing = [s for s in candidates if any(n.target in (ops.route, ops.route_slots) for n in s.nodes)]
    path = layer or (routing or candidates)[0].path
    chosen = [
        (s, n, row)
        for s in candidates
        if s.path == layer_of(path)
        for n, row in zip([*s.parameters, *s.nodes], report.rows_of(s))
    ]
    inside: set[fx.Node] = set()
    for _, n, _ in chosen:
        if _below(path_of(n), path) or ("conversion" in n.meta and n.args[0] in inside):
            inside.add(n)
    if not inside:
        layers = list(dict.fromkeys(s.path for s in candidates))
        raise ConfigError(
            f"nothing in the graph belongs to {path!r}; layers: {', '.join(layers[:8])}"
            + (", .." if len(layers) > 8 else "")
        )
    short = {n: report.state_name(n, path) for s, _, _ in chosen for n in s.parameters}
    after = []
    for _, n, row in chosen:
        if n in inside and (row.typed or row.collective):
            sends = [
                (",".join(i.axes), report.number(i.payload) or 0) for i in report.cost.by_node.get(n.name, ())
            ]
            after.append(
                Step(n, _call(n, short), op_of(n), row.line, row.shape, row.type, row.collective, sends)
            )
    return Views(
        path,
        str(compilation.roles.mesh),
        [] if before is None else _global(before, path, report.sizes.names),
        after,
    )


def _global(trace, path: str, names: Mapping) -> list[Step]:
    renamed = {symbol: names.get(symbol, symbol) for symbol in trace.sizes.values()}
    found = []
    for segment in (s for s in segments(trace, trace.graph_module.graph) if s.path == layer_of(path)):
        short = {n: state_name(trace, n, path) for n in segment.parameters}
        for n in segment.nodes:
            value = n.meta.get("val")
            if _below(path_of(n), path) and isinstance(value, (torch.Tensor, tuple, list)):
                shape = [
                    str(s.node.expr.xreplace(renamed)) if isinstance(s, torch.SymInt) else str(s)
                    for s in getattr(value, "shape", ())
                ]
                found.append(
                    Step(
                        n,
                        _call(n, short),
                        op_of(n),
                        line_of(n),
                        f"[{', '.join(shape)}]" if isinstance(value, torch.Tensor) else "",
                    )
                )
    return found


def _below(path: str, root: str) -> bool:
    return path == root or path.startswith(root + ".")


def _call(node: fx.Node, short: Mapping[fx.Node, str]) -> str:
    """`linear_4 = linear(view_3, mlp.gate.weight)`."""
    if node.target is operator.getitem:
        return f"{node.name} = {operand(node, 0).name}[{node.args[1]}]"
    operands = [
        short.get(i, i.name)
        for i in node.all_input_nodes
        if not isinstance(i.meta.get("val"), (torch.SymInt, torch.SymFloat)) and not _is_size(i)
    ]
    return f"{node.name} = {op_of(node)}({', '.join(operands)})"


def _is_size(node: fx.Node) -> bool:
    """Arithmetic that the compiler added."""
    return node.op == "call_function" and "nn_module_stack" not in node.meta and "dims" not in node.meta
