"""torch.autocast in a graph: what it does to every node, written out as casts.

Autocast acts below what torch.export records: a graph traced under it has `linear(x, w)` of float32 operands,
whose value is bfloat16. Here every such node gets its casts as nodes of their own, so that types, gradients
and passes see plain casts, and the graph runs with autocast off.

What autocast does to an operator is not written down but observed, on fake operands like those of the node,
their sizes made numbers (`_observe`):

1. The operator runs under autocast, and what it dispatches to is noted: casts of its own operands first, then
   the rest.
2. It runs without. If the rest and the dtypes of the results are the same, autocast leaves it alone.
3. Else the first of these that gives the same rest and results without autocast is what autocast does: the
   casts of operands that were seen; a `dtype` given to the operator (sums, softmax); every float operand cast
   to autocast's dtype, for composites whose parts are cast inside (einsum).
4. If none does, the node is refused with its line.

A weight is cast once per graph and dtype, as autocast's own cache does for one region; other values, and a
weight's views inside a composite, are cast at each use, as in eager mode, so that gradients are summed in the
same dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from tedfx._torch import TorchDispatchMode, hint, is_view, pytree, scratch_mode
from tedfx.errors import TraceError, user_line
from tedfx.graph.emit import emit
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import function, operator_of
from tedfx.ops.autocast import Autocast, region

aten = torch.ops.aten
REGION = "autocast"  # node.meta: the regions around a node, innermost first


def mark(node: fx.Node, device_type: str, dtype: torch.dtype, enabled: bool) -> None:
    """`node` came out of a region; called for the innermost first."""
    node.meta[REGION] = (
        *node.meta.get(REGION, ()),
        (device_type, Autocast(device_type, dtype) if enabled else None),
    )


def explicit_casts(graph: fx.Graph, device_type: str, around: Autocast | None) -> frozenset[torch.dtype]:
    """Write out what autocast does to the nodes of `graph`, in the regions that are marked and in `around`
    elsewhere; the dtypes of the regions that changed something."""
    weights: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    known: dict[tuple, Change] = {}
    lowered = set()
    for node in list(graph.nodes):
        regions = node.meta.pop(REGION, ())
        setting = next((setting for kind, setting in regions if kind == device_type), around)
        if (
            setting is None
            or not isinstance(node.target, torch._ops.OpOverload)
            or not any(_is_float(v) for v in _values(node))
        ):
            continue
        key = (setting, node.target, *(_kind(v) for v in _values(node)))
        if key not in known:
            known[key] = _observe(node, setting)
        if known[key].apply(node, weights):
            lowered.add(setting.dtype)
    return frozenset(lowered)


@dataclass(frozen=True)
class Change:
    """What autocast does to a node: `casts`, {position among the leaves of its arguments: dtype}, and the
    `dtype` that it is given. whole: the operands themselves are cast."""

    casts: tuple[tuple[int, torch.dtype], ...] = ()
    dtype: torch.dtype | None = None
    whole: bool = True

    def leaves(self, leaves: list, cast) -> list:
        return [
            cast(leaf, dict(self.casts)[i]) if i in dict(self.casts) else leaf
            for i, leaf in enumerate(leaves)
        ]

    def keywords(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return dict(kwargs) if self.dtype is None else {**kwargs, "dtype": self.dtype}

    def apply(self, node: fx.Node, weights: dict[tuple[fx.Node, torch.dtype], fx.Node]) -> bool:
        if not self.casts and self.dtype is None:
            return False

        def cast(operand: fx.Node, dtype: torch.dtype) -> fx.Node:
            weight = self.whole and operand.op == "placeholder" and VAL[operand].requires_grad
            if weight and (operand, dtype) in weights:
                return weights[operand, dtype]
            made = emit(node.graph, aten.to.dtype, (operand, dtype), like=node)
            if weight:
                weights[operand, dtype] = made
            return made

        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        with node.graph.inserting_before(node):
            node.args, node.kwargs = pytree.tree_unflatten(self.leaves(leaves, cast), spec)
        node.kwargs = self.keywords(node.kwargs)
        return True


def _values(node: fx.Node) -> list[Any]:
    """The leaves of a node's arguments, nodes as their fake values."""
    return [
        VAL.get(leaf) if isinstance(leaf, fx.Node) else leaf
        for leaf in pytree.tree_leaves((node.args, node.kwargs))
    ]


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _kind(value: Any) -> Any:
    """What of an operand decides how autocast treats the operator."""
    return (
        value.dtype
        if isinstance(value, torch.Tensor)
        else value
        if isinstance(value, (torch.dtype, str, bool, type(None)))
        else type(value).__name__
    )


