"""The exported program, made flat: one plain graph whose placeholders are parameters, buffers, constants and
tensor inputs, in that order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.export.graph_signature import InputKind, OutputKind

from tedfx.errors import TraceError, user_line
from tedfx.graph.emit import emit, evaluate
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import argument, function
from tedfx.placement.sizes import Symbol, holds, samples, symbol_of, symbols_of
from tedfx.trace.calls import Subject, leaves_with_path
from tedfx.trace.casts import explicit_casts
from tedfx.trace.first_classes import take_first_classes
from tedfx.trace.functions import keep_calls
from tedfx.trace.global_graph import Trace
from tedfx.trace.regions import inline_regions
from tedfx.trace.stand_ins import tied_names

aten = torch.ops.aten

# Operators that only assert: they shape no value.
_ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}


def flat(
    exported: torch.export.ExportedProgram,
    subject: Subject,
    free: Mapping[str, Any],
    asked: Sequence[tuple[Any, Any]] = (),
) -> Trace:
    """free: name -> the Dim of each size that is free; asked: (expression, answer) of what the model's Python
    asked of sizes."""
    graph_module = fx.GraphModule(exported.graph_module, exported.graph_module.graph)
    graph, static = graph_module.graph, list(subject.static)
    inline_regions(graph_module)
    lowered = keep_calls(graph)
    conditions = _conditions(graph, asked)
    _count_into_fixed_bins(graph)
    take_first_classes(graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _ASSERTIONS:
            graph.erase_node(node)
    tied = tied_names(subject.model)
    state = _State(exported, graph, tied)
    lowered |= explicit_casts(graph, subject.device.type, subject.around)
    inputs, values, roles = _inputs(graph, state.user, subject)

    graph.eliminate_dead_code()
    state.drop_unread_buffers(graph)
    graph_module.delete_all_unused_submodules()
    graph.lint()
    graph_module.recompile()

    extents = _extents(roles)
    symbols = {name: symbol for name, (_, symbol) in extents.items()}
    bounds = {symbol: _bounds(free.get(name)) for name, symbol in symbols.items()}
    conditions = [c for c in conditions if not _is_bounded(c, bounds)]
    static += [f"the model only accepts sizes with {c}" for c in conditions]
    in_spec, out_spec = exported.call_spec.in_spec, exported.call_spec.out_spec
    if in_spec is None or out_spec is None:
        raise TraceError("torch.export did not say how the inputs and outputs of the model are flattened")
    return Trace(
        graph_module=graph_module,
        parameters=state.parameters,
        tied=tied,
        buffers=state.buffers,
        constants=state.constants,
        inputs=inputs,
        in_spec=in_spec,
        out_spec=out_spec,
        training=subject.model.training,
        signature=subject.signature,
        sizes=symbols,
        extents={name: size.node.expr for name, (size, _) in extents.items()},
        bounds=bounds,
        static=static,
        notes=subject.notes,
        values=values,
        device=subject.device,
        captured=subject.captured,
        conditions=conditions,
        autocast=subject.around,
        lowered=lowered,
    )


class _State:
    """The placeholders of an exported program: parameters and buffers (by FQN, tied ones once), constants
    (with their tensor), and those of the user's inputs."""

    def __init__(self, exported: torch.export.ExportedProgram, graph: fx.Graph, tied: Mapping[str, str]):
        self.parameters: dict[str, str] = {}
        self.buffers: dict[str, str] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.user: list[fx.Node] = []
        self._nodes = {n.name: n for n in graph.find_nodes(op="placeholder")}
        owner: dict[str, fx.Node] = {}
        for spec in exported.graph_signature.input_specs:
            name = spec.arg.name
            node = self._nodes[name]
            if spec.kind is InputKind.USER_INPUT:
                self.user.append(node)
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                target = str(spec.target)
                fqn = tied.get(target, target)
                if fqn in owner:
                    node.replace_all_uses_with(owner[fqn])
                    graph.erase_node(node)
                    continue
                owner[fqn] = node
                (self.parameters if spec.kind is InputKind.PARAMETER else self.buffers)[name] = fqn
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                constant = exported.constants[str(spec.target)]
                if not isinstance(constant, torch.Tensor):
                    raise TraceError(f"constant {name} is a {type(constant).__name__}, which is no tensor")
                self.constants[name] = constant
            else:
                where = user_line(next(iter(node.users), node))
                raise TraceError(
                    f"input {name} is a {spec.kind.name.lower()} (a torch.Generator is one) | at {where} | "
                    "only tensors can enter the graph: draw without a generator of your own"
                )
        for spec in exported.graph_signature.output_specs:
            if spec.kind is not OutputKind.USER_OUTPUT:
                raise TraceError(
                    f"output {spec.arg.name} is a {spec.kind.name.lower()}, which tedfx does not expect"
                )

    def drop_unread_buffers(self, graph: fx.Graph) -> None:
        """An unread buffer, or constant, needs no placeholder."""
        for name in [n for n in self._nodes if n in self.buffers or n in self.constants]:
            if not self._nodes[name].users:
                self.buffers.pop(name, None)
                self.constants.pop(name, None)
                graph.erase_node(self._nodes[name])


def _inputs(graph: fx.Graph, user: Sequence[fx.Node], subject: Subject):
    """(placeholder -> path of the tensor inputs, path -> value of the others, node -> roles of its dims)."""
    inputs: dict[str, tuple] = {}
    values: dict[tuple, Any] = {}
    roles_of: dict[fx.Node, dict[int, str]] = {}
    for node, (path, value), roles in zip(user, leaves_with_path(subject.call), subject.roles, strict=True):
        if isinstance(value, torch.Tensor):
            node = _renamed(graph, node)
            inputs[node.name] = path
            roles_of[node] = roles or {}
        else:
            values[path] = value
            graph.erase_node(node)
    return inputs, values, roles_of


