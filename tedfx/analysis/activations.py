"""What autograd keeps of a local graph between forward and backward, and what its nodes cost to run again.

`saved(node)` says which values the backward of an op reads, from a table by op. `Ledger` adds their bytes up:
a value that several ops read counts once, a view counts as the tensor it looks into, parameters and inputs of
the graph count nothing (they are there anyway, or are gathered again). Of a region that is recomputed, its
inputs are kept instead of what its nodes save.

Sizes are one rank's. Rows after routing are counted as if the router spread its choices evenly; index vectors
of such rows that no rule gave a shape are left out, and so is what a fallback of a fused kernel keeps beyond
the kernel itself. An op that is not in the table is taken to keep its operands and its result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from math import prod

import sympy
import torch
from torch import fx

from tedfx.rules.base import op_name

_VIEWS = frozenset(
    """view reshape _unsafe_view flatten unflatten squeeze unsqueeze transpose t permute movedim
    swapaxes expand broadcast_to slice select narrow alias detach chunk split split_with_sizes
    unbind contiguous sum_gradient""".split()
)
_COPIES = frozenset(["reshape", "contiguous"])  # of a value that was expanded
_NOTHING = _VIEWS | frozenset(
    """add sub rsub neg sum mean cat stack to _to_copy type_as clone pad roll flip repeat tril triu
    cumsum cumsum_batched getitem mul_size all_reduce all_reduce_batched all_gather
    reduce_scatter shard partial all_to_all_single gather_lanes scatter_lanes local_counts
    send_slots return_slots gather_slots scatter_slots slot_rows route_slots axis_offset
    lift_fresh_copy gather_parameters""".split()
)
_RESULT = frozenset(
    "exp sigmoid tanh softmax _softmax log_softmax _log_softmax sqrt rsqrt reciprocal relu".split()
)
_OPERAND = frozenset(
    "silu gelu pow square log log1p sin cos abs erf leaky_relu elu softplus clamp clamp_min clamp_max "
    "hardswish mish".split()
)
_PRODUCTS = frozenset("mul linear matmul mm bmm addmm baddbmm einsum".split())
# Ops whose backward reads one operand that says where: its position.
_WHERE = {
    "gather": 2,
    "index_select": 2,
    "embedding": 1,
    "index": 1,
    "masked_fill": 1,
    "where": 0,
    "scatter": 2,
    "scatter_add": 2,
    "permute_rows": 1,
    "fill_slots": 1,
    "index_rows": 1,
    "unindex_rows": 1,
    "pick_rows": 1,
    "spread_lanes": 1,
    "expert_rows": 1,
    "vocab_parallel_embedding": 1,
}
CONTRACTIONS = frozenset(
    """linear matmul mm bmm addmm baddbmm einsum grouped_linear slot_linear
    scaled_dot_product_attention""".split()
)


def short_name(node: fx.Node) -> str:
    """The op without its namespace: `linear`, `combine`, `getitem`."""
    return op_name(node).rpartition(".")[2]


def is_value(node) -> bool:
    """A tensor, not a size or a list."""
    return isinstance(node, fx.Node) and (
        node.meta.get("local_shape") is not None or isinstance(node.meta.get("val"), torch.Tensor)
    )


def viewed(node: fx.Node) -> fx.Node:
    """What a node is, or may be, a view of."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        if short_name(node) not in _VIEWS and not (
            short_name(node) == "getitem" and short_name(source) in _VIEWS
        ):
            break
        node = source
    return node


