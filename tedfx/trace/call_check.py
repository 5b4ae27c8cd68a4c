"""Whether a call fits what was traced: its sizes, and the integers that it looks up. What a rank can see
alone, before anything runs.

Sizes: a dim that the trace left free may be anything within its bounds, equal symbols have equal sizes, every
other dim is as traced. The batch of a call is a rank's part of the global one; bounds and conditions are
about the global batch. Sizes that were found to fit are remembered, so a call costs a look-up.

Values: an integer input that reaches an embedding or a cross-entropy through views only has that table's size
as its range. The smallest and the largest are compared, which two small kernels find; on a device they are
read with the checksums (`tedfx/ranks/checks.py`), at no copy of their own. Positions that follow from the
sizes alone are looked at once per size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from tedfx.errors import CallError, user_line
from tedfx.graph.signature import Path, show
from tedfx.ranks.checks import checksums

__all__ = ["CallRules", "Range", "SizeCheck"]

aten = torch.ops.aten
REMEDY = "pass inputs of these sizes as example_inputs of parallelize"

# Operators whose result has only values of their operand, and constants that a pad writes.
_VIEWS = {
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "slice",
    "select",
    "narrow",
    "permute",
    "transpose",
    "t",
    "unsqueeze",
    "squeeze",
    "expand",
    "expand_as",
    "contiguous",
    "clone",
    "alias",
    "detach",
    "lift_fresh",
    "lift_fresh_copy",
    "pad",
    "constant_pad_nd",
    "to",
    "_to_copy",
    "type_as",
    "split",
    "split_with_sizes",
    "chunk",
    "unbind",
    "repeat",
    "roll",
    "flip",
    "movedim",
    "_unsafe_view",
    "view_as",
    "reshape_as",
    "split_with_sizes_copy",
    "broadcast_to",
    "index_select",
    "sym_size",
}


def _expression(size: Any) -> sympy.Basic:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


class SizeCheck:
    """`check(tensors by path)` raises CallError for sizes that the trace does not hold for. ranks: how many
    have a part of the global batch each."""

    def __init__(self, trace, ranks: int = 1):
        placeholders = {n.name: n for n in trace.graph_module.graph.find_nodes(op="placeholder")}
        self.inputs = {
            path: [_expression(s) for s in placeholders[name].meta["val"].shape]
            for name, path in trace.inputs.items()
        }
        self.bounds, self.conditions, self.ranks = trace.bounds, trace.conditions, ranks
        self.batch, self.names = (
            trace.sizes.get("batch"),
            {symbol: name for name, symbol in trace.sizes.items()},
        )
        self.rows = trace.extents.get(
            "batch"
        )  # the batch itself: its symbol, or 2*s where only even ones will do
        self._fine: set[tuple] = set()

    @property
    def batch_inputs(self) -> frozenset[Path]:
        """The inputs whose dim 0 is the batch; others are the same on every rank."""
        return frozenset(
            path
            for path, dims in self.inputs.items()
            if dims and self.rows is not None and dims[0] == self.rows
        )

    def __call__(self, given: Mapping[Path, Tensor]) -> None:
        shapes = tuple(given[path].shape for path in self.inputs)
        if shapes not in self._fine:
            self._check(given)
            self._fine.add(shapes)

    def _check(self, given: Mapping[Path, Tensor]) -> None:
        found: dict[
            sympy.Symbol, tuple[int, str]
        ] = {}  # symbol -> (its value over all ranks, where it was found)
        for path, dims in self.inputs.items():
            shape = given[path].shape
            if len(dims) != len(shape):
                raise CallError(f"{show(path)} was traced with {len(dims)} dims and has {len(shape)}")
            for dim, (expr, here) in enumerate(zip(dims, shape)):
                where = f"dim {dim} of {show(path)}"
                whole = here * self.ranks if self.batch in expr.free_symbols else here
                said = f"{here} on each of {self.ranks} ranks, {whole} in all" if whole != here else str(here)
                unknown = [s for s in expr.free_symbols if s not in found]
                if len(unknown) == 1:
                    known = expr.subs({s: size for s, (size, _) in found.items()})
                    size = self._solve(known, unknown[0], whole, f"{where} is {said}")
                    found[unknown[0]] = (size, f"dim {dim} of {show(path)}")
                    self._bounded(unknown[0], size, known, f"{where} is {said}")
                elif not unknown:
                    expected = int(expr.subs({s: size for s, (size, _) in found.items()}))
                    if expected != whole:
                        mine = expected // self.ranks if whole != here else expected
                        raise CallError(f"{where} is {here}; expected {mine}{self._why(expr, found)}")
        sizes = {s: size for s, (size, _) in found.items()}
        for condition in self.conditions:
            if condition.subs(sizes) == sympy.false:
                said = ", ".join(f"{name} = {sizes[s]}" for s, name in self.names.items() if s in sizes)
                over = " over all ranks" if self.ranks > 1 else ""
                raise CallError(f"the model only accepts sizes with {condition}; the call has {said}{over}")

    def _bounded(self, symbol: sympy.Symbol, size: int, expr, what: str) -> None:
        low, high = self.bounds.get(symbol, (1, None))
        if size < low or (high is not None and size > high):
            least, most = expr.subs(symbol, low), "any" if high is None else expr.subs(symbol, high)
            raise CallError(f"{what}; the model was traced for {least} to {most}")

    def _solve(self, expr, symbol, whole: int, what: str) -> int:
        """The symbol's value for which `expr` is `whole`."""
        if expr == symbol:
            return whole
        roots = [r for r in sympy.solve(expr - whole, symbol) if r.is_Integer and r > 0]
        if not roots:
            raise CallError(f"{what}; the model only accepts {expr} there, with a whole number {symbol}")
        return int(roots[0])

    def _why(self, expr, found) -> str:
        if expr.is_Symbol:
            return f", as {found[expr][1]}"
        if expr.free_symbols:
            return f", which is {expr}"
        return f", the size that was traced: the model's code fixes it, or the example had no other; {REMEDY}"


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
        values = given[self.path].detach()
        return (
            values if self.ignored is None else torch.where(values == self.ignored, self.low, values)
        ).aminmax()

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


