"""One-hot dispatch with a capacity becomes dispatch, body, combine; dropped assignments have weight zero and
are not sent.

    inputs = einsum("nec,nh->ech", dispatch_mask, x)         the rows of an expert in its slots
    outputs = experts(inputs)                                 (E, C, ..), the experts stacked or one by one
    y = einsum("nec,ech->nh", combine_weights, outputs)

Both tensors of N x E x C entries say nothing but: token n goes, by its choice k, to expert ids[n,k], unless
it was dropped, with a weight. If no two tokens share a slot, y[n] = sum_k weight[n,k] keep[n,k]
expert_{ids[n,k]}(x[n]), and neither tensor needs to exist; the router, the masks, positions and capacities
from which they were made stay the model's own nodes, so order, drops and capacity are the model's over the
global batch.

Algorithm:
1. Choices that are handled one by one are taken apart (tedfx/capture/one_by_one.py), and running sums without
   their own entry written as such (running_sums.py). `slot_facts`: what masks and places mean (slots.py,
   slot_facts.py).
2. A product that sums a mask of hits and slots over experts and slots is a **combine**, over tokens a
   **dispatch**. Between them the body is followed back (capture_slot_bodies.py), which refuses what mixes
   slots. An empty slot reaches no token, so what a bias makes of it does not matter.
3. Proven at the dispatch: its mask is 0 or 1; it is 1 wherever the combine's weight is not 0, term by term;
   no two tokens share a slot.
4. ids [N, K] of all choices side by side, those of dropped assignments no expert's, so that they are not
   sent; weights [N, K] from the values of the terms; `combine` takes the place of the product. How many slots
   an expert has is kept with the dispatch (`tedfx/placement/slots.py`). Where the dispatch mask passes a
   gradient straight to the weights (`mask + weights - weights.detach()`), a token's row is x[n] times
   1 + weight[n,k] - weight[n,k].detach(), so every choice is dispatched as a token of its own.
5. What only the masks needed is dead. A dispatch that is left was not understood: refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from tedfx.capture.choices import Choices
from tedfx.capture.one_by_one import apart
from tedfx.capture.routing import shape_of
from tedfx.capture.running_sums import without_their_own
from tedfx.capture.slot_bodies import SlotBodies
from tedfx.capture.slot_facts import slot_facts
from tedfx.capture.slot_products import Product, between, dispatch_before, labelled, product_of, refuse
from tedfx.capture.slots import Term, shared_slot, sizes_of
from tedfx.capture.stacks import Stacks
from tedfx.capture.uncaptured import LEFT
from tedfx.errors import CaptureError, TedfxError, user_line
from tedfx.graph.emit import emit
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import reached_from
from tedfx.passes.base import Pass, PassResult
from tedfx.placement.sizes import as_size
from tedfx.placement.slots import Slots
from tedfx.stages.graphs import GlobalGraph

__all__ = ["CaptureCapacity"]

aten = torch.ops.aten


@dataclass(frozen=True)
class CaptureCapacity(Pass[GlobalGraph]):
    """See the module's docstring."""

    requires: ClassVar[frozenset[str]] = frozenset({"functional"})
    provides: ClassVar[frozenset[str]] = frozenset({"capacities captured"})

    def __call__(self, program: GlobalGraph) -> PassResult:
        graph, trace = program.graph_module.graph, program.trace
        apart(graph)
        without_their_own(graph)
        result, known = PassResult(), slot_facts(graph)
        found = [c for c in (product_of(node, known) for node in graph.nodes) if c is not None]
        if not found:
            return result
        stacks = Stacks(trace, program.trainable)
        starts = {c.node: c for c in found if c.role == "dispatch"}
        for node in [c.node for c in found if c.role == "combine"]:
            end = product_of(node, known)  # anew: what it combines may be the end of one inside of it
            if end is None:
                raise TedfxError(f"the end of a mixture is none any more | at {user_line(node)}")
            start = dispatch_before(graph, end, starts)
            if any(n.target is torch.ops.tedfx.dispatch.default for n in between(graph, start, end)):
                starts.pop(start.node)
                result.notes.append(
                    f"{LEFT}the experts are mixtures themselves, and theirs are dispatched; tokens come to "
                    f"the outer ones and back by products with masks | at {user_line(start.node)}"
                )
                continue
            _capture_with(graph, start, end, stacks)
            result.matches += 1
            result.notes.append(
                f"{end.mask.terms[0].routing.experts} experts with a capacity at {user_line(end.node)}"
            )
        for node in reversed(graph.nodes):
            if node.op == "call_function" and not node.users:
                graph.erase_node(node)
        graph.eliminate_dead_code()
        stacks.finish()
        left = set(graph.nodes)
        for node in starts:
            if node in left:
                raise refuse(
                    "tokens are put into slots of experts, and no sum over the slots was found that "
                    "puts them back",
                    node,
                    "combine: einsum('nec,ech->nh', ..)",
                )
        result.changes = result.matches
        return result


