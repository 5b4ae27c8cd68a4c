"""The plain loop over experts becomes dispatch, one body on all rows, combine.

    for e, expert in enumerate(self.experts):                   ids [N, K]: which experts a token goes to
        token, slot = torch.where(ids == e)                              a search for the tokens of e
        out.index_add_(0, token, expert(x[token]) * w[token, slot, None])  a step: what e adds to the sum

in the graph: E chained steps, each with a copy of the expert's body. Nothing is known of the model; the loop
may be written over a ModuleList, a ParameterList or slices of stacked parameters, with masks from `==` or
one_hot, `nonzero`, boolean indices, `out[token] += ..`, or with no search at all (every expert on every
token, times a gate that is zero where the token did not choose it: an expert's contribution to such a token
is exactly zero as long as what it computes there is finite, so it need not be computed).

Algorithm:
1. `facts` (capture_routing.py): which nodes are about the tokens of which expert of which routing.
2. One walk over the graph: the set of experts that each node depends on, until it is all of them.
3. A step (index_add, index_put, add) with which the set becomes complete ends a chain. Follow it back through
   the accumulators: each step must add one expert's value, every expert of the routing exactly once; the
   first accumulator is whatever it is (zeros are dropped).
4. The E values are walked in lock-step (capture_bodies.py), which checks that they are one body with
   different parameters, and emits it once, on the rows of `dispatch`. `combine` takes the place of the last
   step.
   Experts of several structures are a loop per class (tedfx/capture/classes.py), and the sums are added.
5. A loop over the experts that were hit was traced over all (tedfx/frontends/hits.py): what said which they
   were is proven to name every expert with tokens (tedfx/capture/loads.py).
6. The loop is erased. A search for an expert's tokens that is still used is a loop that was not understood:
   refused. So is an answer given while tracing ("an expert has tokens", tedfx/frontends/loops.py) in a
   function from which no loop was captured.

Zero rows: `dispatch` gives an expert without tokens no rows, grouped operators take zero rows, `combine` adds
nothing for it. That is what makes the answer "yes" to every emptiness test sound, and the test is not in the
graph any more.

Parameters: E parameters of the experts become one placeholder of shape (E, ...), recorded in `trace.stacked`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tedfx.capture.batched import refuse
from tedfx.capture.bodies import Bodies
from tedfx.capture.chains import Step, chain_of, dependence, is_zero
from tedfx.capture.classes import classes_of, plain_body
from tedfx.capture.loads import Kept, every_assignment
from tedfx.capture.masks import facts
from tedfx.capture.routing import Routing, name_of, shape_of
from tedfx.capture.stacks import Stacks
from tedfx.capture.uncaptured import find_uncaptured
from tedfx.errors import user_line, warn
from tedfx.frontends import answers
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import argument, operand
from tedfx.passes.base import Pass, PassResult
from tedfx.stages.graphs import GlobalGraph

__all__ = ["CaptureLoops", "find_uncaptured"]

aten = torch.ops.aten


@dataclass(frozen=True)
class CaptureLoops(Pass[GlobalGraph]):
    """See the module's docstring."""

    requires: ClassVar[frozenset[str]] = frozenset({"functional"})
    provides: ClassVar[frozenset[str]] = frozenset({"loops captured"})

    def __call__(self, program: GlobalGraph) -> PassResult:
        graph, trace = program.graph_module.graph, program.trace
        result = PassResult()
        known = facts(graph)
        depends, ends = dependence(graph, known)
        stacks = Stacks(trace, program.trainable)
        done: dict[Routing, Kept] = {}  # and the assignments that reach an expert
        for routing, end in ends:
            chain, base = chain_of(end, routing, depends)
            done[routing] = _capture(graph, routing, end, chain, base, known, stacks)
            result.matches += 1
            result.notes.append(f"loop over {routing.experts} experts at {user_line(end)}")
        answers.settle(trace, [node for node, found in depends.items() if done.keys() & found.keys()])
        _prove_hits(graph, known, done)
        _erase(graph, depends)
        stacks.finish()
        _check_rest(graph, known, depends, done)
        answers.check(trace)
        if answers.took_for_granted(trace) and trace.stacked:
            result.notes.append(answers.SKIPPED)
            warn(answers.SKIPPED)
        result.changes = result.matches
        return result


# --- the canonical form -------------------------------------------------------------------------------------


