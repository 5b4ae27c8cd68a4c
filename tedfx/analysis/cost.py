"""What a local graph communicates: every collective of one step, by formula and by number.

Sizes are expressions in this rank's `batch` and `sequence` (`LocalSizes`); nothing here needs a process
group. For each node of the graph that communicates, forward and backward follow from the op and its adjoint
(the table in docs/design.md); backward counts only where a cotangent arrives: the value is differentiable and
the loss (without one, any output) depends on it. Recompute repeats the forward of checkpoint regions up to
their last saved tensor. The gradient boundary is counted from the types of the parameters, with the buckets
that `tedfx/runtime/gradients.py` fills.

Terms: the **payload** is the operand that this rank hands to the collective. **Wire** bytes are what it
sends, in a ring of n ranks: of a buffer of S bytes 2 S (n-1)/n for an all-reduce, S (n-1)/n for the others,
where S is the whole buffer: the input of an all-reduce, reduce-scatter or all-to-all, the output of an
all-gather, which is n payloads (`_WIRE`). ZeRO-3's gathers of parameters are all-gathers, and its scatters of
gradients are reduce-scatters.

Rows after routing are ragged: their number is only known at run time. They are counted as if the router
spread its choices evenly over the experts (`ragged=True` marks them), and dropped none; everything else is
exact, rows in slots (`tedfx/ops/slots.py`) too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod

import sympy
import torch
from torch import fx

from tedfx import ops
from tedfx.analysis.activations import repeated, saved, saves, viewed
from tedfx.analysis.sizes import Share
from tedfx.ops.cuts import Cut
from tedfx.placement.factors import leaves
from tedfx.placement.types import I, P, R
from tedfx.state.layouts import placed_on_first

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL = (
    "all_reduce",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_to_all_single",
)
# What the run-time counter (`tedfx.ops.count_collectives`) calls them.
GATHER_PARAMETERS, SCATTER_GRADIENTS = (
    "gather_parameters",
    "scatter_gradients",
)  # ZeRO-3's, told apart from those of activations
COUNTED = {
    GATHER_PARAMETERS: GATHER_PARAMETERS,
    SCATTER_GRADIENTS: SCATTER_GRADIENTS,
    "all_reduce": ALL_REDUCE,
    "all_gather": ALL_GATHER,
    "reduce_scatter": REDUCE_SCATTER,
    "all_to_all": ALL_TO_ALL,
}
PHASES = ("forward", "recompute", "backward", "boundary")

# Wire bytes per byte of payload, on n ranks. Whoever adds a collective says it here.
_WIRE = {
    ALL_REDUCE: lambda n: sympy.Rational(2 * (n - 1), n),
    **dict.fromkeys((ALL_GATHER, GATHER_PARAMETERS), lambda n: sympy.Integer(n - 1)),
    **dict.fromkeys((REDUCE_SCATTER, SCATTER_GRADIENTS, ALL_TO_ALL), lambda n: sympy.Rational(n - 1, n)),
}

Size = "int | sympy.Expr"


@dataclass(frozen=True)
class Communication:
    """One collective of one step."""

    node: str
    op: str  # torch's name
    axes: tuple[str, ...]  # of size above 1
    ranks: int  # in the group
    phase: str
    elements: object  # of the operand on this rank: int, or an expression in `batch` and `sequence`
    dtype: torch.dtype
    ragged: bool = False  # elements are those of balanced routing

    @property
    def payload(self):
        """Bytes of the operand on this rank."""
        return self.elements * self.dtype.itemsize

    @property
    def factor(self) -> sympy.Rational:
        """Wire bytes per byte of payload."""
        return _WIRE[self.op](self.ranks)


@dataclass(frozen=True)
class Redundancy:
    """Bytes of a rank's payload that all-to-alls over `axes` move although the ranks over `copies` move the
    same."""

    axes: tuple[str, ...]
    copies: tuple[str, ...]
    payload: object  # the part beyond one copy, all phases of a step


@dataclass(frozen=True)
class Total:
    """All collectives of one kind over the same axes in one phase."""

    phase: str
    op: str
    axes: tuple[str, ...]
    ranks: int
    count: int
    payload: object
    wire: object
    ragged: bool


class LocalSizes:
    """A rank's sizes by name: the size symbols of a compilation, renamed `batch` and `sequence`, and numbers
    for them."""

    def __init__(self, compilation):
        roles = {symbol: name for name, symbol in compilation.trace.sizes.items()}
        self.names: dict[sympy.Symbol, sympy.Symbol] = {}
        symbols = {
            s
            for n in compilation.graph_module.graph.find_nodes(op="placeholder")
            for s in _free(n.meta.get("local_shape") or ())
        }
        for symbol in [*roles, *sorted(symbols - set(roles), key=str)]:
            node, dim = compilation.size_sources.get(str(symbol), (str(symbol), 0))
            self.names[symbol] = sympy.Symbol(roles.get(symbol, f"{node}_{dim}"), integer=True, positive=True)
        self._renamed: dict = {}

    def __call__(self, size):
        """A size of `local_shape` in the names of this class."""
        if isinstance(size, int):
            return size
        if size not in self._renamed:
            # A share of what ranks need not divide counts as the average: exact in sums over the ranks, but
            # for what is padded.
            self._renamed[size] = (
                sympy.sympify(size)
                .replace(Share, lambda whole, degree, *axes: whole / degree)
                .xreplace(self.names)
            )
        return self._renamed[size]

    def shape(self, node: fx.Node) -> tuple | None:
        shape = node.meta.get("local_shape")
        return None if shape is None else tuple(self(s) for s in shape)

    def elements(self, node: fx.Node):
        return prod(self.shape(node))


def _free(shape) -> set:
    return {s for size in shape if isinstance(size, sympy.Expr) for s in size.free_symbols}


@dataclass
class Cost:
    """Every collective of one step of a compilation. `sizes` names its symbols."""

    compilation: object
    sizes: LocalSizes = None
    items: list[Communication] = field(default_factory=list)

    def __post_init__(self):
        self.sizes = self.sizes or LocalSizes(self.compilation)
        graph = self.compilation.graph_module.graph
        reached = _reached(self.compilation)
        for node in graph.nodes:
            if node.op == "call_function" and node.target in _COUNT:
                self.items += _COUNT[node.target](node, self, node in reached)
        self.items += self._recompute(reached)
        self.items += self._boundary()
        self.by_node: dict[str, list[Communication]] = {}
        for item in self.items:
            self.by_node.setdefault(item.node, []).append(item)
        self._numbers: dict = {}

    def make(
        self, node: fx.Node, op: str, axes, phase: str, elements, dtype, ragged=False
    ) -> list[Communication]:
        mesh = self.compilation.roles.mesh
        axes = mesh.wide(axes)
        return (
            [Communication(node.name, op, axes, mesh.size(axes), phase, elements, dtype, ragged)]
            if axes
            else []
        )

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
        mesh, nodes = (
            self.compilation.roles.mesh,
            {n.name: n for n in self.compilation.graph_module.graph.nodes},
        )
        found: dict[tuple, list] = {}
        for item in self.items:
            if item.op == ALL_TO_ALL:
                type_ = nodes[item.node].meta["type"]
                copies = tuple(
                    a for a in mesh.wide(mesh.names) if a not in item.axes and type_[a] in (R, I, P)
                )
                if copies:
                    found.setdefault((item.axes, copies), []).append(
                        (item.payload, 1 - sympy.Rational(1, mesh.size(copies)))
                    )
        return [Redundancy(axes, copies, _sum(terms)) for (axes, copies), terms in found.items()]

    def number(self, expr, values: Mapping[str, int]) -> int | float | None:
        """The value of a formula for sizes by name; None where a size is missing."""
        if isinstance(expr, int):
            return expr
        key = (expr, tuple(values.items()))
        if key not in self._numbers:
            value = sympy.sympify(expr).subs(
                {s: values[s.name] for s in expr.free_symbols if s.name in values}
            )
            self._numbers[key] = (
                None if not value.is_number else int(value) if value.is_Integer else float(value)
            )
        return self._numbers[key]

    # ---- recompute -----------------------------------------------------------------------------------------

    def _recompute(self, reached: set[fx.Node]) -> list[Communication]:
        """The forward collectives of a region again, as far as its recompute runs; none where backward reads
        nothing of it."""
        regions: dict[int, list[fx.Node]] = {}
        for node in self.compilation.graph_module.graph.nodes:
            if "region" in node.meta:
                regions.setdefault(node.meta["region"], []).append(node)
        again = {
            n.name
            for nodes in regions.values()
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
        return "region" in gather.meta and any(
            user.meta.get("region") == gather.meta["region"] for whole in gather.users for user in whole.users
        )

    # ---- the gradient boundary -----------------------------------------------------------------------------

    def _boundary(self) -> list[Communication]:
        """One sum per bucket, and one of a flag per parameter (is its gradient there?) for each set of
        axes."""
        graph, mesh = self.compilation.graph_module.graph, self.compilation.roles.mesh
        position = {node: i for i, node in enumerate(graph.nodes)}
        parameters = [n for n in parameter_nodes(self.compilation) if n.name in self.compilation.trainable]
        parameters.sort(key=lambda n: min((position[u] for u in n.users), default=len(position)))
        filling: dict[tuple, list[list[int]]] = {}  # [whole elements, elements that travel]
        flags: Counter = Counter()
        for node in reversed(parameters):
            axes = tuple(a for a in mesh.names if node.meta["type"].get(a) == R)
            if not mesh.wide(axes) or any(u.meta.get("in_graph") for u in node.users):
                continue
            flags[axes] += 1
            placed = placed_on_first(self.compilation, node, self.compilation.options.zero)
            dtype, elements = (
                self.compilation.options.gradient_dtype or node.meta["val"].dtype,
                placed.whole.numel,
            )
            travels = elements if placed.cut is None else placed.cut.width * len(placed.cut.lengths)
            buckets = filling.setdefault(
                (axes, dtype, ALL_REDUCE if placed.cut is None else REDUCE_SCATTER), [[0, 0]]
            )
            if (
                buckets[-1][0] + elements
            ) * dtype.itemsize > self.compilation.options.bucket_bytes and buckets[-1][0]:
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
        if n.name in names and "type" in n.meta
    ]


def _sum(terms):
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
    todo = [v for v in (loss or leaves_) if isinstance(v, fx.Node) and v.meta.get("differentiable")]
    found = set(todo)
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in found and source.meta.get("differentiable"):
                found.add(source)
                todo.append(source)
    return found


# ---- what each op communicates: node, cost, whether a cotangent arrives -> collectives ---------------------


def _value(node: fx.Node, index: int = 0) -> fx.Node:
    return node.args[index]


def _option(node: fx.Node, index: int, name: str, default):
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _dtype(node: fx.Node) -> torch.dtype:
    """Of a node, or of the value that it moves."""
    while not isinstance(node.meta.get("val"), torch.Tensor):
        node = node.args[0]
    return node.meta["val"].dtype


def _ragged(node: fx.Node) -> bool:
    return any(f.ragged for dim in node.meta.get("dims") or () for f in leaves(dim))


def _moves(forward, backward):
    """An op with one operand; which collective runs over which value ("in" or "out"), each way."""

    def count(node, cost, reached):
        made = []
        for phase, plan in (("forward", forward(node)), ("backward", backward(node) if reached else None)):
            if plan is not None:
                op, where = plan
                value = node if where == "out" else _value(node)
                made += cost.make(
                    node,
                    op,
                    _option(node, 1, "axes", ()),
                    phase,
                    cost.sizes.elements(value),
                    _dtype(value),
                    _ragged(value),
                )
        return made

    return count


def _cross_entropy(node, cost, reached):
    """A maximum per row, then the sum of exponentials and the label's logit, packed; at least in float32."""
    logits = _value(node)
    rows, dtype = cost.sizes.shape(logits)[0], _dtype(logits)
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    axes = _option(node, 2, "axes", ())
    return cost.make(node, ALL_REDUCE, axes, "forward", rows, wide) + cost.make(
        node, ALL_REDUCE, axes, "forward", 2 * rows, wide
    )


