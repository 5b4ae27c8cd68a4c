"""Experts written one by one, all of whose results are used, become one computation with a dim of experts.

    for e, expert in enumerate(self.experts):                   gate [N, E] may be nonzero for every expert
        out = out + gate[:, e : e + 1] * expert(x)

    y = torch.stack([expert(x) for expert in self.experts], 1)  .. or the experts' results side by side,
    out = (gate.unsqueeze(-1) * y).sum(1)                       which something with a dim of experts weighs

    out = out + (ids == e) * expert(x)                          .. or ids in no known range weigh them

All are left by the passes that dispatch tokens, since no token can be left out. What is made of them here,
products with stacked weights and a dim of experts, is what a mesh cuts (tedfx/decisions/dense_experts.py).

Algorithm:
0. The masks of such ids become the entries of a gate (tedfx/capture/compared.py).
1. A value of which E entries are taken one by one, all of a dim, may be a gate. With the facts that follow
   from it (masks.py) a sum that adds every expert once is found as that of any loop (chains.py).
2. A stack of E values is taken if a product with a value that has a dim of size E follows.
3. The E values are walked in lock-step on copies of all tokens (copies.py), which proves that they are one
   body with different parameters. What is not proven, or has no matrices of its own, is left as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tedfx.capture.batched import Batched, refuse
from tedfx.capture.batched_dims import ALONG
from tedfx.capture.chains import chain_of, dependence, is_zero
from tedfx.capture.compared import write_gates
from tedfx.capture.copies import Copies
from tedfx.capture.letters import contraction_of
from tedfx.capture.masks import facts
from tedfx.capture.routing import Fact, Routing, argument, name_of, shape_of
from tedfx.capture.stacks import Stacks
from tedfx.capture.uncaptured import LEFT
from tedfx.dtypes import has_gradient
from tedfx.errors import TedfxError, user_line
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import REGROUPS, is_tensor
from tedfx.graph.nodes import argument as nth
from tedfx.passes.base import Pass, PassResult
from tedfx.placement.sizes import divides
from tedfx.stages.graphs import GlobalGraph

__all__ = ["StackExperts"]

aten = torch.ops.aten
_LAYOUT = (
    REGROUPS
    | ALONG
    | {"permute", "transpose", "unsqueeze", "getitem", "to", "clone", "contiguous", "movedim"}
)


@dataclass(frozen=True)
class StackExperts(Pass[GlobalGraph]):
    """See the module's docstring."""

    requires: ClassVar[frozenset[str]] = frozenset({"dense captured"})
    provides: ClassVar[frozenset[str]] = frozenset({"experts stacked"})

    def __call__(self, program: GlobalGraph) -> PassResult:
        graph, result = program.graph_module.graph, PassResult()
        write_gates(graph)
        stacks = Stacks(program.trace, program.trainable)
        for found in (_sums, _lists):
            for end, attempt in list(found(graph, stacks)):
                before, state = set(graph.nodes), stacks.state()
                try:
                    new = attempt()
                except TedfxError as error:
                    _undo(graph, before)
                    stacks.restore(state)
                    result.notes.append(LEFT + str(error).partition(": ")[2])
                    continue
                end.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
                result.matches += 1
                result.notes.append(f"experts stacked at {user_line(end)}")
        for node in reversed(graph.nodes):
            if node.op == "call_function" and not node.users and not node.is_impure():
                graph.erase_node(node)
        graph.eliminate_dead_code()
        stacks.finish()
        result.changes = result.matches
        return result


# What ends a mixture, and what makes of it the value that takes its place.
_Attempt = tuple[fx.Node, Callable[[], fx.Node]]


def _sums(graph: fx.Graph, stacks: Stacks) -> Iterator[_Attempt]:
    """The last steps of sums over experts."""
    known = facts(graph)
    gates = {node: fact for node in graph.nodes if node not in known and (fact := _gate(node)) is not None}
    known = facts(graph, gates)
    routings = {fact.routing for fact in gates.values()}
    depends, ends = dependence(graph, known)
    for routing, end in ends:
        if routing not in routings:
            continue

        def attempt(routing=routing, end=end) -> fx.Node:
            chain, base = chain_of(end, routing, depends)
            if chain[0].index is not None:
                raise refuse("an expert adds at some tokens only", end, "add all of them")
            with graph.inserting_before(end):
                bodies = Copies(graph, routing, known, stacks)
                value = _rows(bodies, tuple(step.value for step in chain), end)
                if value.kind != "weighted":
                    raise refuse("an expert's result is not weighed", end, "multiply it by gate[:, e]")
                rows, weights = bodies.by_expert(value.node, end), bodies.weights(value.of, end)
                out = bodies.emit(aten.einsum.default, ("eno,ne->no", [rows, weights]), {}, end)
                out = _shaped(bodies, out, end)
                if base is not None and not is_zero(base):
                    out = bodies.emit(aten.add.Tensor, (base, out), {}, end)
                return out

        yield end, attempt


