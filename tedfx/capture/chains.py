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

from dataclasses import dataclass

from torch import fx

from tedfx.capture.batched import refuse
from tedfx.capture.routing import Fact, Routing, argument, name_of, shape_of

__all__ = ["Step", "chain_of", "dependence", "is_zero"]


def dependence(graph: fx.Graph, known: dict[fx.Node, Fact]) -> tuple[dict, list[tuple[Routing, fx.Node]]]:
    """node -> {routing: experts it depends on}, as long as those are not all that the graph names; and the
    steps that make them all."""
    named: dict[Routing, set[int]] = {}
    for fact in known.values():
        if fact.expert is not None and 0 <= fact.expert < fact.routing.experts:
            named.setdefault(fact.routing, set()).add(fact.expert)
    depends: dict[fx.Node, dict[Routing, frozenset[int]]] = {}
    ends = []
    for node in graph.nodes:
        found: dict[Routing, frozenset[int]] = {}
        for source in node.all_input_nodes:
            for routing, experts in depends.get(source, {}).items():
                found[routing] = found.get(routing, frozenset()) | experts
        fact = known.get(node)
        if fact is not None and fact.expert in named.get(fact.routing, ()):
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
    index: tuple | None = None
    read: fx.Node | None = None
    once: bool = False  # what is placed at a position twice is lost
    overwrites: bool = False  # what was there is lost too


def _step(node: fx.Node, routing: Routing, depends: dict) -> Step | None:
    """`node` as a step of the loop of this routing, or None."""

    def experts(value) -> frozenset[int]:
        return depends.get(value, {}).get(routing, frozenset()) if isinstance(value, fx.Node) else frozenset()

    name = name_of(node)
    if name == "index_add" and argument(node, "alpha") == 1:
        dim = node.args[1] % node.meta["val"].dim()
        return Step(node, node.args[0], node.args[3], (*[None] * dim, node.args[2]))
    if name in ("index_put", "index_copy"):
        if name == "index_copy":
            return Step(
                node,
                node.args[0],
                node.args[3],
                (*[None] * (node.args[1] % node.meta["val"].dim()), node.args[2]),
                once=True,
                overwrites=True,
            )
        base, index, value = node.args[:3]
        if argument(node, "accumulate"):
            return Step(node, base, value, tuple(index))
        for read, added in ((0, 1), (1, 0)):
            if (
                name_of(value) == "add"
                and argument(value, "alpha") == 1
                and name_of(value.args[read]) == "index"
                and value.args[read].args[0] is base
            ):
                return Step(node, base, value.args[added], tuple(index), value.args[read], once=True)
        return Step(node, base, value, tuple(index), once=True, overwrites=True)
    if name == "add" and len(node.args) == 2 and argument(node, "alpha") == 1 and len(shape_of(node)) > 1:
        base, value = node.args
        if len(experts(value)) != 1 and len(experts(base)) == 1:
            base, value = value, base
        if len(experts(value)) == 1 and isinstance(base, fx.Node):
            return Step(node, base, value)
    return None


def chain_of(end: fx.Node, routing: Routing, depends: dict) -> tuple[list[Step], fx.Node | None]:
    """The steps that lead to `end`, in the order of the experts, and what they start from (None: nothing)."""

    def experts(node) -> frozenset[int]:
        return depends.get(node, {}).get(routing, frozenset()) if isinstance(node, fx.Node) else frozenset()

    chain: list[Step] = []
    node = end
    while True:
        step = _step(node, routing, depends)
        if (
            step is not None
            and experts(step.value)
            and (not chain or (step.index is None) == (chain[-1].index is None))
        ):
            chain.append(step)
            node = step.base
            if not experts(node):
                break
        elif chain and chain[-1].index is None and len(experts(node)) == 1:
            while name_of(node) == "add" and node.args[1] == 0:  # sum(..) starts from 0
                node = node.args[0]
            chain.append(Step(node, None, node))
            node = None
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
        node = None  # a token has one expert, so nothing of the first sum is left
    return sorted(chain, key=lambda s: min(experts(s.value))), node


def _inner(step: Step, routing: Routing, depends: dict) -> Step:
    """A step that adds rows placed in zeros of their own is one that adds the rows at their places."""
    if step.index is None and name_of(step.value) in ("index_add", "index_put", "index_copy"):
        inner = _step(step.value, routing, depends)
        if inner is not None and inner.read is None and is_zero(inner.base):
            return Step(step.node, step.base, inner.value, inner.index, None, inner.once)
    return step


def is_zero(node: fx.Node | None) -> bool:
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
        node = node.args[0]
    return name_of(node) in ("zeros", "zeros_like", "new_zeros") or (
        name_of(node) in ("full", "full_like", "new_full") and argument(node, "fill_value") == 0
    )