def _capture(
    graph: fx.Graph,
    routing: Routing,
    end: fx.Node,
    chain: list[Step],
    base: fx.Node | None,
    known: dict,
    stacks: Stacks,
) -> Kept:
    """Emit dispatch, body and combine before the chain's last step and put them in its place. The
    assignments that are dispatched."""
    classes = classes_of(chain, routing, known)
    with graph.inserting_before(end):
        found = [
            _class(graph, routing, end, [chain[expert] for expert in mine], mine, known, stacks)
            for mine in classes
        ]
        bodies, out = found[0]
        for other, added in found[1:]:
            if other.kept != bodies.kept:
                raise refuse("experts find their tokens in different ways", end, "search in one mask")
            out = bodies.emit(aten.add.Tensor, (out, added), {}, end)
        left_out = bodies.kept is not None or bodies.at_most is not None
        if bodies.at_most is not None and len(found) > 1:
            raise refuse(
                "experts of several structures take the first of their tokens", end, "give all one structure"
            )
        if left_out and chain[0].overwrites:
            steps = {step.node for step in chain}
            first = next((step.base for step in chain if step.base not in steps), None)
            if not is_zero(first):
                raise refuse(
                    "out[token] = .. writes some tokens of each expert alone, and the others keep what was "
                    "there",
                    end,
                    "start from zeros_like(x)",
                )
        if VAL[end].dim() > 2:
            like = base
            if bodies.x is not None and VAL[bodies.x].dim() == VAL[end].dim():
                like = bodies.x
            if like is None:
                raise refuse(
                    "tokens that were flattened and are summed unflattened",
                    end,
                    "start the sum from zeros_like(x)",
                )
            like = operand(like, 0) if name_of(like) == "zeros_like" else like
            sizes = [bodies.emit(aten.sym_size.int, (like, d), {}, end) for d in range(VAL[end].dim() - 1)]
            out = bodies.emit(aten.reshape.default, (out, [*sizes, shape_of(end)[-1]]), {}, end)
        if base is not None and not is_zero(base):
            out = bodies.emit(aten.add.Tensor, (base, out), {}, end)
        if shape_of(out) != shape_of(end):
            raise refuse(
                f"a sum of shape {shape_of(end)} over experts that add {shape_of(out)}",
                end,
                "add rows of tokens to rows of tokens",
            )
    end.replace_all_uses_with(out, delete_user_cb=lambda user: user is not out)
    return bodies.kept


def _class(
    graph: fx.Graph,
    routing: Routing,
    end: fx.Node,
    chain: list[Step],
    numbers: list[int],
    known: dict,
    stacks: Stacks,
) -> tuple[Bodies, fx.Node]:
    """What the experts of one class add to the tokens: [N, H]. `chain`: their steps."""
    gathered = chain[0].index is not None
    some = len(numbers) < routing.experts
    plain = plain_body(chain[0], routing, known) if some and gathered else set[fx.Node]()
    bodies = Bodies(graph, routing, known, stacks, gathered, numbers, plain)
    if gathered:
        _check_places(bodies, routing, chain, end)
    value = bodies.lift(tuple(step.value for step in chain))
    rows = value.node
    if value.kind not in ("rows", "weighted") or value.right != 1 or rows is None:
        raise refuse(
            "what an expert adds is not a row of features per token",
            chain[0].value,
            "add expert(x[token]) * w[token, slot, None]",
        )
    if not gathered and value.kind != "weighted":
        raise refuse(
            "every expert runs on every token, and nothing makes its result zero where it was not chosen",
            chain[0].value,
            "multiply it by a gate made from the router's choice: (w * (ids == e)).sum(-1, keepdim=True)",
        )
    if VAL[rows].dim() != 2:
        rows = bodies.emit(aten.reshape.default, (rows, [-1, shape_of(rows)[-1]]), {}, end)
    weights = bodies.weights(value.of if value.kind == "weighted" else None, end)
    if plain:
        mine = bodies.emit(aten.lt.Scalar, (bodies.sent(end), len(numbers)), {}, end)
        weights = bodies.emit(aten.where.ScalarOther, (mine, weights, 0), {}, end)
        weights = bodies.emit(aten.sum.dim_IntList, (weights, [1], True), {}, end)
        out = bodies.emit(aten.mul.Tensor, (rows, weights), {}, end)
    else:
        out = bodies.emit(torch.ops.tedfx.combine.default, (rows, bodies.sorted, weights), {}, end)
    if VAL[out].dtype != VAL[end].dtype:
        out = bodies.emit(aten.to.dtype, (out, VAL[end].dtype), {}, end)
    return bodies, out