# ---- observing ---------------------------------------------------------------------------------------------


def _observe(node: fx.Node, setting: Autocast) -> Change:
    seen = _run(node, Change(), setting)
    casts = tuple((i, dtype) for i, dtype in sorted(seen.casts.items()))
    lowered = tuple(
        (i, setting.dtype)
        for i, value in enumerate(_values(node))
        if _is_float(value) and value.dtype not in (setting.dtype, torch.float64)
    )
    schema = operator_of(node)._schema
    takes_dtype = any(a.name == "dtype" for a in schema.arguments) and node.kwargs.get("dtype") is None
    for change in (
        Change(),
        Change(casts),
        *([Change(dtype=seen.out[0])] if takes_dtype else []),
        Change(lowered, whole=False),
    ):
        if (again := _attempt(node, change)) is not None and (again.rest, again.out) == (seen.rest, seen.out):
            if change.casts and schema.is_mutable:
                break  # a cast of what it writes to would take the write
            return change
    raise TraceError(
        f"{node.target} under {setting}: what it does to the operator is no cast of its operands | at "
        f"{user_line(node)} | take it out of the region (torch.autocast(.., enabled=False)), or cast "
        "its operands"
    )


def _attempt(node: fx.Node, change: Change) -> "_Seen | None":
    try:
        return _run(node, change, None)
    except RuntimeError:  # torch does not take operands of these dtypes: then this is not what autocast does
        return None


def _run(node: fx.Node, change: Change, setting: Autocast | None) -> "_Seen":
    """What `node` dispatches to, on fake operands like its own after `change`, with or without autocast."""
    spec = pytree.tree_flatten((node.args, node.kwargs))[1]
    device_type = (
        setting.device_type
        if setting is not None
        else next(v.device.type for v in _values(node) if _is_float(v))
    )
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), scratch_mode():
        same: dict[int, Any] = {}  # an operand that stands twice is one object here too
        given = [
            same.setdefault(id(value), _concrete(value)) if isinstance(value, Tensor) else _concrete(value)
            for value in _values(node)
        ]
        args, kwargs = pytree.tree_unflatten(change.leaves(given, lambda x, dtype: x.to(dtype)), spec)
        seen = _Seen(given)
        with region(setting, device_type), seen:
            out = function(node)(*args, **change.keywords(kwargs))
    seen.out = tuple(x.dtype for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
    return seen


def _concrete(value: Any) -> Any:
    """An operand with numbers for its sizes: composites ask for those, and no answer about a symbol must stay
    with the graph."""
    if isinstance(value, Tensor):
        return torch.empty_strided(
            [number_of(n) for n in value.shape],
            [number_of(n) for n in value.stride()],
            dtype=value.dtype,
            device=value.device,
        )
    if isinstance(value, torch.SymInt):
        return number_of(value)
    return True if isinstance(value, torch.SymBool) else 1.0 if isinstance(value, torch.SymFloat) else value


def number_of(size: int | torch.SymInt) -> int:
    """A size with a number for each of its symbols: the traced one, or 8 where it is data."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expr, env = size.node.expr, size.node.shape_env
    return int(expr.subs({symbol: hint(env, symbol, 8) for symbol in expr.free_symbols}))


class _Seen(TorchDispatchMode):
    """`casts`: operands that are cast before anything else happens, by position. `rest`: the operators on
    tensors, views and casts apart, with the dtypes of what they take and give."""

    def __init__(self, operands: list):
        super().__init__()
        self._positions: dict[int, list[int]] = {}
        for i, x in enumerate(operands):
            if isinstance(x, torch.Tensor):
                self._positions.setdefault(id(x), []).append(i)
        self.casts: dict[int, torch.dtype] = {}
        self.rest: list[tuple] = []
        self.out: tuple[torch.dtype, ...] = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = (
            [x.dtype for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]
            for tree in ((args, kwargs), out)
        )
        if func is aten._to_copy.default:
            if not self.rest:
                self.casts.update((i, out.dtype) for i in self._positions.get(id(args[0]), ()))
        elif made and not is_view(func):
            self.rest.append((func, given, made))
        return out


__all__ = ["explicit_casts", "mark"]
