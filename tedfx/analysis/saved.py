"""Which values the backward of an op reads: what an op of ours says (`tedfx/ops/properties.py`), of torch's a
table by op.

An op that is not in the table is taken to keep its operands and its result.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch
from torch import fx

from tedfx.graph.aliases import may_alias
from tedfx.graph.facts import DIFFERENTIABLE, LOCAL_SHAPE, VAL
from tedfx.graph.nodes import arguments, op_name, operand, short_name
from tedfx.ops.properties import Op, properties

COPIES = frozenset(["reshape", "contiguous"])  # of a value that was expanded
# Ops that are no views, and whose backward needs nothing but sizes.
_NOTHING = frozenset(
    """add sub rsub neg sum mean cat stack to _to_copy type_as clone pad roll flip repeat tril triu
    cumsum getitem lift_fresh_copy""".split()
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
}
CONTRACTIONS = frozenset(
    """linear matmul mm bmm addmm baddbmm einsum grouped_linear slot_linear
    scaled_dot_product_attention""".split()
)


def is_value(node) -> bool:
    """A tensor, not a size or a list."""
    return isinstance(node, fx.Node) and (
        LOCAL_SHAPE.get(node) is not None or isinstance(VAL.get(node), torch.Tensor)
    )


def is_view(node: fx.Node) -> bool:
    """Whether a call's result, or each of its results, looks into the memory of its first operand. A cast is
    none: where it does nothing, `Sizing.root` knows by the dtypes."""
    return node.op == "call_function" and may_alias(node) and short_name(node) != "to"


def viewed(node: fx.Node) -> fx.Node:
    """What a node is, or may be, a view of."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        if not is_view(node) and not (short_name(node) == "getitem" and is_view(source)):
            break
        node = source
    return node


def saved(node: fx.Node) -> list[fx.Node]:
    """The values (operands, or the node itself) that the op's backward reads. Empty where no gradient goes
    through it."""
    if node.op != "call_function" or not DIFFERENTIABLE.get(node):
        return []
    values = [n for n in node.all_input_nodes if is_value(n)]
    if (ours := properties(node.target)) is not None:
        return _said(node, ours, values)
    name = short_name(node)
    if name in _NOTHING or may_alias(node):
        return []
    if name in _WHERE:
        where = node.args[_WHERE[name]]
        return [n for n in (where if isinstance(where, (list, tuple)) else [where]) if isinstance(n, fx.Node)]
    if name in _RESULT:
        return [node]
    if name in _OPERAND:
        return [operand(node, 0)]
    if name in _PRODUCTS or name == "div":
        return _factors(node, name)
    if name == "dropout":
        return []  # its mask is no node: see `hidden`
    if isinstance(VAL.get(node), (tuple, list)) and name in ("topk", "sort", "max", "min", "kthvalue"):
        return [u for u in node.users if u.args[1:] == (1,)]
    if name == "cross_entropy_loss":
        return values[1:]  # of the logits their log-softmax: see `hidden`
    return values if name == "layer_norm" else [*values, node]


def _said(node: fx.Node, ours: Op, values: list[fx.Node]) -> list[fx.Node]:
    """What the backward of an op of ours reads, in its own words."""
    if ours.saves == "operands":
        return values
    if ours.saves == "all":
        return [*values, node]
    return [n for i in ours.saves if isinstance(n := node.args[i], fx.Node)]


def _factors(node: fx.Node, name: str) -> list[fx.Node]:
    """Of a product: each factor whose partner has a gradient. A quotient reads its divisor either way."""
    operands = (
        list(arguments(node)[1])
        if name == "einsum"
        else list(arguments(node)[1:3] if name in ("addmm", "baddbmm") else arguments(node)[:2])
    )
    if len(operands) != 2:
        return [n for n in operands if is_value(n)]
    a, b = operands
    learns = lambda n: is_value(n) and bool(DIFFERENTIABLE.get(n))
    found = [a] * learns(b) + [b] * (learns(a) or (name == "div" and learns(b)))
    return [n for n in dict.fromkeys(found) if is_value(n)]


def saves(node: fx.Node) -> bool:
    """Whether the op's backward reads any tensor at all."""
    return bool(saved(node)) or hidden(node, lambda n: 1) > 0


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
    runs = result or hidden(node, lambda n: 1) > 0 or not op_name(node).startswith("aten.")
    return nodes[: last + runs]


def hidden(node: fx.Node, elements: Callable[[fx.Node], float]) -> float:
    """Bytes that a backward reads and that are no node of the graph: a dropout's mask, attention's
    log-sum-exp, a loss's log-softmax."""
    if not DIFFERENTIABLE.get(node):
        return 0
    name = short_name(node)
    if name == "dropout":
        return elements(node)  # a bool each
    if name == "scaled_dot_product_attention":
        width = LOCAL_SHAPE[node][-1] if LOCAL_SHAPE.get(node) else 1
        return 4 * elements(node) / (int(width) if not isinstance(width, sympy.Expr) else 1)
    if name == "cross_entropy_loss":
        return elements(operand(node, 0)) * dtype_of(operand(node, 0)).itemsize
    return 0


def dtype_of(node: fx.Node) -> torch.dtype:
    """Of a value, or of the value that it moves."""
    while not isinstance(VAL.get(node), torch.Tensor):
        if not node.all_input_nodes:
            return torch.int64
        node = node.all_input_nodes[0]
    return VAL[node].dtype
