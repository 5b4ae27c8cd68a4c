"""The chain of steps by which a loop over experts sums their results.

One walk says of every node which experts of a routing it depends on, through the facts about single experts
(`masks.py`), as long as those are not all that the graph names: what depends on all is behind the loop, so
the walk is linear in the graph.

A **step** adds one value to a running sum: index_add at an expert's tokens; index_put of what was there plus
the value, or accumulating; a plain add. The step with which the set of experts becomes complete ends a chain,
which is followed back through the running sums. Each step must add the value of one expert, each expert once,
all experts that the routing can name, and nothing else may read the sum in between. Order does not matter to
a sum. The first sum is anything; zeros are told apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import fx

from tedfx.capture.batched import refuse
from tedfx.capture.routing import Fact, Routing, argument, name_of, shape_of
from tedfx.graph import nodes
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import operand

__all__ = ["Depends", "Step", "chain_of", "dependence", "is_zero"]

Depends: TypeAlias = dict[fx.Node, dict[Routing, frozenset[int]]]


def dependence(
    graph: fx.Graph, known: Mapping[fx.Node, Fact]
) -> tuple[Depends, list[tuple[Routing, fx.Node]]]:
    """node -> {routing: experts it depends on}, as long as those are not all that the graph names; and the
    steps that make them all."""
    named: dict[Routing, set[int]] = {}
    for fact in known.values():
        if fact.expert is not None and 0 <= fact.expert < fact.routing.experts:
            named.setdefault(fact.routing, set()).add(fact.expert)
    depends: Depends = {}
    ends: list[tuple[Routing, fx.Node]] = []
    for node in graph.nodes:
        found: dict[Routing, frozenset[int]] = {}
        for source in node.all_input_nodes:
            for routing, experts in depends.get(source, {}).items():
                found[routing] = found.get(routing, frozenset()) | experts
        fact = known.get(node)
        if fact is not None and fact.expert is not None and fact.expert in named.get(fact.routing, ()):
            found[fact.routing] = found.get(fact.routing, frozenset()) | {fact.expert}
        for routing in [r for r, experts in found.items() if experts == named[r] and len(experts) > 1]:
            if node.op == "call_function" and _step(node, routing, depends) is not None:
                ends.append((routing, node))
            del found[routing]
        if found:
            depends[node] = found
    return depends, ends


@dataclass(frozen=True)
class Step:
    """`node` adds `value` to `base` (None: there is nothing yet), at `index` (None: everywhere); `read` is
    what it adds to."""

    node: fx.Node
    base: fx.Node | None
    value: fx.Node
    index: tuple[Any, ...] | None = None
    read: fx.Node | None = None
    once: bool = False  # what is placed at a position twice is lost
    overwrites: bool = False  # what was there is lost too


def _experts(value: object, routing: Routing, depends: Depends) -> frozenset[int]:
    return depends.get(value, {}).get(routing, frozenset()) if isinstance(value, fx.Node) else frozenset()


def _step(node: fx.Node, routing: Routing, depends: Depends) -> Step | None:
    """`node` as a step of the loop of this routing, or None."""
    name = name_of(node)
    if (name == "index_add" and argument(node, "alpha") == 1) or name == "index_copy":
        dim = argument(node, "dim") % VAL[node].dim()
        lost = name == "index_copy"
        index = (*[None] * dim, operand(node, 2))
        return Step(node, operand(node, 0), operand(node, 3), index, once=lost, overwrites=lost)
    if name == "scatter_add" or (
        name == "scatter_reduce" and argument(node, "reduce") == "sum" and argument(node, "include_self")
    ):
        column = _column(operand(node, 2))
        return (
            Step(node, operand(node, 0), operand(node, 3), (column,)) if argument(node, "dim") == 0 else None
        )
    if name == "index_put":
        base, index, value = operand(node, 0), tuple(nodes.argument(node, 1)), operand(node, 2)
        if argument(node, "accumulate"):
            return Step(node, base, value, index)
        if name_of(value) == "add" and argument(value, "alpha") == 1:
            for read, added in (value.args[:2], value.args[1::-1]):
                if not isinstance(read, fx.Node) or not isinstance(added, fx.Node):
                    continue
                if name_of(read) == "index" and operand(read, 0) is base:
                    return Step(node, base, added, index, read, once=True)
        return Step(node, base, value, index, once=True, overwrites=True)
    if name == "add" and len(node.args) == 2 and argument(node, "alpha") == 1 and len(shape_of(node)) > 1:
        base, value = node.args
        if len(_experts(value, routing, depends)) != 1 and len(_experts(base, routing, depends)) == 1:
            base, value = value, base
        if (
            isinstance(value, fx.Node)
            and isinstance(base, fx.Node)
            and len(_experts(value, routing, depends)) == 1
        ):
            return Step(node, base, value)
    return None


def _column(index: fx.Node) -> fx.Node:
    """The tokens of an index that is the same for all features."""
    rows = shape_of(index)[0]
    while name_of(index) in ("expand", "repeat", "view", "reshape", "unsqueeze"):
        before = operand(index, 0)
        if shape_of(before)[0] != rows or any(size != 1 for size in shape_of(before)[1:]):
            break
        index = before
    return index


def chain_of(end: fx.Node, routing: Routing, depends: Depends) -> tuple[list[Step], fx.Node | None]:
    """The steps that lead to `end`, in the order of the experts, and what they start from (None: nothing)."""

    def experts(value: object) -> frozenset[int]:
        return _experts(value, routing, depends)

    chain: list[Step] = []
    node, start = end, None
    while True:
        step = _step(node, routing, depends)
        if (
            step is not None
            and experts(step.value)
            and (not chain or (step.index is None) == (chain[-1].index is None))
        ):
            chain.append(step)
            start = step.base
            if start is None or not experts(start):
                break
            node = start
        elif chain and chain[-1].index is None and len(experts(node)) == 1:
            while name_of(node) == "add" and node.args[1] == 0:  # sum(..) starts from 0
                node = operand(node, 0)
            chain.append(Step(node, None, node))
            start = None
            break
        else:
            names = sorted(experts(node))
            what = f"experts {names} reach the sum over experts in one value"
            raise refuse(what, node, "add each expert's result to one running sum")
    chain = [_inner(step, routing, depends) for step in chain]
    if len({(s.index is None, s.once, s.overwrites, s.read is None) for s in chain}) > 1:
        raise refuse("experts add in different ways", end, "give all experts the same code")
    numbers: list[int] = []
    for step in chain:
        whose = experts(step.value)
        if len(whose) != 1:
            raise refuse(
                f"a value depends on experts {sorted(whose)}",
                step.value,
                "compute each expert from the layer's input alone",
            )
        numbers += whose
    for number in numbers:
        if numbers.count(number) > 1:
            raise refuse(
                f"expert {number} is added {numbers.count(number)} times", end, "add every expert once"
            )
    missing = sorted(set(range(routing.experts)) - set(numbers))
    if missing or len(numbers) != routing.experts:
        raise refuse(
            f"of {routing.experts} experts, {missing} are never added",
            end,
            "loop over all experts that the router can choose",
        )
    for later, step in zip(chain, chain[1:]):
        others = set(step.node.users) - {later.node, later.read}
        if step.base is not None and others:
            raise refuse(
                "the sum over experts is read between two of them",
                next(iter(others)),
                "use it when it is complete",
            )
    if chain[0].overwrites:
        if routing.choices > 1:
            raise refuse(
                "out[token] = .. keeps only the last expert of a token", end, "add: out[token] += .."
            )
        start = None  # a token has one expert, so nothing of the first sum is left
    return sorted(chain, key=lambda s: min(experts(s.value))), start


def _inner(step: Step, routing: Routing, depends: Depends) -> Step:
    """A step that adds rows placed in zeros of their own is one that adds the rows at their places."""
    if step.index is None and name_of(step.value) in ("index_add", "index_put", "index_copy"):
        inner = _step(step.value, routing, depends)
        if inner is not None and inner.read is None and is_zero(inner.base):
            return Step(step.node, step.base, inner.value, inner.index, None, inner.once)
    return step


def is_zero(node: fx.Node | None) -> bool:
    """Whether a first sum is zero everywhere, as written; nothing is not."""
    if node is None:
        return False
    while name_of(node) in (
        "view",
        "reshape",
        "_unsafe_view",
        "expand",
        "clone",
        "contiguous",
        "to",
        "_to_copy",
        "alias",
        "detach",
    ):
        node = operand(node, 0)
    return name_of(node) in ("zeros", "zeros_like", "new_zeros") or (
        name_of(node) in ("full", "full_like", "new_full") and bool(argument(node, "fill_value") == 0)
    )