def _capture_with(graph: fx.Graph, start: Product, end: Product, stacks: Stacks) -> None:
    """With experts of the mixture; where their weights differ by a dim of the tokens as well, as where tokens
    stand in slots of an outer mixture, with an expert for each entry of both."""
    routing, state, before = end.mask.terms[0].routing, stacks.state(), set(graph.nodes)
    try:
        return _capture(graph, start, end, stacks, ())
    except CaptureError as error:
        kept = {x for letter, dim in start.labels.items() if letter in start.out for x in dim}
        over = tuple(x for x in routing.tokens if x in kept and isinstance(routing.sizes[x], int))
        if not over:
            raise
        for node in reversed(list(graph.nodes)):
            if node not in before:
                graph.erase_node(node)
        stacks.restore(state)
        try:
            _capture(graph, start, end, stacks, over)
        except CaptureError:
            raise error from None


def _capture(graph: fx.Graph, start: Product, end: Product, stacks: Stacks, over: tuple[str, ...]) -> None:
    routing = end.mask.terms[0].routing
    _check(start, end)
    with graph.inserting_before(end.node):
        labels = tuple(start.labels[letter] for letter in start.out[:-1] if letter in start.labels)
        if len(labels) < len(start.out) - 1 or start.out[-1] in start.labels:
            raise refuse(
                "the features of a token are not its last dim",
                start.node,
                "put them last: einsum('nec,nh->ech', ..)",
            )
        sizes = {**sizes_of(start.mask), "c": sizes_of(start.mask)["c"]}
        bodies = SlotBodies(
            graph, routing, stacks, start.node, labels, sizes, reached_from(graph, {start.node}), over
        )
        choices = Choices(graph, end.mask.terms, end.node, over)
        x, slots = _tokens(graph, start, routing), _known_slots(start, routing, over)
        weights = choices.weights(end.node)
        if start.through:
            x, slots, weights = _straight(choices, x, slots, weights)
            dispatched, _, tail = choices.dispatch_each(x, slots)
        else:
            dispatched, tail = choices.dispatch(x, slots)
        bodies.start(dispatched, tail)
        value = bodies.value(end.other)
        if value.kind != "rows" or value.right != 1 or len(end.theirs) != value.span + 1:
            raise refuse(
                "what is combined is not a row of features per slot", end.node, "give every slot a row"
            )
        for letter, dim in zip(end.theirs, bodies.labels[end.other]):
            if end.labels.get(letter) != dim:
                raise refuse(
                    "slots are combined in another order than they were dispatched in",
                    end.node,
                    "sum over the same experts and slots",
                )
        out = emit(
            graph,
            torch.ops.tedfx.combine.default,
            (value.node, dispatched.sorted, weights),
            like=end.node,
        )
        if start.through:
            out = choices.emit(aten.reshape.default, out, [-1, choices.count, shape_of(out)[-1]])
            out = choices.emit(aten.sum.dim_IntList, out, [1])
        out = _shaped(graph, out, start, end, routing)
    end.node.replace_all_uses_with(out, delete_user_cb=lambda user: user is not out)


def _straight(choices: Choices, x: fx.Node, slots: Slots, weights: fx.Node) -> tuple[fx.Node, Slots, fx.Node]:
    """A token per choice, [N * K, H], that a gradient goes through to its weight; their slots and weights."""
    zero = choices.emit(aten.sub.Tensor, weights, choices.emit(aten.detach.default, weights))
    scale = choices.emit(aten.unsqueeze.default, choices.emit(aten.add.Tensor, zero, 1), -1)
    x = choices.emit(aten.mul.Tensor, choices.emit(aten.unsqueeze.default, x, 1), scale)
    x = choices.emit(aten.reshape.default, x, [-1, shape_of(x)[-1]])
    slots = replace(slots, tokens=(*slots.tokens, (choices.count, True)))
    return x, slots, choices.emit(aten.reshape.default, weights, [-1, 1])


