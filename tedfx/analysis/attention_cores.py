"""The core of each attention: scores, softmax, dropout, weighted sum. Found from the graph, whatever wrote
it."""

from __future__ import annotations

from torch import fx

from tedfx.analysis.saved import CONTRACTIONS
from tedfx.graph.nodes import operand, short_name

_PRODUCTS = frozenset(["matmul", "bmm"])
_SOFTMAX = frozenset(["softmax", "_softmax"])


def attention_cores(graph: fx.Graph) -> list[list[fx.Node]]:
    """The nodes of each core, in order.

    1. The fused op, `scaled_dot_product_attention`, is one by itself.
    2. Written out: from a softmax up to the product of two activations that made the scores, and down to the
       product that the weights are the left operand of; the core is everything between the two products. A
       softmax over anything else (a router's) meets no such product and is none.
    """
    found = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if short_name(node) == "scaled_dot_product_attention":
            found.append([node])
        elif short_name(node) in _SOFTMAX:
            above = {
                n
                for n in _nearest(node, lambda n: n.all_input_nodes)
                if short_name(n) in _PRODUCTS and _activations(n)
            }
            below = {
                n for n in _nearest(node, lambda n: n.users) if short_name(n) in _PRODUCTS and _activations(n)
            }
            if len(above) == len(below) == 1:
                found.append(_between(graph, *above, *below))
    return found


def _nearest(node: fx.Node, neighbours) -> list[fx.Node]:
    """The contractions that are met first on every way from a node."""
    met, seen, todo = [], {node}, [node]
    while todo:
        for near in neighbours(todo.pop()):
            if near not in seen and near.op == "call_function":
                seen.add(near)
                (met if short_name(near) in CONTRACTIONS else todo).append(near)
    return met


def _activations(product: fx.Node) -> bool:
    """Whether both operands are made by the graph, not views of a parameter."""
    for value in (operand(product, 0), operand(product, 1)):
        while (
            value.op == "call_function"
            and len(value.all_input_nodes) == 1
            and short_name(value) not in CONTRACTIONS
        ):
            value = value.all_input_nodes[0]
        if value.op == "placeholder":
            return False
    return True


def _between(graph: fx.Graph, first: fx.Node, last: fx.Node) -> list[fx.Node]:
    after, before = {first}, {last}
    for node in graph.nodes:
        if any(i in after for i in node.all_input_nodes):
            after.add(node)
    for node in reversed(graph.nodes):
        if any(u in before for u in node.users):
            before.add(node)
    return [n for n in graph.nodes if n in after and n in before]