def _check_places(bodies: Bodies, routing: Routing, chain: list[Step], end: fx.Node) -> None:
    """Every step adds at its own expert's tokens, and none twice where the step overwrites."""
    for indices in (
        [step.index for step in chain if step.index is not None],
        [tuple(argument(step.read, 1)) for step in chain if step.read is not None],
    ):
        if not indices:
            continue
        if len(indices) != len(chain) or any(
            [i is None for i in index] != [i is None for i in indices[0]] for index in indices
        ):
            raise refuse("experts add in different ways", end, "give all experts the same code")
        where = [bodies.lift(nodes) if nodes[0] is not None else None for nodes in zip(*indices)]
        if any(value is not None and value.kind != "index" for value in where):
            raise refuse(
                "an expert adds at other places than its tokens",
                chain[0].node,
                "add to out[token] what was computed from x[token]",
            )
        labels, at = bodies.indexed_dims(where, chain[0].node)
        sizes = [bodies.size(label) for label in bodies.columns(where)]
        if "k" in labels or at or shape_of(end)[: len(sizes)] != sizes:
            raise refuse(
                "an expert adds at other places than its tokens",
                chain[0].node,
                "add to out[token] what was computed from x[token]",
            )
        reduced = all(value.of.reduced for value in where if value is not None)
        if chain[0].once and not (routing.unique or reduced):
            raise refuse(
                "out[token] = .. loses a token that names an expert twice", chain[0].node, "use index_add_"
            )


def _prove_hits(graph: fx.Graph, known: dict, done: dict[Routing, Kept]) -> None:
    """A loop over the experts that were hit was traced over all of them: the others have no tokens."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.tedfx.hit_experts.default):
        found = every_assignment(operand(node, 0), known)
        if found is None or found[0] not in done or found[1] not in (None, done[found[0]]):
            raise refuse(
                "a loop over some of the experts, and nothing proves that the others have no tokens",
                node,
                "loop over the experts that any token chose: (one_hot(ids, E).sum((0, 1)) > 0).nonzero()",
            )
        graph.erase_node(node)


# --- afterwards ---------------------------------------------------------------------------------------------


def _erase(graph: fx.Graph, depends: dict) -> None:
    """What only the captured loops used. Draws (dropout) and assertions in them go too."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and (node in depends or not node.is_impure()):
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _check_rest(graph: fx.Graph, known: dict, depends: dict, done: Collection[Routing]) -> None:
    """No expert's tokens are searched for any more, and no rows are cut by counts."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.tedfx.expert_run.default):
        raise refuse(
            "rows are cut by counts, and what becomes of them is not understood",
            node,
            "sort rows by expert (order = ids.flatten().argsort(); x[order // k]), cut them by the counts of "
            "the ids, concatenate what all experts give, and put it back at `order`",
        )
    searched: dict[Routing, dict[int, fx.Node]] = {}
    loose: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        for mask in _masks(node):
            for routing, experts in depends.get(mask, {}).items():
                searched.setdefault(routing, {}).update(dict.fromkeys(experts, node))
            ids = _compared(mask)
            if ids is not None and mask not in depends:
                loose.setdefault(ids, set()).add(node)
    for routing, nodes in searched.items():
        if len(nodes) < 2 and routing not in done:
            continue  # one search by itself is no loop
        named = {
            fact.expert for fact in known.values() if fact.routing is routing and fact.expert is not None
        }
        missing = sorted(set(range(routing.experts)) - named)
        expert, node = next(iter(nodes.items()))
        what = (
            f"of {routing.experts} experts, {missing} are never run"
            if missing
            else f"the tokens of expert {expert} do not end in one sum over all experts"
        )
        raise refuse(
            what,
            node,
            "add every expert once to one running sum: out.index_add_(0, token, expert(x[token]) * "
            "w[token, slot, None])",
        )
    for ids, nodes in loose.items():
        if len(nodes) > 1:
            what = f"nothing proves that the expert ids lie in 0..E-1 (they come from {ids.target})"
            raise refuse(
                what, next(iter(nodes)), "take them from a topk, argmax or sort over the experts' scores"
            )


def _masks(node: fx.Node) -> list[fx.Node]:
    """The masks that a node searches."""
    name = name_of(node)
    if name in ("nonzero", "nonzero_numpy", "argwhere", "masked_select") or (
        name == "where" and len(node.args) == 1
    ):
        return [operand(node, len(node.args) - 1 if name == "masked_select" else 0)]
    if name in ("index", "index_put"):
        return [m for m in argument(node, 1) if isinstance(m, fx.Node) and VAL[m].dtype == torch.bool]
    return []


def _compared(mask: fx.Node) -> fx.Node | None:
    """x of `x == 3`, through any()."""
    while name_of(mask) in ("any", "to", "view", "reshape"):
        mask = operand(mask, 0)
    return operand(mask, 0) if name_of(mask) == "eq" and isinstance(mask.args[1], int) else None