def saved(node: fx.Node) -> list[fx.Node]:
    """The values (operands, or the node itself) that the op's backward reads. Empty where no gradient goes
    through it."""
    if node.op != "call_function" or not node.meta.get("differentiable"):
        return []
    name, inputs = short_name(node), node.all_input_nodes
    if name in _NOTHING:
        return []
    if name in _WHERE:
        where = node.args[_WHERE[name]]
        return [n for n in (where if isinstance(where, (list, tuple)) else [where]) if isinstance(n, fx.Node)]
    if name in _RESULT:
        return [node]
    if name in _OPERAND:
        return [node.args[0]]
    if name in _PRODUCTS or name == "div":
        return _factors(node, name)
    if name == "dropout":
        return []  # its mask is no node: see `_hidden`
    if name == "vocab_parallel_cross_entropy":
        return [node.args[0]]
    if isinstance(node.meta.get("val"), (tuple, list)) and name in ("topk", "sort", "max", "min", "kthvalue"):
        return [u for u in node.users if u.args[1:] == (1,)]
    values = [n for n in inputs if is_value(n)]
    if name == "cross_entropy_loss":
        return values[1:]  # of the logits their log-softmax: see `_hidden`
    if name in ("grouped_linear", "slot_linear", "combine", "combine_slots", "layer_norm"):
        return values
    return [*values, node]


def _factors(node: fx.Node, name: str) -> list[fx.Node]:
    """Of a product: each factor whose partner has a gradient. A quotient reads its divisor either way."""
    operands = (
        list(node.args[1])
        if name == "einsum"
        else list(node.args[1:3] if name in ("addmm", "baddbmm") else node.args[:2])
    )
    if len(operands) != 2:
        return [n for n in operands if is_value(n)]
    a, b = operands
    learns = lambda n: is_value(n) and bool(n.meta.get("differentiable"))
    found = [a] * learns(b) + [b] * (learns(a) or (name == "div" and learns(b)))
    return [n for n in dict.fromkeys(found) if is_value(n)]


def saves(node: fx.Node) -> bool:
    """Whether the op's backward reads any tensor at all."""
    return bool(saved(node)) or _hidden(node, lambda n: 1) > 0


def repeated(nodes: list[fx.Node]) -> list[fx.Node]:
    """Of a region's nodes in order, those that a recompute runs: it stops as soon as the last saved tensor is
    there again.

    Operands are saved before an op computes, results after it; an op of our own runs whole.
    """
    last = max((i for i, n in enumerate(nodes) if saves(n)), default=-1)
    if last < 0:
        return []
    node = nodes[last]
    result = any(value is node or node in value.all_input_nodes for value in saved(node))
    runs = result or _hidden(node, lambda n: 1) > 0 or not op_name(node).startswith("aten.")
    return nodes[: last + runs]


def _hidden(node: fx.Node, elements: Callable[[fx.Node], float]) -> float:
    """Bytes that a backward reads and that are no node of the graph: a dropout's mask, attention's
    log-sum-exp, a loss's log-softmax."""
    if not node.meta.get("differentiable"):
        return 0
    name = short_name(node)
    if name == "dropout":
        return elements(node)  # a bool each
    if name == "scaled_dot_product_attention":
        width = node.meta["local_shape"][-1] if node.meta.get("local_shape") else 1
        return 4 * elements(node) / (int(width) if not isinstance(width, sympy.Expr) else 1)
    if name == "cross_entropy_loss":
        return elements(node.args[0]) * dtype_of(node.args[0]).itemsize
    return 0


def dtype_of(node: fx.Node) -> torch.dtype:
    """Of a value, or of the value that it moves."""
    while not isinstance(node.meta.get("val"), torch.Tensor):
        if not node.all_input_nodes:
            return torch.int64
        node = node.all_input_nodes[0]
    return node.meta["val"].dtype


