"""What is read at the ids of a routing.

- Weights: `w[ids]`, `w.index_select(0, ids)`, `F.embedding(ids, w)`: an entry per (token, choice).
- Of what all experts made of all tokens, what the chosen ones made: `y.gather(1, ids[..., None].expand(..))`,
  `y[arange(N)[:, None], ids]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import fx

from tedfx.capture.batched import refuse
from tedfx.capture.batched_dims import ALONG
from tedfx.capture.routing import Dims, Fact, Routing, argument, name_of, shape_of
from tedfx.graph.nodes import REGROUPS, is_tensor, leading_to, operand

__all__ = ["Gathers", "Picked", "gathered", "last_product", "picked"]

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
    body = set(leading_to(end, follows))
    if not set(readers) <= body:
        raise refuse(
            "gathered weights meet tokens in several places", end, "let one sum end an expert's work"
        )
    return end, body


@dataclass(frozen=True)
class Picked:
    """Rows of (token, choice) read of `source`, whose dim `dim` is that of the experts. `dims`: labels of the
    leading dims of what is read."""

    source: fx.Node
    dim: int
    routing: Routing
    dims: Dims


def picked(node: fx.Node, known: Mapping[fx.Node, Fact]) -> Picked | None:
    name = name_of(node)
    if name == "gather":
        source, index, rank = operand(node, 0), operand(node, 2), len(shape_of(node))
        dim = argument(node, "dim") % rank
        if name_of(index) in ("expand", "repeat"):
            index = operand(index, 0)
        fact = known.get(index)
        if fact is None or fact.kind != "ids" or len(fact.dims) != rank or fact.dims[dim] not in (("k",), ()):
            return None
        if any(a != b for d, (a, b) in enumerate(zip(shape_of(source), shape_of(node))) if d != dim):
            return None
        return Picked(source, dim, fact.routing, fact.dims)
    if name == "index" and len(argument(node, "indices")) == 2:
        source, (numbers, ids) = operand(node, 0), argument(node, "indices")
        fact = known.get(ids) if is_tensor(ids) else None
        if fact is None or fact.kind != "ids" or not fact.dims or not is_tensor(numbers):
            return None
        shape = [shape_of(ids)[0], *[1] * (len(fact.dims) - 1)]
        if shape_of(numbers) != shape or shape_of(source)[0] != shape[0] or len(fact.dims) > 2:
            return None
        while name_of(numbers) in REGROUPS | {"unsqueeze"}:
            numbers = operand(numbers, 0)
        tokens = next(iter(fact.dims))
        if name_of(numbers) == "arange" and len(numbers.args) == 1 and tokens not in ((), ("k",)):
            return Picked(source, 1, fact.routing, fact.dims)
    return None
