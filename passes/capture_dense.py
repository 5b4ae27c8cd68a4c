"""Experts that are computed for a tensor of assignments become dispatch, body on rows, combine.

    hidden = act(einsum("nh,nkhf->nkf", x, w1[ids]))              gathered weights: a matrix per assignment
    y = (einsum("nkf,nkfh->nkh", hidden, w2[ids]) * w[..., None]).sum(1)

    y = einsum("ne,enh->nh", gate, act(x @ w1) @ w2)              all experts on all tokens, gate zero outside
                                                                  the router's choice

In both the model computes a tensor of (token, choice) or (expert, token) rows, each with the weights of its
expert, and sums a token's rows. `dispatch` makes the rows of (token, choice) alone, and the weights stay
where they are.

What is left out, of all experts on all tokens, is multiplied by a gate that is exactly zero there and whose
gradient is dropped there (gates.py): so loss and all gradients stay what they are, as long as what an expert
computes on a token that did not choose it is finite. A gate may also stand before the experts (Llama 4), if
these provably give zero for a token of zeros (vanishing.py).

Algorithm:
1. `facts` (masks.py): ids in a known range, and gates.
2. Of gathered weights: the nodes that follow the gathers by one routing's ids, up to the sum over the
   choices, or with one choice up to the last product. Of all experts: from each product with a gate, or from
   where results are read at the ids, back to where the dim of experts begins (spread.py), and forward to the
   sum over the experts or choices.
3. The body between is walked by `DenseBodies`, which proves that it keeps rows apart and emits it on the rows
   of a dispatch.
4. What is not proven is left as it is, with a note; where ranks are to share experts, `shard_experts` refuses
   it by its style (uncaptured.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

from torch import fx

from tedfx.capture.batched import refuse
from tedfx.capture.dense_bodies import DenseBodies, Ending
from tedfx.capture.gathers import Picked, gathered, last_product, picked
from tedfx.capture.letters import contraction_of
from tedfx.capture.masks import facts
from tedfx.capture.routing import Fact, Routing, argument, name_of, shape_of
from tedfx.capture.spread import Spread
from tedfx.capture.stacks import Stacks
from tedfx.capture.uncaptured import LEFT
from tedfx.errors import TedfxError, user_line
from tedfx.graph.nodes import REGROUPS, is_tensor, leading_to
from tedfx.passes.base import Pass, PassResult
from tedfx.stages.graphs import GlobalGraph

__all__ = ["CaptureDense"]

_LAYOUT = REGROUPS | {"permute", "transpose", "unsqueeze", "to", "_to_copy", "clone", "contiguous", "alias"}


@dataclass(frozen=True)
class CaptureDense(Pass[GlobalGraph]):
    """See the module's docstring."""

    requires: ClassVar[frozenset[str]] = frozenset({"functional"})
    provides: ClassVar[frozenset[str]] = frozenset({"dense captured"})

    def __call__(self, program: GlobalGraph) -> PassResult:
        graph, result = program.graph_module.graph, PassResult()
        known = facts(graph)
        stacks = Stacks(program.trace, program.trainable)
        found = [kind(graph, known, stacks) for kind in (_gathered, _picked, _gated)]
        for first, routing, attempt in chain.from_iterable([list(attempts) for attempts in found]):
            before, state = set(graph.nodes), stacks.state()
            if first not in before:  # part of what was captured
                continue
            try:
                end = attempt()
            except TedfxError as error:
                _undo(graph, before)
                stacks.restore(state)
                result.notes.append(LEFT + str(error).partition(": ")[2])
                continue
            if end is not None:
                result.matches += 1
                result.notes.append(f"{routing.experts} experts at {end}")
        stacks.finish()
        result.changes = result.matches
        return result


# The first node of what may be a mixture, its routing, and what captures it: gives its line, None if it is
# none.
_Attempt = tuple[fx.Node, Routing, Callable[[], str | None]]


def _gathered(graph: fx.Graph, known: dict[fx.Node, Fact], stacks: Stacks) -> Iterator[_Attempt]:
    for routing, gathers in gathered(graph, known).items():

        def attempt(routing=routing, gathers=gathers) -> str | None:
            if routing.choices > 1:
                inside = set(gathers)
            else:
                node, inside = last_product(graph, gathers)
            bodies = DenseBodies(graph, routing, known, stacks, inside, gathers, {}, {})
            if routing.choices > 1:
                return _replace(graph, bodies, _forward(graph, bodies))
            with graph.inserting_before(node):
                end = bodies.last(node)
            return _replace(graph, bodies, end)

        yield next(iter(gathers)), routing, attempt


def _gated(graph: fx.Graph, known: dict[fx.Node, Fact], stacks: Stacks) -> Iterator[_Attempt]:
    for node in list(graph.nodes):
        if name_of(node) != "mul" and contraction_of(node) is None:
            continue
        for gate in node.all_input_nodes:
            fact = known.get(gate)
            if fact is None or fact.kind != "gate" or fact.expert is not None or node in known:
                continue

            def attempt(node=node, gate=gate, fact=fact) -> str | None:
                return _gated_by(graph, known, stacks, node, gate, fact)

            yield node, fact.routing, attempt


