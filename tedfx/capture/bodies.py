"""E bodies become one: the same nodes on all experts' rows.

`Bodies.lift` walks E values of E experts back in lock-step and emits their batched value (`rules.py`). At
each step the E nodes are

- one node (or equal constants): a value that all experts share;
- E parameters: one stacked placeholder (E, ...), in the order of the experts; or slices `W[e]` of a tensor:
  that tensor, as it is;
- what the routing says about each expert's tokens (`routing.py`), each about its own expert;
- calls of one operator whose constants are equal and whose operands are, in turn, one of these.

Anything else is a difference between the experts and is refused, with both lines.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx

from tedfx._torch import pytree
from tedfx.capture.batched import Batched, is_value, refuse
from tedfx.capture.classes import runs_of
from tedfx.capture.routing import Fact, Routing, argument, name_of, number_of, shape_of
from tedfx.capture.rows import Rows
from tedfx.capture.rules import apply_rule
from tedfx.capture.stacks import Stacks
from tedfx.capture.weights import Weight, weight, weighted
from tedfx.errors import user_line
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import operand
from tedfx.ops.function import kept_of
from tedfx.rules.functions import adds_up

__all__ = ["Bodies"]

aten = torch.ops.aten


class Bodies(Rows):
    """The bodies of one loop, in the order of the experts."""

    def __init__(
        self,
        graph: fx.Graph,
        routing: Routing,
        known: dict[fx.Node, Fact],
        stacks: Stacks,
        gathered: bool,
        numbers: Sequence[int] | None = None,
        plain: Collection[fx.Node] = (),
    ):
        super().__init__(graph, routing, gathered, numbers, plain)
        self.known, self.stacks = known, stacks
        self.memo: dict[tuple[fx.Node, ...], Batched] = {}

    def lift(self, nodes: tuple[fx.Node, ...]) -> Batched:
        if nodes not in self.memo:
            self.memo[nodes] = self._lift(nodes)
        return self.memo[nodes]

    def _lift(self, nodes: tuple[fx.Node, ...]) -> Batched:
        first, fact = nodes[0], self.known.get(nodes[0])
        if fact is not None and fact.expert is not None and fact.routing is self.routing:
            return self._about(nodes, fact)
        if all(node is first for node in nodes) and not (len(nodes) == 1 and first in self.plain):
            return Batched("shared", first, first)
        if all(node.op == "placeholder" for node in nodes):
            if self.stacks.same(nodes):
                return Batched("shared", first, first)
            return Batched("stacked", self.stacks.stack(nodes), first, right=VAL[first].dim())
        for node in nodes[1:]:
            if node.op != first.op or node.target != first.target:
                what = (
                    f"experts differ: {first.target} in one, {node.target} in another (there: "
                    f"{user_line(node)})"
                )
                raise refuse(what, first, "give all experts the same code")
        if first.target is torch.ops.tedfx.combine.default:
            raise refuse(
                "an expert is a mixture itself",
                first,
                "route once, among the experts of all of these mixtures",
            )
        args, kwargs = self._operands(nodes)
        values = [v for v in pytree.tree_leaves((args, kwargs), is_leaf=is_value) if isinstance(v, Batched)]
        kinds = {v.kind for v in values}
        name = name_of(first)
        if "number" in pytree.tree_leaves((args, kwargs), is_leaf=is_value):
            return self._slice(first, name, args)
        if "index" in kinds:
            return self.indexed(first, name, args)
        if "count" in kinds and name not in ("view", "reshape", "_unsafe_view", "unflatten", "sym_size"):
            if kinds <= {"count"} and not isinstance(VAL[first], torch.Tensor):
                return Batched("count", None, first)
            raise refuse(
                "an expert's result depends on how many tokens it has",
                first,
                "let every row be computed alone",
            )
        if name == "sym_size":
            value = args[0]
            if value.kind == "rows" and value.start <= args[1] % len(value.shape) < value.start + value.span:
                return Batched("count", None, first)
            return Batched("shared", first, first)
        if name == "unsqueeze" and "picked" in kinds:
            return self._unsqueezed(first, args[0])
        if "picked" in kinds:
            args, kwargs = pytree.tree_map(self._stacked, (args, kwargs), is_leaf=is_value)
        if kinds & {"weight", "weighted"}:
            return weighted(self, first, name, args, kwargs)
        if kinds <= {"shared"}:
            if torch.Tag.nondeterministic_seeded in getattr(first.target, "tags", ()):
                raise refuse(
                    f"{first.target} draws anew for every expert from values that experts share",
                    first,
                    "draw once, outside the loop",
                )
            if kept_of(first.target) is not None and not adds_up(first):
                raise refuse(
                    f"{name} runs once per expert on a value that experts share, and so does its backward",
                    first,
                    "call it once, outside the loop",
                )
            return Batched("shared", first, first)
        return apply_rule(self, first, args, kwargs)

    def _operands(self, nodes: tuple[fx.Node, ...]) -> tuple[tuple, dict]:
        flat = [pytree.tree_flatten((node.args, node.kwargs)) for node in nodes]
        first, spec = flat[0]
        if any(s != spec for _, s in flat[1:]):
            raise refuse(
                "experts call an operator with different arguments",
                nodes[0],
                "give all experts the same code",
            )
        out = []
        for values in zip(*(leaves for leaves, _ in flat)):
            if all(isinstance(v, fx.Node) for v in values):
                out.append(self.lift(values))
            elif any(isinstance(v, fx.Node) for v in values):
                raise refuse(
                    "experts call an operator with different arguments",
                    nodes[0],
                    "give all experts the same code",
                )
            elif all(type(v) is type(values[0]) and v == values[0] for v in values):
                out.append(values[0])
            elif list(values) == self.numbers:
                out.append("number")
            else:
                raise refuse(
                    f"experts use different constants {list(values)}",
                    nodes[0],
                    "make the constant a parameter or a buffer of the expert",
                )
        return pytree.tree_unflatten(out, spec)

    def _about(self, nodes: tuple[fx.Node, ...], fact: Fact) -> Batched:
        """Values that say which tokens are an expert's, each about its own expert."""
        for node, number in zip(nodes, self.numbers):
            other = self.known.get(node)
            if other is None or other.routing is not fact.routing or other.expert != number:
                whose = (
                    "the tokens of another"
                    if other is not None and other.expert is not None
                    else "something else"
                )
                raise refuse(
                    f"expert {number} uses {whose}", node, "let expert e use the tokens that chose e"
                )
            if number_of(other.at_most) != number_of(fact.at_most) or any(
                getattr(other, field) != getattr(fact, field)
                for field in ("kind", "dims", "reduced", "column", "kept")
            ):
                raise refuse(
                    "experts find their tokens in different ways", node, "give all experts the same code"
                )
        if fact.kind == "gate" and VAL[nodes[0]].dtype != torch.bool:
            weights = {self.known[node].weight for node in nodes}
            over_experts = fact.weight is not None and any("e" in dim for dim in fact.weight[1])
            if over_experts and not self.routing.unique and self.routing.choices > 1:
                raise refuse(
                    "a token that may name an expert twice is weighed by the sum of both",
                    nodes[0],
                    "weigh by w[token, slot]",
                )
            if len(weights) == 1 and fact.weight is not None:
                return weight(nodes[0], fact.dims, Weight(*fact.weight))
            raise refuse("experts have different weights", nodes[0], "weigh all experts by one tensor")
        return Batched("index", None, nodes[0], of=fact)

    def _slice(self, first: fx.Node, name: str, args: tuple) -> Batched:
        """`W[e]`: the whole of W."""
        source = args[0]
        if source.kind == "shared" and name == "select" and args[2] == "number":
            return Batched(
                "picked", source.node, first, of=argument(first, "dim") % len(shape_of(source.node))
            )
        if source.kind == "shared" and name == "getitem" and name_of(source.node) == "unbind":
            whole = operand(source.node, 0)
            return Batched("picked", whole, first, of=argument(source.node, "dim") % len(shape_of(whole)))
        raise refuse(
            f"{first.target} computes with the expert's number",
            first,
            "use it to pick the expert's parameters and tokens only",
        )

    def _unsqueezed(self, first: fx.Node, value: Batched) -> Batched:
        """`probs[:, e].unsqueeze(1)` is still a slice: of `probs.unsqueeze(2)`."""
        dim = argument(first, "dim") % len(shape_of(first))
        node = self.emit(aten.unsqueeze.default, (value.node, dim + int(dim >= value.of)), {}, first)
        return Batched("picked", node, first, of=value.of + int(dim < value.of))

    def _stacked(self, value: Any) -> Any:
        """A picked value with its expert dim in front."""
        if not isinstance(value, Batched) or value.kind != "picked":
            return value
        node, size = value.node, shape_of(value.node)[value.of]
        runs = runs_of(self.numbers)
        if self.experts < self.routing.experts and len(runs) == 1 and size != self.experts:
            first, behind, _ = runs[0]  # one class of several: its own slices
            node = self.emit(aten.slice.Tensor, (node, value.of, first, behind), {}, value.like)
        elif size != self.experts or self.numbers[-1] != self.experts - 1:
            raise refuse(
                f"experts read slices of a dim of size {size}, there are {self.experts} experts",
                value.like,
                "give every expert one slice",
            )
        if value.of:
            rank = len(shape_of(node))
            node = self.emit(
                aten.permute.default,
                (node, [value.of, *(d for d in range(rank) if d != value.of)]),
                {},
                value.like,
            )
        return Batched("stacked", node, value.like, right=len(shape_of(node)) - 1)
