"""Attention masks that follow from sizes alone: proven, and replaced by what they are.

A traced model writes its causal mask out, per sample: (batch, 1, S, S) booleans from `arange`, from position
ids that are plain ranges, from checks for packed sequences that such ids cannot hold. Attention kernels are
fastest without it.

Algorithm:
1. `x[range_0, range_1, ...]`, each index a whole range over its own dim, is a view of `x`.
2. A *mask* here is a value whose last two dims are one size S and which no tensor input reaches: only sizes
   do. It is run, concretely, at many sizes, and around every integer that its computation mentions (a window,
   a chunk), and compared with `key <= query`, or with `query - window < key <= query` for the window that its
   last row shows. Sizes too large for S x S are run on the query rows where anything can change, which is
   exact as the last two dims are only ever combined pointwise.
3. Attention with a mask proven causal says `is_causal` instead. Any other proven mask is computed once, as
   (1, 1, S, S).

A mask that is proven to be neither stays as the user wrote it.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import fx

from tedfx._torch import OpOverload, pytree
from tedfx.graph.emit import emit, evaluate
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import argument, function, is_elementwise, op_name, operand
from tedfx.passes.base import Pass, PassResult
from tedfx.stages.graphs import GlobalGraph

__all__ = ["SimplifyMasks"]

aten = torch.ops.aten

_SDPA = aten.scaled_dot_product_attention.default
_SDPA_ARGS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_SMALL = (1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257)
_WHOLE = 260  # up to this size every row is compared
_LARGEST = 1 << 21  # beyond this a range alone is too large to run
_CREATE = {
    aten.full.default,
    aten.ones.default,
    aten.zeros.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.new_full.default,
    aten.full_like.default,
    aten.ones_like.default,
    aten.zeros_like.default,
}
_POINTWISE = {
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten.__xor__.Tensor,
    aten.__and__.Scalar,
    aten.__or__.Scalar,
}  # untagged
_SAME = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten._to_copy.default,
}


@dataclasses.dataclass(frozen=True)
class SimplifyMasks(Pass[GlobalGraph]):
    """Masks that depend on sizes only become `is_causal`, or lose their batch dim (see the module's
    docstring)."""

    requires: ClassVar[frozenset[str]] = frozenset({"functional"})
    provides: ClassVar[frozenset[str]] = frozenset({"masks"})

    def __call__(self, program: GlobalGraph) -> PassResult:
        graph = program.graph_module.graph
        views = sum(_index_as_view(node) for node in list(graph.nodes) if node.target is aten.index.Tensor)
        placeholders = {n.name: n for n in graph.find_nodes(op="placeholder")}
        constants = {placeholders[name]: value.cpu() for name, value in program.trace.constants.items()}
        masks = list(_masks(graph, constants))
        result = PassResult(matches=len(masks), changes=views)
        bounds = program.trace.bounds
        for mask in masks:
            try:
                band = _prove(mask, bounds, constants)
            except _Unproven as reason:
                result.notes.append(f"{mask.name}: stays as it is, {reason}")
                continue
            kind = "causal" if band.window is None else f"a window of {band.window}"
            uses = _use(mask, band)
            result.changes += uses
            if uses:
                result.notes.append(f"{mask.name}: {kind}, {uses} uses simplified")
        graph.eliminate_dead_code()
        program.graph_module.recompile()
        return result


# --- step 1 -------------------------------------------------------------------------------------------------


def _index_as_view(node: fx.Node) -> int:
    source, indices = operand(node, 0), argument(node, 1)
    shape = VAL[source].shape
    if len(indices) != len(shape):
        return 0
    places = []  # where each dim of the operand lands, counted from the right
    for index, size in zip(indices, shape):
        place = _range_place(index, size)
        if place is None:
            return 0
        places.append(place)
    if len(set(places)) != len(places):
        return 0
    rank = VAL[node].dim()
    graph = node.graph
    with graph.inserting_before(node):
        value = source
        order = sorted(range(len(places)), key=lambda d: places[d])
        if order != list(range(len(places))):
            value = emit(graph, aten.permute.default, (value, order), like=node)
        for dim in range(rank):
            if dim - rank not in places:
                value = emit(graph, aten.unsqueeze.default, (value, dim), like=node)
    node.replace_all_uses_with(value)
    graph.erase_node(node)
    return 1


def _range_place(node: Any, size: Any) -> int | None:
    """If `node` is arange(size) with unsqueezes around it: the (negative) dim along which it runs."""
    unsqueezed = []
    while isinstance(node, fx.Node) and node.target is aten.unsqueeze.default:
        unsqueezed.append(node.args[1] % VAL[node].dim())
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target not in (aten.arange.default, aten.arange.start):
        return None
    if node.target is aten.arange.start and node.args[0] != 0:
        return None
    if VAL[node].is_floating_point() or not _same(VAL[node].shape[0], size):
        return None
    place = 0
    for dim in reversed(unsqueezed):
        place += dim <= place
    return place - (1 + len(unsqueezed))


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _same(a: Any, b: Any) -> bool:
    return _expr(a) == _expr(b)


# --- step 2: which values are masks, and what they are ------------------------------------------------------


class _Unproven(Exception):
    pass


@dataclasses.dataclass
class _Band:
    """key <= query, and query - window < key. `drop` is what an additive mask adds elsewhere; None for
    booleans."""

    window: int | None
    drop: float | None


def _masks(graph: fx.Graph, constants: dict[fx.Node, torch.Tensor]) -> Iterator[fx.Node]:
    """Square values made from sizes (and constants in the code) alone, that something else than such values
    uses."""
    fixed: set[fx.Node] = set(constants)
    square: set[fx.Node] = set()
    for node in graph.nodes:
        val = VAL.get(node)
        if node.op != "call_function" or isinstance(
            val, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)
        ):
            continue
        if (
            not isinstance(node.target, torch._ops.OpOverload)
            or torch.Tag.nondeterministic_seeded in node.target.tags
        ):
            continue
        tensors = [n for n in node.all_input_nodes if not _is_size(n)]
        if all(n in fixed for n in tensors) and isinstance(val, torch.Tensor):
            fixed.add(node)
            if val.dim() >= 2 and _same(val.shape[-1], val.shape[-2]) and not _same(val.shape[-1], 1):
                square.add(node)
    for node in square:
        if any(user not in square for user in node.users):
            yield node


def _is_size(node: fx.Node) -> bool:
    return isinstance(VAL.get(node), (torch.SymInt, torch.SymFloat, torch.SymBool))


def _prove(
    mask: fx.Node, bounds: dict[Any, tuple[int, int | None]], constants: dict[fx.Node, torch.Tensor]
) -> _Band:
    val = VAL[mask]
    if val.dtype is not torch.bool and not val.is_floating_point():
        raise _Unproven("it holds integers")
    nodes = _inputs(mask)
    size = _expr(val.shape[-1])
    symbols = set().union(*(_symbols(n) for n in nodes))
    mentioned = [
        x
        for n in nodes
        for x in (constants[n].flatten().tolist() if n in constants else _numbers((n.args, n.kwargs)))
    ]
    literals = {abs(int(x)) for x in mentioned if 1 < abs(x) < 1e18 and x == int(x)}
    if getattr(size, "is_Symbol", False):
        low, high = bounds.get(size, (1, None))
        around = {x + d for x in literals for d in (-1, 0, 1)} | {
            2 * x + d for x in literals for d in (-1, 0, 1)
        }
        sizes = sorted(s for s in {*_SMALL, *around} if s >= low and (high is None or s <= high))
        if not sizes or sizes[-1] > _LARGEST:
            raise _Unproven(f"it mentions {max(literals, default=0)}, too large to run")
    elif getattr(size, "is_number", True):
        sizes = [int(size)]
    else:
        raise _Unproven(f"its size {size} is computed")

    band = None
    for s in reversed(sizes):
        others = (1, 3) if s <= 64 else (2,)
        for other in others:
            run = _Run(
                {sym: s if sym == size else other for sym in symbols}, s, _rows(s, literals), constants
            )
            keep, drop = _as_keep(run.square(mask) if run.partial else run.whole(mask))
            if band is None:
                last = int(keep.reshape(-1, keep.shape[-2], s)[0, -1].sum())
                band = _Band(None if last == s else last, drop)
            if band.drop is not None and drop is not None and drop != band.drop:
                raise _Unproven(f"it adds {drop} and {band.drop}")
            query, key = run.rows[:, None], torch.arange(s)[None, :]
            expected = key <= query
            if band.window is not None:
                expected &= key > query - band.window
            if not bool((keep == expected).all()):
                raise _Unproven(f"it is neither causal nor a window at size {s}")
    if band is None:
        raise _Unproven("it has no size to prove it at")
    return band


def _as_keep(mask: torch.Tensor) -> tuple[torch.Tensor, float | None]:
    if mask.dtype is torch.bool:
        return mask, None
    keep = mask == 0
    dropped = mask[~keep]
    if dropped.numel() == 0:
        return keep, None
    drop = float(dropped[0])
    if drop > -1e4 or not bool((dropped == drop).all()):
        raise _Unproven("it adds more than one value")
    return keep, drop


def _rows(size: int, literals: set[int]) -> torch.Tensor:
    if size <= _WHOLE:
        return torch.arange(size)
    near = {0, 1, 2, size // 2, size - 3, size - 2, size - 1}
    near |= {x + d for x in literals for d in (-2, -1, 0, 1, 2)} | {
        size - x + d for x in literals for d in (-2, -1, 0, 1, 2)
    }
    return torch.tensor(sorted(r for r in near if 0 <= r < size))


def _inputs(node: fx.Node) -> list[fx.Node]:
    found: dict[fx.Node, None] = {}
    todo = [node]
    while todo:
        n = todo.pop()
        if n not in found:
            found[n] = None
            if not _is_size(n):
                todo.extend(n.all_input_nodes)
    return list(found)


def _symbols(node: fx.Node) -> set[Any]:
    val = VAL[node]
    sizes = [val] if _is_size(node) else list(val.shape)
    return set().union(
        *(getattr(x.node.expr, "free_symbols", set()) for x in sizes if hasattr(x, "node")), set()
    )


def _numbers(tree: Any) -> list[float]:
    return [
        x
        for x in pytree.tree_leaves(tree)
        if isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e18
    ]


class _Run:
    """Runs size-only nodes at given sizes, on the CPU; square ones at some rows only."""

    def __init__(
        self, sizes: dict[Any, int], size: int, rows: torch.Tensor, constants: dict[fx.Node, torch.Tensor]
    ) -> None:
        self.sizes, self.size, self.rows = sizes, size, rows
        self.partial = len(rows) < size
        self.known: dict[fx.Node, Any] = dict(constants)
        self.known_rows: dict[fx.Node, torch.Tensor] = {}

    def whole(self, node: fx.Node) -> Any:
        if node not in self.known:
            val = VAL[node]
            if _is_size(node):
                self.known[node] = _number(val.node.expr.subs(self.sizes))
            else:
                if self.partial and self._is_square(node):
                    raise _Unproven("its rows are not computed one by one")
                args, kwargs = fx.map_arg((node.args, node.kwargs), self.whole)
                self.known[node] = function(node)(*args, **_on_cpu(kwargs))
        return self.known[node]

    def square(self, node: fx.Node) -> torch.Tensor:
        """Rows `self.rows` of dim -2 of a square value."""
        if node not in self.known_rows:
            self.known_rows[node] = self._square(node)
        return self.known_rows[node]

    def _is_square(self, node: fx.Node) -> bool:
        shape = VAL[node].shape
        return len(shape) >= 2 and _same(shape[-1], shape[-2]) and self._size(shape[-1]) == self.size

    def _size(self, size: Any) -> int:
        return int(_expr(size).subs(self.sizes)) if isinstance(size, torch.SymInt) else size

    def _square(self, node: fx.Node) -> torch.Tensor:
        target, val = node.target, VAL[node]
        if not isinstance(target, OpOverload):
            raise _Unproven(f"{op_name(node)} combines its rows")
        shape = [self._size(s) for s in val.shape]
        shape[-2] = len(self.rows)
        if target in _CREATE:
            like = {"full_like": 1, "full": 1, "new_full": 2}.get(target._schema.name.removeprefix("aten::"))
            fill = argument(node, like) if like else float("ones" in target._schema.name)
            return torch.full(shape, self.whole(fill) if isinstance(fill, fx.Node) else fill, dtype=val.dtype)
        if target in (aten.tril.default, aten.triu.default):
            diagonal = argument(node, 1, "diagonal", 0)
            offset = torch.arange(self.size)[None, :] - self.rows[:, None]
            keep = offset <= diagonal if target is aten.tril.default else offset >= diagonal
            return torch.where(keep, self.square(operand(node, 0)), torch.zeros((), dtype=val.dtype))
        if target is aten.expand.default:
            return self._operand(operand(node, 0)).expand(shape)
        if target is aten.unsqueeze.default and node.args[1] % val.dim() < val.dim() - 2:
            return self.square(operand(node, 0)).unsqueeze(node.args[1] % val.dim())
        if torch.Tag.pointwise in target.tags or target in _SAME or target in _POINTWISE:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self._operand)
            return target(*args, **_on_cpu(kwargs))
        raise _Unproven(f"{target} combines its rows")

    def _operand(self, node: fx.Node) -> Any:
        if _is_size(node):
            return self.whole(node)
        shape = VAL[node].shape
        if self._is_square(node):
            return self.square(node)
        value = self.whole(node)
        if len(shape) >= 2 and self._size(shape[-2]) == self.size:
            return value.index_select(-2, self.rows)
        return value


def _number(value: Any) -> Any:
    return int(value) if value.is_Integer else float(value)


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") is not None else kwargs


# --- step 3 -------------------------------------------------------------------------------------------------


def _use(mask: fx.Node, band: _Band) -> int:
    """Replace the uses of a proven mask; the number of uses replaced."""
    changed = 0
    if band.window is None:
        for user in list(mask.users):
            changed += _attend_causally(user, mask)
    shape = VAL[mask].shape
    if mask.users and any(not _same(s, 1) for s in shape[:-2]):
        graph = mask.graph
        with graph.inserting_after(mask):
            anchor = graph.call_function(operator.getitem, (mask, 0))  # a place to insert at
        with graph.inserting_before(anchor):
            plain = _write_out(mask, band)
            for user in [u for u in mask.users if u is not anchor]:
                if user not in _inputs(plain):
                    changed += _take(user, mask, plain)
        graph.erase_node(anchor)
    return changed


def _attend_causally(node: fx.Node, mask: fx.Node) -> int:
    if node.target is not _SDPA:
        return 0
    query, key, value = (operand(node, i, name) for i, name in enumerate(_SDPA_ARGS[:3]))
    dropout = argument(node, 4, "dropout_p", 0.0)
    kwargs = {name: value for name, value in node.kwargs.items() if name not in _SDPA_ARGS}
    if argument(node, 3, "attn_mask") is not mask or not _same(VAL[query].shape[-2], VAL[key].shape[-2]):
        return 0
    node.args, node.kwargs = (query, key, value, None, dropout, True), kwargs
    return 1


def _write_out(mask: fx.Node, band: _Band) -> fx.Node:
    graph, val = mask.graph, VAL[mask]
    size: Any = val.shape[-1]
    if isinstance(size, torch.SymInt):
        known = [n for n in _inputs(mask) if _is_size(n) and _same(VAL[n], size)]
        size = known[0] if known else emit(graph, aten.sym_size.int, (mask, val.dim() - 1), like=mask)

    def put(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return emit(graph, target, args, kwargs, like=mask)

    steps = put(aten.arange.default, size, device=val.device)
    query = put(aten.reshape.default, steps, [*[1] * (val.dim() - 2), size, 1])
    key = put(aten.reshape.default, steps, [*[1] * (val.dim() - 2), 1, size])
    keep = put(aten.le.Tensor, key, query)
    if band.window is not None:
        keep = put(
            aten.bitwise_and.Tensor, keep, put(aten.gt.Tensor, key, put(aten.sub.Tensor, query, band.window))
        )
    if val.dtype is torch.bool:
        return keep
    zero = put(aten.full.default, [], 0.0, dtype=val.dtype, device=val.device)
    return put(aten.where.ScalarOther, keep, zero, band.drop if band.drop is not None else 0.0)


def _take(user: fx.Node, mask: fx.Node, plain: fx.Node) -> int:
    """Let `user` read `plain`, which broadcasts where `mask` was written out, if that gives the same
    shape."""
    old = VAL.get(user)
    if not (user.target is _SDPA or is_elementwise(user)) or not isinstance(old, torch.Tensor):
        return 0
    user.replace_input_with(mask, plain)
    new = evaluate(user.graph, function(user), user.args, user.kwargs)
    if len(new.shape) != len(old.shape) or not all(_same(a, b) for a, b in zip(new.shape, old.shape)):
        user.replace_input_with(plain, mask)
        return 0
    return 1