def _picked(graph: fx.Graph, known: dict[fx.Node, Fact], stacks: Stacks) -> Iterator[_Attempt]:
    for node in list(graph.nodes):
        pick = picked(node, known)
        if pick is not None:

            def attempt(node=node, pick=pick) -> str | None:
                return _picked_by(graph, known, stacks, node, pick)

            yield node, pick.routing, attempt


def _picked_by(
    graph: fx.Graph, known: dict[fx.Node, Fact], stacks: Stacks, node: fx.Node, pick: Picked
) -> str | None:
    spread = Spread(pick.routing.experts)
    if not spread.inside(pick.source, pick.dim):
        return None
    inside = {*spread.dims, node}
    bodies = DenseBodies(graph, pick.routing, known, stacks, inside, {}, spread.dims, {node: pick})
    if pick.routing.choices > 1:
        return _replace(graph, bodies, _forward(graph, bodies))
    with graph.inserting_before(node):
        end = bodies.last(node)
    return _replace(graph, bodies, end)


def _gated_by(
    graph: fx.Graph, known: dict[fx.Node, Fact], stacks: Stacks, node: fx.Node, gate: fx.Node, fact: Fact
) -> str | None:
    """The experts that `gate` weighs in `node`, if it does."""
    spread = Spread(fact.routing.experts)
    at = next((d for d, dim in enumerate(fact.dims) if "e" in dim), None)
    if at is None:
        return None
    parsed = contraction_of(node)
    if parsed is not None:
        (_, letters), (y, theirs) = (parsed[0], parsed[1]) if parsed[0][0] is gate else (parsed[1], parsed[0])
        if letters[at] not in theirs or letters[at] in parsed[2]:
            return None
        dim = theirs.index(letters[at])
    else:
        others = [x for x in node.all_input_nodes if x is not gate and is_tensor(x)]
        if len(others) != 1:
            return None
        y = others[0]
        dim = at - len(fact.dims) + len(shape_of(y))
    if len(fact.dims[at]) == 1 and dim >= 0 and spread.inside(y, dim):
        bodies = DenseBodies(graph, fact.routing, known, stacks, set(spread.dims), {}, spread.dims, {})
    elif parsed is None and (entries := _products(node)):
        bodies = DenseBodies(graph, fact.routing, known, stacks, entries, {}, {}, {})
    else:
        return None
    return _replace(graph, bodies, _forward(graph, bodies))


def _products(node: fx.Node) -> set[fx.Node]:
    """Products of tokens that a gate was multiplied to, seen through layouts, with parameters."""
    found, todo = set(), [node]
    while todo:
        source = todo.pop()
        for user in source.users:
            if name_of(user) in _LAYOUT:
                todo.append(user)
            elif contraction_of(user) is not None and any(
                all(isinstance(s, int) for s in shape_of(x)) for x in user.all_input_nodes
            ):
                found.add(user)
    return found


def _forward(graph: fx.Graph, bodies: DenseBodies) -> Ending:
    """The first sum over the choices or experts of what is in the body."""
    for node in list(graph.nodes):
        if not any(x in bodies.inside for x in node.all_input_nodes):
            continue
        if is_tensor(node):
            with graph.inserting_before(node):
                end = bodies.ending(node)
            if end is not None:
                return end
        bodies.inside.add(node)
    first = next(node for node in graph.nodes if node in bodies.inside)
    raise refuse(
        "what the experts compute does not end in one sum over a token's choices",
        first,
        "sum it: (y * w).sum(1)",
    )


def _replace(graph: fx.Graph, bodies: DenseBodies, end: Ending) -> str:
    region = set(leading_to(end.node, bodies.inside))
    sizes = _sizes(region, end.node)
    line = user_line(end.node)
    with graph.inserting_before(end.node):
        out = bodies.finish(end)
    read = [_size(graph, bodies, node, size) for node, size in sizes]
    for (_, size), new in zip(sizes, read):
        size.replace_all_uses_with(new)
    end.node.replace_all_uses_with(out)
    graph.erase_node(end.node)
    for node in reversed(list(graph.nodes)):
        if node in region and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return line


def _size(graph: fx.Graph, bodies: DenseBodies, node: fx.Node, size: fx.Node) -> fx.Node:
    """What the size of a node of the body is without it."""
    dim, labels = argument(size, "dim"), bodies.labels.get(node, ())
    if dim >= len(labels):
        raise refuse("the size of what experts compute is read", size, "read the size of the tokens")
    with graph.inserting_before(size):
        return bodies.size_of(labels[dim], size)


def _sizes(region: set[fx.Node], end: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """(node of the body, its size as the graph reads it). Nothing else outside may read what is inside."""
    found = []
    for node in region - {end}:
        for user in node.users:
            if user in region or not user.users:
                continue
            if name_of(user) != "sym_size":
                raise refuse(
                    "what an expert computes for a token is also used elsewhere",
                    user,
                    "use the sum over the experts only",
                )
            found.append((node, user))
    return found


def _undo(graph: fx.Graph, before: set[fx.Node]) -> None:
    for node in reversed(list(graph.nodes)):
        if node not in before:
            graph.erase_node(node)