def _check(start: Product, end: Product) -> None:
    """The dispatch gives each slot at most one token, and every token that has a weight its slot."""
    for term in start.mask.terms:
        if not (term.exact or term.nonzero):
            raise refuse(
                "the mask that dispatches is not provably 0 or 1",
                start.node,
                "dispatch by combine_weights.bool()",
            )
    if start.through and {*start.through} != {*end.mask.terms}:
        raise refuse(
            "the mask that dispatches passes a gradient to other weights than those that combine",
            start.node,
            "let it pass one to the combine's weights: mask + weights - weights.detach()",
        )
    over = {x for letter, dim in start.labels.items() if letter not in start.out for x in dim}
    shared = shared_slot(start.mask.terms, over)
    if shared:
        fix = (
            "count places as cumsum(mask) - mask over the tokens, later choices behind all earlier "
            "ones, and mask by place < capacity"
        )
        raise refuse(f"nothing proves that no two tokens share a slot: {shared}", start.node, fix)
    for term in end.mask.terms:
        if term.nonzero:
            raise refuse(
                "the combine's weights are a mask of other weights",
                end.node,
                "combine by the weights themselves",
            )
        if not any(_covers(other, term) for other in start.mask.terms):
            raise refuse(
                "the masks that dispatch and that combine are not made of the same experts and places",
                end.node,
                "dispatch by combine_weights.bool()",
            )
    if (
        len({term.routing.experts for term in end.mask.terms}) > 1
        or len({term.routing.tokens for term in end.mask.terms}) > 1
    ):
        raise refuse(
            "choices among different experts or of different tokens",
            end.node,
            "choose all from one matrix of scores",
        )


def _covers(dispatched: Term, combined: Term) -> bool:
    """The first is 1 wherever the second is not 0."""
    here, there = dispatched.slot, combined.slot
    if here is None or there is None or dispatched.routing is not combined.routing:
        return False
    if (here.queue, here.first) != (there.queue, there.first):
        return False
    return (
        dispatched.guards <= combined.guards
        if dispatched.exact
        else set(dispatched.values) <= set(combined.values)
    )


def _known_slots(start: Product, routing, own: tuple[str, ...]) -> Slots:
    over = {x for letter, dim in start.labels.items() if letter not in start.out for x in dim} | {*own}
    return Slots(
        sizes_of(start.mask)["c"],
        tuple((as_size(routing.sizes[label]), label in over) for label in routing.tokens),
    )


def _tokens(graph: fx.Graph, start: Product, routing) -> fx.Node:
    """The dispatched value as [N, H]."""
    x, shape = start.other, shape_of(start.other)
    given = labelled(start, start.theirs)
    feature = [d for d in range(len(start.theirs)) if d not in given]
    order = sorted(given, key=lambda d: routing.tokens.index(given[d][0]) if given[d] else 0)
    if (
        len(feature) != 1
        or not isinstance(shape[feature[0]], int)
        or tuple(x for d in order for x in given[d]) != routing.tokens
    ):
        raise refuse(
            "what is dispatched is not a row of features per token",
            start.node,
            "let it be (tokens, features)",
        )
    if order + feature != list(range(len(start.theirs))):
        x = emit(graph, aten.permute.default, (x, order + feature), like=start.node)
    return (
        x
        if len(start.theirs) == 2
        else emit(graph, aten.reshape.default, (x, [-1, shape[feature[0]]]), like=start.node)
    )


def _shaped(graph: fx.Graph, out: fx.Node, start: Product, end: Product, routing) -> fx.Node:
    """[N, H] as the model has it: its dims and dtype."""
    val = VAL[end.node]
    if VAL[out].dtype != val.dtype:
        out = emit(graph, aten.to.dtype, (out, val.dtype), like=end.node)
    given = labelled(end, end.out)
    order = sorted(given, key=lambda d: routing.tokens.index(given[d][0]) if given[d] else 0)
    (feature,) = [d for d in range(len(end.out)) if d not in given]
    if tuple(x for d in order for x in given[d]) != routing.tokens:
        raise refuse(
            "what is combined is not a row of features per token", end.node, "let it be (tokens, features)"
        )
    if len(order) > 1:
        # A token dim of the result has the size of that of the mask, which is what the masks were made from:
        # the ids.
        places = {label: d for d, label in enumerate(routing.dims)}
        if any(given[d] not in places for d in order):
            raise refuse(
                "tokens are grouped otherwise than where they were routed",
                end.node,
                "route and combine in the same groups",
            )
        sizes = [
            emit(graph, aten.sym_size.int, (routing.node, places[given[d]]), like=end.node) for d in order
        ]
        out = emit(graph, aten.reshape.default, (out, [*sizes, shape_of(out)[-1]]), like=end.node)
    dims = [*order, feature]
    if dims != list(range(len(dims))):
        out = emit(
            graph, aten.permute.default, (out, [dims.index(d) for d in range(len(dims))]), like=end.node
        )
    return out
