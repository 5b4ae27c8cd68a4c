"""Which layer of the model a node belongs to.

A **layer** is everything below one indexed module path: `model.layers.3` for the path
`model.layers.3.mlp.gate`. The index is what makes it one of several; no name is looked at.
"""

from __future__ import annotations

from torch import fx

from tedfx.graph.facts import CONVERSION, MODULES, REGION
from tedfx.placement.types import P


def path_of(node: fx.Node) -> str:
    """The path of the innermost module that a node was traced in; "" where there is none."""
    stack = MODULES.get(node)
    return next(reversed(stack.values()))[0] if stack else ""


def layer_of(path: str) -> str:
    """`model.layers.3.mlp` -> `model.layers.3`; "" where no part is an index."""
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if at is None else ".".join(parts[: at + 1])


def layers(graph: fx.Graph) -> dict[fx.Node, str]:
    """The layer of each call, "" outside of all.

    A reduction belongs to the layer that makes its operand, other conversions to the layer that asks for
    them; in the middle of a layer, all of them and the arithmetic of sizes belong to it.
    """
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    layer = [layer_of(path_of(n)) for n in nodes]
    where = dict(zip(nodes, layer))
    for i, node in enumerate(nodes):
        around = (layer[i - 1] if i else "", layer[i + 1] if i + 1 < len(nodes) else "")
        if around[0] == around[1] and (node in CONVERSION or not path_of(node)):
            layer[i] = around[0]
        elif node in CONVERSION and CONVERSION[node][1] == P and node.args[0] in where:
            layer[i] = where[node.args[0]]
        where[node] = layer[i]
    return where


def regions(graph: fx.Graph) -> dict[int, list[fx.Node]]:
    """The nodes of each region that backward recomputes, by its number."""
    found: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if node in REGION:
            found.setdefault(REGION[node], []).append(node)
    return found