def _exchange_counts(node, cost, reached):
    counts = _value(node)
    if counts.meta.get("local_shape") is not None:
        experts = cost.sizes.elements(counts)
    else:  # an item of route(ids, num_experts, ..)
        experts = _value(counts).args[1]
    return cost.make(node, ALL_GATHER, _option(node, 1, "axes", ()), "forward", experts, torch.int64)


def _all_to_all(node, cost, reached):
    axes, made = _option(node, 3, "axes", ()), []
    for phase in ("forward", "backward") if reached else ("forward",):
        made += cost.make(
            node, ALL_TO_ALL, axes, phase, cost.sizes.elements(node), _dtype(_value(node)), True
        )
    return made


def _cumsum(node, cost, reached):
    """The totals of this rank's runs."""
    x, dim, axes = node.args[:3]
    made = []
    for phase in ("forward", "backward") if reached else ("forward",):
        made += cost.make(
            node, ALL_GATHER, axes, phase, _totals(cost, x, dim, cost.sizes(node.meta["runs"])), _dtype(node)
        )
    return made


def _cumsum_batched(node, cost, reached):
    values, axes, dims, outers, dtype = node.args
    return cost.make(
        node,
        ALL_GATHER,
        axes,
        "forward",
        sum(_totals(cost, *each) for each in zip(values, dims, outers)),
        dtype,
    )


