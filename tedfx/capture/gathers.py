"""Weights gathered by the ids of a routing: `w[ids]`, `w.index_select(0, ids)`, `F.embedding(ids, w)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torch import fx

from tedfx.capture.batched import refuse
from tedfx.capture.batched_dims import ALONG
from tedfx.capture.routing import Dims, Fact, Routing, argument, name_of, shape_of
from tedfx.graph.nodes import REGROUPS, is_tensor, operand

__all__ = ["Gathers", "gathered", "last_product"]

Gathers: TypeAlias = dict[fx.Node, tuple[fx.Node, Dims]]  # of each gather the stack and the labels of its ids
_LAYOUT = (
    REGROUPS
    | ALONG
    | set(
        "permute transpose unsqueeze select unbind getitem to _to_copy clone contiguous alias type_as".split()
    )
)


def gathered(graph: fx.Graph, known: Mapping[fx.Node, Fact]) -> dict[Routing, Gathers]:
    """Gathers of whole entries of stacks with one entry per expert, by routing."""
    found: dict[Routing, Gathers] = {}
    for node in graph.nodes:
        stack, ids = _gather(node)
        fact = known.get(ids) if ids is not None else None
        if (
            stack is None
            or fact is None
            or fact.kind != "ids"
            or stack in known
            or len(shape_of(stack)) < 2
            or shape_of(stack)[0] != fact.routing.experts
            or not all(isinstance(size, int) for size in shape_of(stack))
        ):
            continue
        found.setdefault(fact.routing, {})[node] = (stack, fact.dims)
    return {
        routing: gathers
        for routing, gathers in found.items()
        if any(len(shape_of(node)) - len(dims) >= 2 for node, (_, dims) in gathers.items())
        or any(name_of(node) == "embedding" for node in gathers)
    }


def _gather(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    name = name_of(node)
    if name == "index" and len(argument(node, "indices")) >= 1:
        first, *rest = argument(node, "indices")
        if isinstance(first, fx.Node) and all(x is None for x in rest):
            return operand(node, 0), first
    if name == "index_select" and argument(node, "dim") == 0 and shape_of(node):
        return operand(node, 0), argument(node, "index")
    if name == "embedding" and not argument(node, "scale_grad_by_freq") and not argument(node, "sparse"):
        if (argument(node, "padding_idx") or 0) < 0 or argument(node, "padding_idx") is None:
            return operand(node, 0), argument(node, "indices")
    return None, None


def last_product(graph: fx.Graph, gathers: Gathers) -> tuple[fx.Node, set[fx.Node]]:
    """Of a routing with one choice per token: the last node that reads gathered entries, and the nodes of the
    body up to it."""
    entries, follows, readers = set(gathers), set(gathers), []
    for node in graph.nodes:
        sources = [x for x in node.all_input_nodes if x in follows]
        if not sources:
            continue
        follows.add(node)
        if all(x in entries for x in sources) and name_of(node) in _LAYOUT:
            entries.add(node)
        elif is_tensor(node) and any(x in entries for x in sources):
            readers.append(node)
    if not readers:
        raise refuse("gathered weights meet no token", next(iter(gathers)), "")
    end = readers[-1]
    if name_of(end) == "mul" and [name_of(user) for user in end.users] == ["sum"]:
        (end,) = end.users
    body, todo = {end}, [end]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source in follows and source not in body:
                body.add(source)
                todo.append(source)
    if not set(readers) <= body:
        raise refuse(
            "gathered weights meet tokens in several places", end, "let one sum end an expert's work"
        )
    return end, body
