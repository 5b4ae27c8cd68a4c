"""What a call returns is its own: it shares memory with no parameter, buffer, constant or input.

A graph is functional, so a copy that the model makes of a buffer it then writes to, or of a parameter that
the optimizer will, is a node that does nothing, and is dropped. The memory itself is written to all the same:
a call's new buffer values are copied into the buffers when the graph has run, optimizers write to parameters,
and users to outputs. So

1. a buffer that a call writes to is read from a copy made before the graph runs: what is returned, saved for
   backward or recomputed is the old value;
2. an output that is, or is a view of, something that went in is copied when the graph has run. In eager mode
   such an output would follow the tensor that it is an alias of; here it keeps the value of its call, and may
   be written to.

Which outputs may be aliases is found once, from the storages of the trace's fake values; whether they are, in
each call, from those of the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tedfx._torch import storage_key
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import is_operator
from tedfx.ops.properties import properties

__all__ = ["apart", "may_alias", "possible_aliases", "returns_alias"]


def returns_alias(target: Any) -> bool:
    """Whether an operator's schema says that what it returns may share memory with an argument."""
    schema = getattr(target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def may_alias(node: fx.Node) -> bool:
    """Whether a call's result may be its first operand, or look into the memory of that."""
    if node.target is torch.ops.aten._unsafe_view.default:
        return True  # its schema is silent, since nobody else has the operand
    ours = properties(node.target)
    return returns_alias(node.target) if ours is None else ours.alias


def possible_aliases(graph: fx.Graph, skip: int) -> dict[int, tuple[int, ...]]:
    """{output: placeholders whose memory it may share}, by position; the first `skip` outputs are left
    out."""
    position = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    (output,) = graph.find_nodes(op="output")
    found: dict[int, tuple[int, ...]] = {}
    for index, value in enumerate(output.args[0]):
        if index >= skip and isinstance(value, fx.Node) and (sources := _sources(value, position)):
            found[index] = tuple(sorted(sources))
    return found


def apart(outputs: list[Any], operands: Sequence[Any], aliases: dict[int, tuple[int, ...]]) -> list[Any]:
    """The outputs, copies standing for those that share memory with an operand."""
    for index, sources in aliases.items():
        mine, theirs = outputs[index], [operands[i] for i in sources]
        if isinstance(mine, Tensor) and any(isinstance(x, Tensor) and _together(mine, x) for x in theirs):
            outputs[index] = mine.clone()
    return outputs


def _sources(value: fx.Node, position: dict[fx.Node, int]) -> set[int]:
    found: set[int] = set()
    todo, seen = [value], {value}
    while todo:
        node = todo.pop()
        if node in position:
            found.add(position[node])
            continue
        for operand in node.all_input_nodes:
            if operand not in seen and (not is_operator(node.target) or _shares(node, operand)):
                seen.add(operand)
                todo.append(operand)
    return found


def _shares(node: fx.Node, operand: fx.Node) -> bool:
    """Whether an operator's result may lie in its operand's memory; conversions and other plain functions are
    asked at run time."""
    a, b = VAL.get(node), VAL.get(operand)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is None or isinstance(a, (tuple, list))
    return _together(a, b) or returns_alias(node.target)


def _together(a: Tensor, b: Tensor) -> bool:
    return storage_key(a) == storage_key(b)