class CallRules:
    """What a call must satisfy by itself. Made from the trace before passes change its graph. ranks: how many
    have a part of the batch each.

    batch_inputs: paths of the inputs that are cut over the batch; shared_inputs: of the others with dims,
    where there are several parts.
    """

    def __init__(self, trace, ranks: int = 1):
        self._sizes = SizeCheck(trace, ranks)
        self.batch_inputs = self._sizes.batch_inputs
        self.shared_inputs = (
            frozenset(path for path, dims in self._sizes.inputs.items() if dims and ranks > 1)
            - self.batch_inputs
        )
        ranges = _ranges(trace)
        self._values = [r for r in ranges if r.path is not None]
        self._positions = [r for r in ranges if r.path is None]
        self._reached: set[tuple] = set()

    @property
    def limits(self) -> dict[Path, int]:
        """How many values an integer input may have, where something looks it up."""
        return {r.path: min(q.high + 1 for q in self._values if q.path == r.path) for r in self._values}

    def check_sizes(self, given: Mapping[Path, Tensor]) -> None:
        """CallError for sizes that the trace does not hold for."""
        self._sizes(given)

    def check_values(
        self,
        calls: Sequence[Mapping[Path, Tensor]],
        tensors: Mapping[str, Tensor],
        shared: Collection[str],
        alone: bool,
    ) -> tuple[int, int] | None:
        """CallError where a call of these looks up what is not there; else the checksums of all `tensors`,
        None where they were not read.

        Smallest and largest values are read together with the checksums, in one copy to the host. A rank
        without others (alone) needs no checksums: there they are read on the CPU only, where that costs
        nothing.
        """
        for given in calls:
            self._check_positions(given)
        looked_up = [(r, given) for given in calls for r in self._values if given[r.path].numel()]
        if alone and any(t.device.type != "cpu" for t in tensors.values()):
            return None
        extremes = [value.to(torch.int64) for r, given in looked_up for value in r.extremes(given)]
        common, data, *found = checksums(tensors if not alone else {}, shared, extremes)
        for (r, given), low, high in zip(looked_up, found[::2], found[1::2]):
            if low < r.low or high > r.high:
                r.check(given)
        return common, data

    def _check_positions(self, given: Mapping[Path, Tensor]) -> None:
        shapes = tuple(given[path].shape for path in self._sizes.inputs)
        if shapes not in self._reached:
            for each in self._positions:
                each.check(given)
            self._reached.add(shapes)


def _ranges(trace) -> list[Range]:
    names = {**trace.parameters, **trace.buffers}
    found: dict[tuple, Range] = {}
    for node in trace.graph_module.graph.find_nodes(op="call_function", target=aten.embedding.default):
        table, index = node.args[:2]
        rows = table.meta["val"].shape[0]
        if isinstance(rows, int):
            name = f" ({names[table.name]})" if table.name in names else ""
            _add(found, trace, node, index, rows, None, f"the embedding table of {rows} rows{name}")
    for target in (aten.cross_entropy_loss.default, aten.nll_loss_nd.default, aten.nll_loss.default):
        for node in trace.graph_module.graph.find_nodes(op="call_function", target=target):
            scores, labels = node.args[:2]
            shape = scores.meta["val"].shape
            classes = shape[min(1, len(shape) - 1)]
            ignored = node.args[4] if len(node.args) > 4 else node.kwargs.get("ignore_index", -100)
            if isinstance(classes, int) and not labels.meta["val"].dtype.is_floating_point:
                _add(found, trace, node, labels, classes, ignored, f"the cross-entropy's {classes} classes")
    return list(found.values())


def _add(
    found: dict, trace, node: fx.Node, index: fx.Node, size: int, ignored: int | None, what: str
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
    sizes_of = {n for n in ancestors if _name(n) == "sym_size"}
    data = [n for n in leaves if any(u in before and u not in sizes_of for u in n.users) or n is index]
    computed = [
        n
        for n in ancestors
        if n.op == "call_function" and isinstance(n.meta.get("val"), (Tensor, list, tuple))
    ]
    batch = trace.sizes.get("batch")
    if len(data) == 1 and all(_name(n) in _VIEWS or _name(n) == "getitem" for n in computed):
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


_RANDOM = {
    aten.randint.default,
    aten.randint.low,
    aten.randperm.default,
    aten.rand.default,
    aten.randn.default,
}


def _name(node: fx.Node) -> str:
    target = node.target
    return (
        target._schema.name.split("::")[1]
        if isinstance(target, torch._ops.OpOverload)
        else getattr(target, "__name__", "")
    )


def _mentions(node: fx.Node, batch: sympy.Symbol | None) -> bool:
    value = node.meta.get("val")
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
