"""Whether the integers of a call are in the tables that look them up.

An integer input that reaches an embedding or a cross-entropy through views only has that table's size as its
range. The smallest and the largest are compared, which two small kernels find; on a device they are read with
the checksums (`tedfx/ranks/call_check.py`), at no copy of their own. Positions that follow from the sizes
alone are looked at once per size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from tedfx.errors import CallError, user_line
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import short_name
from tedfx.graph.signature import Path, show

aten = torch.ops.aten

# Operators whose result has only values of their operand, and constants that a pad writes: more than views.
_MOVES = frozenset(
    """
    view reshape flatten unflatten slice select narrow permute transpose t unsqueeze squeeze expand
    expand_as contiguous clone alias detach lift_fresh lift_fresh_copy pad constant_pad_nd to
    _to_copy type_as split split_with_sizes chunk unbind repeat roll flip movedim _unsafe_view
    view_as reshape_as split_with_sizes_copy broadcast_to index_select sym_size
    """.split()
)
_RANDOM = {
    aten.randint.default,
    aten.randint.low,
    aten.randperm.default,
    aten.rand.default,
    aten.randn.default,
}


@dataclass
class Range:
    """An integer input is at least `low` and at most `high`, or `ignored`, where `index` (a node of `graph`)
    looks it up.

    graph: from the inputs at `keys` to what is looked up. path: the input, None where the sizes alone decide.
    """

    path: Path | None
    low: int
    high: int
    ignored: int | None
    what: str
    where: str
    keys: list[Path]
    graph: fx.GraphModule = field(repr=False)

    def extremes(self, given: Mapping[Path, Tensor]) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value of the input, ignored ones apart; on its device."""
        assert self.path is not None, "of an input"
        values = given[self.path].detach()
        if self.ignored is not None:
            values = torch.where(values == self.ignored, self.low, values)
        low, high = values.aminmax()
        return low, high

    def check(self, given: Mapping[Path, Tensor]) -> None:
        """CallError where a value that is looked up is out of range. Reads the values: a copy to the host."""
        looked_up = self.graph(*(given[key] for key in self.keys)).detach().cpu()
        bad = (looked_up < self.low) | (looked_up > self.high)
        if self.ignored is not None:
            bad &= looked_up != self.ignored
        if not bad.any():
            return
        value = int(looked_up[bad][0])
        if self.path is None:
            raise CallError(
                f"the sizes of this call reach place {value} of {self.what}, whose places are "
                f"{self.low} to {self.high} | at {self.where} | shorter inputs, or a larger table"
            )
        at = (given[self.path].detach().cpu() == value).nonzero()
        place = f"[{', '.join(map(str, at[0].tolist()))}]" if len(at) else ""
        fine = f"{self.low} to {self.high}" + (
            "" if self.ignored is None else f", or {self.ignored} (ignored)"
        )
        raise CallError(
            f"{show(self.path)}{place} is {value}, out of range of {self.what}: {fine} | at "
            f"{self.where} | correct the data, or the model's size"
        )


def ranges(trace: Any) -> list[Range]:
    names = {**trace.parameters, **trace.buffers}
    found: dict[tuple, Range] = {}
    for node in trace.graph_module.graph.find_nodes(op="call_function", target=aten.embedding.default):
        table, index = node.args[:2]
        rows = VAL[table].shape[0]
        if isinstance(rows, int):
            name = f" ({names[table.name]})" if table.name in names else ""
            _add(found, trace, node, index, rows, None, f"the embedding table of {rows} rows{name}")
    for target in (aten.cross_entropy_loss.default, aten.nll_loss_nd.default, aten.nll_loss.default):
        for node in trace.graph_module.graph.find_nodes(op="call_function", target=target):
            scores, labels = node.args[:2]
            shape = VAL[scores].shape
            classes = shape[min(1, len(shape) - 1)]
            ignored = node.args[4] if len(node.args) > 4 else node.kwargs.get("ignore_index", -100)
            if isinstance(classes, int) and not VAL[labels].dtype.is_floating_point:
                _add(found, trace, node, labels, classes, ignored, f"the cross-entropy's {classes} classes")
    return list(found.values())


def _add(
    found: dict, trace: Any, node: fx.Node, index: fx.Node, size: int, ignored: int | None, what: str
) -> None:
    """The range of `index` at `node`, where it follows from one input by views, or from sizes."""
    before, stack = set(), [index]
    while stack:
        at = stack.pop()
        if at not in before:
            before.add(at)
            stack.extend(at.all_input_nodes)
    ancestors = [n for n in trace.graph_module.graph.nodes if n in before]
    leaves = [n for n in ancestors if n.op in ("placeholder", "get_attr")]
    if any(n.name not in trace.inputs for n in leaves):
        return
    sizes_of = {n for n in ancestors if n.op == "call_function" and short_name(n) == "sym_size"}
    data = [n for n in leaves if any(u in before and u not in sizes_of for u in n.users) or n is index]
    computed = [
        n for n in ancestors if n.op == "call_function" and isinstance(VAL.get(n), (Tensor, list, tuple))
    ]
    batch = trace.sizes.get("batch")
    if len(data) == 1 and all(short_name(n) in _MOVES or short_name(n) == "getitem" for n in computed):
        path = trace.inputs[data[0].name]
    elif not data and computed and not any(n.target in _RANDOM or _mentions(n, batch) for n in computed):
        path = None
    else:
        return
    key = (path, size, ignored, None if path is not None else node)
    if key not in found:
        found[key] = Range(
            path,
            0,
            size - 1,
            ignored,
            what,
            user_line(node),
            [trace.inputs[n.name] for n in leaves],
            _extracted(ancestors, index),
        )


def _mentions(node: fx.Node, batch: sympy.Symbol | None) -> bool:
    value = VAL.get(node)
    return (
        batch is not None
        and isinstance(value, Tensor)
        and any(isinstance(s, torch.SymInt) and batch in s.node.expr.free_symbols for s in value.shape)
    )


def _extracted(ancestors: list[fx.Node], index: fx.Node) -> fx.GraphModule:
    graph, new = fx.Graph(), {}
    for node in ancestors:
        new[node] = graph.node_copy(node, lambda n: new[n])
    graph.output(new[index])
    return fx.GraphModule({}, graph)