def _gate(node: fx.Node) -> Fact | None:
    """A value all of whose entries along one dim are taken one by one: what a gate over experts would be."""
    if not is_tensor(node) or node.op != "call_function" or not has_gradient(VAL[node].dtype):
        return None
    shape, taken = shape_of(node), dict[int, set[int]]()
    for user in node.users:
        if name_of(user) in ("select", "slice"):
            dim = argument(user, "dim") % len(shape)
            at = argument(user, "index") if name_of(user) == "select" else argument(user, "start") or 0
            if isinstance(at, int) and (name_of(user) == "select" or shape_of(user)[dim] == 1):
                taken.setdefault(dim, set()).add(at % shape[dim] if isinstance(shape[dim], int) else at)
        elif name_of(user) == "unbind":
            dim = argument(user, "dim") % len(shape)
            taken[dim] = {nth(x, 1) for x in user.users if x.target is operator.getitem}
    for dim, numbers in taken.items():
        size = shape[dim]
        if isinstance(size, int) and size > 1 and len(shape) > 1 and numbers == set(range(size)):
            labels = ["e" if d == dim else f"t{d - (d > dim)}" for d in range(len(shape))]
            dims = tuple((label,) for label in labels)
            routing = Routing(node, dims, dict(zip(labels, shape)), size, unique=True)
            return Fact("gate", routing, dims, weight=(node, dims))
    return None


def _lists(graph: fx.Graph, stacks: Stacks) -> Iterator[_Attempt]:
    """Stacks of experts' results."""
    for node in list(graph.nodes):
        if name_of(node) != "stack":
            continue
        parts: tuple[fx.Node, ...] = tuple(nth(node, 0))
        if (
            len(set(parts)) < max(len(parts), 2)
            or len(shape_of(parts[0])) < 2
            or not _weighs(graph, node, len(parts))
        ):
            continue

        def attempt(node=node, parts=parts) -> fx.Node:
            labels = [f"t{d}" for d in range(len(shape_of(parts[0])) - 1)]
            sizes = {**dict(zip(labels, shape_of(parts[0]))), "e": len(parts)}
            routing = Routing(node, tuple((x,) for x in labels), sizes, len(parts), unique=True)
            with graph.inserting_before(node):
                bodies = Copies(graph, routing, {}, stacks)
                rows = _rows(bodies, parts, node)
                if rows.kind != "rows":
                    raise refuse("experts are weighed before they are stacked", node, "weigh them after")
                made = bodies.by_expert(rows.node, node)
                if len(labels) > 1:
                    sizes = bodies.sizes(shape_of(parts[0])[:-1], node)
                    shape = [len(parts), *sizes, shape_of(parts[0])[-1]]
                    made = bodies.emit(aten.reshape.default, (made, shape), {}, node)
                at, order = argument(node, "dim") % len(shape_of(node)), list(range(1, len(shape_of(node))))
                return bodies.emit(aten.permute.default, (made, [*order[:at], 0, *order[at:]]), {}, node)

        yield node, attempt


def _weighs(graph: fx.Graph, stack: fx.Node, experts: int) -> bool:
    """Whether a product of the stack with something that has a dim of experts, or of their slots, follows."""
    found = {stack}
    for node in graph.nodes:
        sources = [x for x in node.all_input_nodes if x in found]
        if not sources:
            continue
        if name_of(node) in _LAYOUT:
            found.add(node)
        elif name_of(node) == "mul" or contraction_of(node) is not None:
            others = [x for x in node.all_input_nodes if x not in found and is_tensor(x)]
            sizes = [s for x in others if x.op == "call_function" for s in shape_of(x)]
            if any(divides(experts, size) for size in sizes):
                return True
    return False


def _rows(bodies: Copies, values: tuple[fx.Node, ...], like: fx.Node) -> Batched:
    """The E values as rows (E * N, features)."""
    out = bodies.lift(values)
    if out.kind not in ("rows", "weighted") or out.right != 1 or out.start or not bodies.products:
        raise refuse(
            "what an expert gives is not a row of features per token, made by matrices of its own",
            like,
            "let every expert map each token to a row",
        )
    if len(shape_of(out.node)) != 2:
        rows = bodies.emit(aten.reshape.default, (out.node, [-1, shape_of(out.node)[-1]]), {}, like)
        out = Batched(out.kind, rows, out.like, 1, out.span, out.of)
    return out


def _shaped(bodies: Copies, out: fx.Node, end: fx.Node) -> fx.Node:
    """[N, features] in the shape and dtype of the model's sum."""
    if VAL[out].dtype != VAL[end].dtype:
        out = bodies.emit(aten.to.dtype, (out, VAL[end].dtype), {}, end)
    if len(shape_of(end)) > 2:
        sizes = bodies.sizes(shape_of(end)[:-1], end)
        out = bodies.emit(aten.reshape.default, (out, [*sizes, shape_of(end)[-1]]), {}, end)
    if shape_of(out) != shape_of(end):
        raise refuse(f"a sum of shape {shape_of(end)} over experts that add {shape_of(out)}", end, "")
    return out


def _undo(graph: fx.Graph, before: set[fx.Node]) -> None:
    for node in reversed(list(graph.nodes)):
        if node not in before:
            graph.erase_node(node)
