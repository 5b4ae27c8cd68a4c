"""What experts compute on their slots becomes the same on rows of tokens.

The slots (E, C, features), in any order of the expert, the slot and the groups, become the rows of
`dispatch`: an empty slot reaches no token, so it needs no row, and where in the slots a row stood is
forgotten. Values with a dim of experts are computed as labelled.py says; values taken apart by expert
(`x[e]`, `unbind`, `chunk`) and put together again (`stack`, `cat`) are bodies in lock-step (bodies.py).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from tedfx.capture.batched import Batched, refuse
from tedfx.capture.labelled import LabelledBodies
from tedfx.capture.routing import Dims, Routing, Sizes, argument, dim_of, name_of, relabel, shape_of
from tedfx.capture.rows import Dispatched
from tedfx.capture.stacks import Stacks
from tedfx.graph import nodes as calls
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import operand, operand_or_none

__all__ = ["SlotBodies"]


class SlotBodies(LabelledBodies):
    """The body behind one dispatch. `slots`: the node of the dispatched tokens, `labels` those of its dims
    but the last, `sizes` of the labels."""

    def __init__(
        self,
        graph: fx.Graph,
        routing: Routing,
        stacks: Stacks,
        slots: fx.Node,
        labels: Dims,
        sizes: Sizes,
        inside: set[fx.Node],
        over: tuple[str, ...] = (),
    ):
        super().__init__(graph, routing, {}, stacks, True, sizes, inside, over)
        self.slots = slots
        self.labels[slots] = labels
        self.apart: dict[fx.Node, bool] = {}
        self.left: Dims = ()  # labels of the slots of one expert

    def start(self, dispatched: Dispatched, tail: bool) -> None:
        self.dispatched, self.tail = dispatched, (True,) * tail
        self.values[self.slots] = Batched(
            "rows", dispatched.rows, self.slots, right=1, span=len(self.labels[self.slots])
        )

    def _entry(self, node: fx.Node, name: str) -> tuple[Batched, Dims] | None:
        if name in ("stack", "cat", "concat") and self._put_together(node):
            return self._lockstep(node, name)
        return None

    # --- experts apart ---

    def _taken(self, node: fx.Node) -> tuple[fx.Node, int, bool] | None:
        """(slots, expert, whether its dim is kept) of `x[e]`, `x.unbind()[e]`, `x.chunk(E)[e]`."""
        name, source, kept = name_of(node), operand_or_none(node, 0), False
        if source is None:
            return None
        if name == "getitem":
            taken, kept = name_of(source), name_of(source) != "unbind"
            if taken not in ("unbind", "chunk", "split", "split_with_sizes", "tensor_split") or (
                kept and len(VAL[source]) != self.experts
            ):
                return None
            number, dim, source = calls.argument(node, 1), argument(source, "dim"), operand(source, 0)
        elif name == "select":
            number, dim = argument(node, "index"), argument(node, "dim")
        elif name == "slice" and isinstance(argument(node, "start"), int):
            number, dim, kept = argument(node, "start"), argument(node, "dim"), True
            if argument(node, "end") != number + 1:
                return None
        else:
            return None
        if source not in self.inside or self._per_expert(source):
            return None
        self.value(source)
        dim = dim % len(shape_of(source))
        return (
            (source, number % self.experts, kept)
            if self.labels[source][dim : dim + 1] == self.expert
            else None
        )

    def _per_expert(self, node: fx.Node) -> bool:
        if node not in self.apart:
            self.apart[node] = False
            if node in self.inside and node is not self.slots:
                inner = name_of(node) not in ("stack", "cat", "concat") or not self._put_together(node)
                taken = isinstance(VAL[node], torch.Tensor) and self._taken(node) is not None
                self.apart[node] = taken or (inner and any(self._per_expert(n) for n in node.all_input_nodes))
        return self.apart[node]

    def _put_together(self, node: fx.Node) -> bool:
        parts = calls.argument(node, 0)
        return len(parts) == self.experts and all(self._per_expert(p) for p in parts)

    def _lift(self, nodes: tuple[fx.Node, ...]) -> Batched:
        taken = [found for node in nodes if (found := self._taken(node)) is not None]
        if len(taken) < len(nodes):
            return super()._lift(nodes)
        source, _, kept = taken[0]
        if [t[1] for t in taken] != self.numbers or any((t[0], t[2]) != (source, kept) for t in taken):
            raise refuse("an expert computes on the slots of another", nodes[0], "let expert e work on x[e]")
        value, labels = self.values[source], self.labels[source]
        self.left = tuple(() if x == ("e",) else x for x in labels if kept or x != ("e",))
        return Batched("rows", value.node, nodes[0], right=value.right, span=value.span - (not kept))

    def _lockstep(self, node: fx.Node, name: str) -> tuple[Batched, Dims]:
        parts: tuple[fx.Node, ...] = tuple(calls.argument(node, 0))
        out = self.lift(parts)
        if out.kind != "rows" or out.start:
            raise refuse(
                "what an expert gives is not a row of features per slot",
                parts[0],
                "give every slot a row",
            )
        labels = relabel(self.left, {**self.sizes, "e": 1}, out.shape[: out.span])
        rank = len(shape_of(node))
        dim = dim_of(node, rank, default=0)
        if labels is None or dim is None or dim > out.span - (name != "stack"):
            raise refuse(
                "the experts' slots are put together along their features",
                node,
                "stack them along a dim of experts",
            )
        if name == "stack":
            labels = (*labels[:dim], ("e",), *labels[dim:])
        else:
            labels = (*labels[:dim], ("e", *labels[dim]), *labels[dim + 1 :])
        return replace(out, like=node, span=len(labels)), labels