def _totals(cost, x, dim, runs):
    shape = cost.sizes.shape(x)
    return prod(shape[:dim]) * runs * prod(shape[dim + 1 :])


def _all_reduce_batched(node, cost, reached):
    values, axes = node.args
    return cost.make(
        node, ALL_REDUCE, axes, "forward", sum(cost.sizes.elements(v) for v in values), _dtype(values[0])
    )


def _gather_parameters(node, cost, reached):
    """The row of this rank's shares; in a compiled graph its adjoint scatters rows of all ranks."""
    _, axes, cuts, _, summed_in = node.args
    row, dtype = sum(Cut(*cut).width for cut in cuts), _dtype(node.args[0][0])
    made = cost.make(node, GATHER_PARAMETERS, axes, "forward", row, dtype)
    if reached and node.meta["in_graph"]:
        made += cost.make(
            node,
            SCATTER_GRADIENTS,
            axes,
            "backward",
            row * cost.compilation.roles.mesh.size(axes),
            summed_in or dtype,
        )
    return made


def _nothing(node):
    return None


_COUNT = {
    ops.all_reduce: _moves(lambda n: (ALL_REDUCE, "in"), _nothing),
    ops.all_reduce_batched: _all_reduce_batched,
    ops.sum_gradient: _moves(_nothing, lambda n: (ALL_REDUCE, "in")),
    ops.all_gather: _moves(
        lambda n: (ALL_GATHER, "in"),
        lambda n: (REDUCE_SCATTER, "out") if _option(n, 4, "to", "R") == "R" else None,
    ),
    ops.reduce_scatter: _moves(lambda n: (REDUCE_SCATTER, "in"), lambda n: (ALL_GATHER, "out")),
    ops.shard: _moves(
        _nothing, lambda n: (ALL_GATHER, "out") if _option(n, 4, "source", "R") == "I" else None
    ),
    ops.vocab_parallel_cross_entropy: _cross_entropy,
    ops.exchange_counts: _exchange_counts,
    ops.exchange_lanes: _exchange_counts,
    ops.gather_lanes: _moves(
        lambda n: (ALL_GATHER, "in"),
        lambda n: (REDUCE_SCATTER, "out") if _option(n, 3, "to", "R") == "R" else None,
    ),
    ops.scatter_lanes: _moves(
        lambda n: (REDUCE_SCATTER, "in") if _option(n, 3, "source", "P") == "P" else None,
        lambda n: (ALL_GATHER, "out") if _option(n, 3, "source", "P") != "R" else None,
    ),
    ops.all_to_all_single: _all_to_all,
    **dict.fromkeys(
        (ops.send_slots, ops.return_slots), _moves(lambda n: (ALL_TO_ALL, "in"), lambda n: (ALL_TO_ALL, "in"))
    ),
    ops.gather_slots: _moves(lambda n: (ALL_GATHER, "in"), lambda n: (REDUCE_SCATTER, "out")),
    ops.scatter_slots: _moves(
        lambda n: (REDUCE_SCATTER, "in") if _option(n, 3, "source", "P") == "P" else None,
        lambda n: (ALL_GATHER, "out") if _option(n, 3, "source", "P") != "R" else None,
    ),
    ops.gather_parameters: _gather_parameters,
    ops.cumsum: _cumsum,
    ops.cumsum_batched: _cumsum_batched,
}


# ---- text --------------------------------------------------------------------------------------------------


def format_bytes(value) -> str:
    """1536 -> '1.5 KiB'."""
    value = float(value)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.4g} {unit}"
        value /= 1024
    raise AssertionError(value)


def format_formula(expr) -> str:
    """Bytes as a formula: '8 KiB*batch*sequence + 64 B'."""
    expr = sympy.sympify(expr)
    words = []
    for term in expr.as_ordered_terms() if not expr.is_number else [expr]:
        number, rest = term.as_coeff_Mul()
        words.append(format_bytes(number) if rest == 1 else f"{format_bytes(number)}*{rest}")
    return " + ".join(words)