class Sizing:
    """Numbers for the nodes of a local graph, given one rank's size per symbol."""

    def __init__(self, values: Mapping[sympy.Symbol, int]):
        self.values, self._numbers, self._roots = dict(values), {}, {}

    def number(self, size) -> float:
        if isinstance(size, int):
            return size
        if size not in self._numbers:
            self._numbers[size] = float(sympy.sympify(size).subs(self.values))
        return self._numbers[size]

    def elements(self, node: fx.Node) -> float:
        """Of a value; 0 where no rule gave it a shape."""
        shape = node.meta.get("local_shape")
        return 0.0 if shape is None else float(prod(self.number(s) for s in shape))

    def bytes(self, node: fx.Node) -> float:
        return (
            0.0
            if node.op == "placeholder" or node.meta.get("parameter")
            else self.elements(node) * dtype_of(node).itemsize
        )

    def root(self, node: fx.Node) -> fx.Node:
        """The value whose memory a node looks into."""
        if node not in self._roots:
            source, name = node, short_name(node)
            if name == "getitem":
                viewed = short_name(node.args[0]) in _VIEWS
                source = self.root(node.args[0].args[0]) if viewed else node
            elif name in _VIEWS or (
                name == "to" and is_value(node.args[0]) and dtype_of(node) == dtype_of(node.args[0])
            ):
                source = self.root(node.args[0])
                if name in _COPIES and self.elements(source) < self.elements(node):
                    source = node
            self._roots[node] = source
        return self._roots[node]

    def flops(self, node: fx.Node) -> float:
        """Of one forward of the node: two per multiply-add of a contraction, one per element elsewhere, none
        for a view."""
        if node.op != "call_function" or not is_value(node):
            return 0.0
        name = short_name(node)
        if name in _VIEWS or name == "getitem":
            return 0.0
        out = self.elements(node)
        if name == "scaled_dot_product_attention":
            queries, keys = node.args[:2]
            return 4.0 * self.elements(queries) * self.number(keys.meta["local_shape"][-2])
        if name in CONTRACTIONS:
            first = next(n for n in node.all_input_nodes if is_value(n)) if name != "addmm" else node.args[1]
            return 2.0 * out * self.number(first.meta["local_shape"][-1])
        return out


class Ledger:
    """Bytes kept on one rank while some regions are recomputed: at first all of them."""

    def __init__(self, graph: fx.Graph, regions: Iterable[list[fx.Node]], sizing: Sizing):
        self.sizing, self.total, self._held = sizing, 0.0, Counter()
        self._price: dict = {}
        inside = {}
        for nodes in regions:
            inside.update(dict.fromkeys(nodes, id(nodes)))
        self._saved = {id(nodes): self._all_saved(nodes) for nodes in regions}
        self._inputs = {id(nodes): self._all_inputs(nodes) for nodes in regions}
        self._add(self._all_saved(n for n in graph.nodes if n not in inside))
        for keys in self._inputs.values():
            self._add(keys)

    def keep(self, region: list[fx.Node]) -> float:
        """Recompute a region no longer: what its nodes save is kept, its inputs for their own sake are not.
        The bytes that adds."""
        before = self.total
        self._add(self._saved[id(region)])
        self._drop(self._inputs[id(region)])
        return self.total - before

    def recompute(self, region: list[fx.Node]) -> None:
        """The reverse of `keep`."""
        self._add(self._inputs[id(region)])
        self._drop(self._saved[id(region)])

    def _all_saved(self, nodes) -> list:
        found: dict = {}
        for node in nodes:
            for value in saved(node):
                found[self._key(value)] = None
            hidden = _hidden(node, self.sizing.elements)
            if hidden:
                self._price[node.name] = hidden
                found[node.name] = None
        return list(found)

    def _all_inputs(self, nodes) -> list:
        members = set(nodes)
        outside = (i for n in nodes for i in n.all_input_nodes if i not in members and is_value(i))
        return list(dict.fromkeys(self._key(i) for i in outside))

    def _key(self, value: fx.Node):
        root = self.sizing.root(value)
        self._price.setdefault(root, self.sizing.bytes(root))
        return root

    def _add(self, keys) -> None:
        for key in keys:
            self.total += self._price[key] if not self._held[key] else 0
            self._held[key] += 1

    def _drop(self, keys) -> None:
        for key in keys:
            self._held[key] -= 1
            self.total -= self._price[key] if not self._held[key] else 0