def _extents(roles_of: Mapping[fx.Node, Mapping[int, str]]) -> dict[str, tuple[torch.SymInt, Symbol]]:
    """The sizes that are free, by name, each with its symbol."""
    found: dict[str, tuple[torch.SymInt, Symbol]] = {}
    for node, roles in roles_of.items():
        for dim, name in roles.items():
            size = VAL[node].shape[dim]
            symbol = symbol_of(size) if isinstance(size, torch.SymInt) else None
            if symbol is not None:
                found[name] = size, symbol
    return found


def _bounds(dim: Any) -> tuple[int, int | None]:
    """The smallest and the largest size of a Dim that export allows: below 3 it only specialises."""
    low, high = getattr(dim, "min", None), getattr(dim, "max", None)
    return (
        low if isinstance(low, int) and low > 2 else 1,
        high if isinstance(high, int) and high < 2**62 else None,
    )


def _renamed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A placeholder whose name a copy of the graph would keep: `input`, `id` and other names of Python's own
    get a number there."""
    kept = fx.Graph().placeholder(node.name).name
    if kept == node.name:
        return node
    with graph.inserting_before(node):
        made = graph.placeholder(kept)
    made.meta = node.meta
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    return made


def _free_symbols(val: Any) -> set[sympy.Symbol]:
    sizes = val.shape if isinstance(val, torch.Tensor) else ()
    return {s for size in sizes if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols}


def _conditions(graph: fx.Graph, asked: Sequence[tuple[Any, Any]]) -> list[sympy.Basic]:
    """What the graph asserts of the sizes of its inputs, and what the model's Python asked of them with the
    answers that this graph is for; less what holds of all of a sample (`min(8 s, 16 s) == 8 s`)."""
    inputs = [VAL.get(node) for node in graph.find_nodes(op="placeholder")]
    of = {symbol for val in inputs for symbol in _free_symbols(val)}
    said: list[tuple[Any, int]] = []  # and the smallest size that it is about
    for node in graph.find_nodes(op="call_function", target=aten._assert_scalar.default):
        val = VAL.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        said.append((val.node.expr if isinstance(val, torch.SymBool) else None, 1))
    sizes = [s for val in inputs if isinstance(val, torch.Tensor) for s in val.shape]
    env = next((size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None)
    if env is not None:  # two names of one size are one there
        # Not of a size of 1: libraries ask for it everywhere (one token is a step of generation), and go a
        # way then that comes to the same.
        said += [(_answered(env.replace(expr), answer), 2) for expr, answer in asked]
    found: dict[sympy.Basic, None] = {}
    for expr, least in said:
        if isinstance(expr, sympy.Basic) and expr.free_symbols and expr.free_symbols <= of:
            wanted = (sample for sample in samples(expr) if min(sample.values()) >= least)
            if not all(holds(expr, sample) for sample in wanted):
                found[expr] = None
    return list(found)


def _is_bounded(condition: sympy.Basic, bounds: Mapping[Symbol, tuple[int, int | None]]) -> bool:
    """Whether the bounds of the one size of a condition say it already."""
    symbols = symbols_of(condition)
    if len(symbols) != 1:
        return False
    (symbol,) = symbols
    low, high = bounds.get(symbol, (1, None))
    sizes = [sample[symbol] for sample in samples(condition)]
    within = {low, *(s for s in sizes if s >= low and (high is None or s <= high)), *([high] if high else [])}
    return all(holds(condition, {symbol: size}) for size in within)


def _answered(expr: sympy.Basic, answer: bool | int | float) -> sympy.Basic:
    """That a question about sizes has this answer."""
    if isinstance(answer, bool):
        return expr if answer else sympy.Not(expr)
    return sympy.Eq(expr, answer)


def _bins(node: fx.Node) -> tuple[Any, int]:
    """(weights, minlength) of a bincount."""
    return argument(node, 1, "weights"), argument(node, 2, "minlength", 0)


def _count_into_fixed_bins(graph: fx.Graph) -> None:
    """bincount(ids, minlength=E) has a size that is data. Where the graph asserts it to be E, it is a
    histogram of E bins."""
    asserted = {}
    for node in graph.find_nodes(op="call_function", target=aten._assert_scalar.default):
        val = VAL.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        expr = val.node.expr if isinstance(val, torch.SymBool) else None
        if (
            isinstance(expr, sympy.Eq)
            and isinstance(expr.lhs, sympy.Symbol)
            and isinstance(expr.rhs, sympy.Integer)
        ):
            asserted[expr.lhs] = int(expr.rhs)
    stale: set[fx.Node] = set()  # their fake values still have the size that is data
    for node in list(graph.nodes):
        weights, bins = _bins(node) if node.target is aten.bincount.default else (None, 0)
        if bins and weights is None and asserted.get(VAL[node].shape[0].node.expr) == bins:
            with graph.inserting_before(node):
                exact = emit(graph, aten.to.dtype, (node.args[0], torch.float64), like=node)
                counts = emit(graph, aten.histc.default, (exact, bins, 0, bins), like=node)
                counts = emit(graph, aten.to.dtype, (counts, torch.int64), like=node)
            node.replace_all_uses_with(counts)
            stale.update(counts.users)
        elif node in stale and node.op == "call_function" and node.target not in _ASSERTIONS:
            VAL[node] = evaluate(graph, function(node), node.args, node.kwargs)
            stale.update(node.users)
