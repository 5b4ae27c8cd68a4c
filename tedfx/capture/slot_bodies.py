"""What experts compute on their slots becomes the same on rows of tokens.

The slots (E, C, features), in any order of the expert, the slot and the groups, become the rows of
`dispatch`: an empty slot reaches no token, so it needs no row, and where in the slots a row stood is
forgotten. Operators with rules in rules.py keep the rows apart; here is what a dim of experts adds to them:

- a bmm, matmul or einsum with weights that have the same dim of experts is a `grouped_linear`;
- a parameter that has it, and 1 for the slots, gives a row per expert;
- values taken apart by expert (`x[e]`, `unbind`, `chunk`) and put together again (`stack`, `cat`) are bodies
  in lock-step (bodies.py).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from tedfx._torch import pytree
from tedfx.capture.batched import Batched, aligned, is_pointwise, refuse, unknown
from tedfx.capture.bodies import Bodies
from tedfx.capture.letters import Letters, contraction_of
from tedfx.capture.routing import (
    Dims,
    Routing,
    Sizes,
    argument,
    dim_of,
    name_of,
    relabel,
    shape_of,
    swapped,
)
from tedfx.capture.rows import Dispatched
from tedfx.capture.rules import apply_rule
from tedfx.capture.stacks import Stacks
from tedfx.graph import nodes as calls
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import operand, operand_or_none

__all__ = ["SlotBodies"]

aten = torch.ops.aten
_PRODUCTS = ("einsum", "bmm", "matmul", "mm", "baddbmm")


class SlotBodies(Bodies):
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
    ):
        super().__init__(graph, routing, {}, stacks, True)
        self.slots, self.sizes, self.inside = slots, sizes, inside
        self.values: dict[fx.Node, Batched] = {}
        self.labels: dict[fx.Node, Dims] = {slots: labels}  # of the dims that count rows
        self.apart: dict[fx.Node, bool] = {}
        self.left: Dims = ()  # labels of the slots of one expert

    def start(self, dispatched: Dispatched, tail: bool) -> None:
        self.dispatched, self.tail = dispatched, (True,) * tail
        self.values[self.slots] = Batched(
            "rows", dispatched.rows, self.slots, right=1, span=len(self.labels[self.slots])
        )

    def value(self, node: fx.Node) -> Batched:
        if node not in self.values:
            self.values[node], self.labels[node] = self._value(node)
        return self.values[node]

    def _value(self, node: fx.Node) -> tuple[Batched, Dims]:
        name = name_of(node)
        if name in ("stack", "cat", "concat") and self._put_together(node):
            return self._lockstep(node, name)
        if name in _PRODUCTS:
            return self._product(node, name)
        rows = [n for n in node.all_input_nodes if n in self.inside]
        values = [self.value(n) for n in rows]
        labels = self.labels[rows[0]]
        if any(self.labels[n] != labels or v.start for n, v in zip(rows, values)):
            raise refuse(
                "slots meet in different orders", node, "keep the dims of experts and slots in one order"
            )
        if name in ("permute", "transpose"):
            order = swapped(node, name, len(shape_of(node)))
            span = values[0].span
            if sorted(order[:span]) == list(range(span)) and order[span:] == list(range(span, len(order))):
                return replace(values[0], like=node), tuple(labels[d] for d in order[:span])
        elementwise = is_pointwise(node)
        convert = lambda x: self._operand(x, node, labels, elementwise) if isinstance(x, fx.Node) else x
        args, kwargs = pytree.tree_map(
            convert, (tuple(node.args), dict(node.kwargs)), is_leaf=lambda x: isinstance(x, fx.Node)
        )
        out = apply_rule(self, node, args, kwargs)
        if out.kind != "rows" or not isinstance(VAL[node], torch.Tensor):
            return out, labels
        counted, before = shape_of(node)[: out.span], shape_of(rows[0])[: values[0].span]
        found = None if out.start else labels if counted == before else relabel(labels, self.sizes, counted)
        if found is None:
            raise refuse(
                f"{node.target} takes experts and slots apart", node, "keep each in a dim of its own"
            )
        return out, found

    def _operand(self, x: fx.Node, node: fx.Node, labels: Dims, elementwise: bool) -> Batched:
        """What meets the slots: other slots; a value of each expert; one of all."""
        if x in self.inside:
            return self.value(x)
        if not isinstance(VAL.get(x), torch.Tensor) or not elementwise:
            return Batched("shared", x, x)
        shape, rank = shape_of(x), len(shape_of(node))
        lead = shape[: max(len(labels) - (rank - len(shape)), 0)]  # its dims that are experts and slots
        features, over = shape[len(lead) :], labels[len(labels) - len(lead) :]
        if all(size == 1 for size in lead):
            return Batched(
                "shared",
                x if not lead else self.emit(aten.reshape.default, (x, features), {}, node),
                x,
                dropped=len(lead),
            )
        if any(
            size != 1 and not (label == ("e",) and size == self.experts) for size, label in zip(lead, over)
        ):
            raise refuse(
                "a value that differs between slots meets them",
                node,
                "compute a slot from the token in it alone",
            )
        each = (
            x if len(lead) == 1 else self.emit(aten.reshape.default, (x, [self.experts, *features]), {}, node)
        )
        return Batched("stacked", each, x, right=len(features), dropped=len(lead))

    # --- products with weights ---

    def _product(self, node: fx.Node, name: str) -> tuple[Batched, Dims]:
        parsed = contraction_of(node)
        bias = operand(node, 0) if name == "baddbmm" else None
        if parsed is None or (bias is not None and node.kwargs):
            raise unknown(node)
        (one, mine), (other, theirs), out = parsed
        if one not in self.inside:
            (one, mine), (other, theirs) = (other, theirs), (one, mine)
        if other in self.inside or bias in self.inside:
            raise refuse("a product of slots with slots", node, "let an expert work on each row alone")
        rows, labels = self.value(one), self.labels[one]
        if rows.right != 1 or rows.start:
            raise unknown(node)
        count, inner = mine[:-1], mine[-1]
        expert = next((letter for letter, label in zip(count, labels) if label == ("e",)), None)
        weight, left = self._squeezed(other, theirs, node)
        new = [letter for letter in out if letter not in mine]
        if expert not in left:
            expert = None  # one matrix for all
        wanted = {inner, *new} if expert is None else {inner, *new, expert}
        if len(new) != 1 or out[-1] != new[0] or sorted(out[:-1]) != sorted(count) or set(left) != wanted:
            raise refuse(
                "a product that is not one of each row with a matrix of its expert",
                node,
                "contract the features alone: einsum('ech,ehf->ecf', ..)",
            )
        if expert is not None:
            transposed = left.index(inner) < left.index(new[0])
            if left[0] != expert:
                order = [left.index(x) for x in (expert, inner, new[0])]
                weight, transposed = self.emit(aten.permute.default, (weight, order), {}, node), True
            made = self.emit(
                torch.ops.tedfx.grouped_linear.default,
                (rows.node, weight, self.counts, transposed, *self.tail),
                {},
                node,
            )
        else:
            target = aten.matmul.default if left[0] == inner else aten.linear.default
            made = self.emit(target, (rows.node, weight), {}, node)
        result = Batched("rows", made, node, 1, rows.span)
        order = tuple(labels[count.index(letter)] for letter in out[:-1])
        if bias is not None:
            given = self._operand(bias, node, order, elementwise=True)
            result = replace(
                result, made=self.emit(aten.add.Tensor, (made, aligned(self, node, given, result)), {}, node)
            )
        return result, order

    def _squeezed(self, weight: fx.Node, letters: Letters, node: fx.Node) -> tuple[fx.Node, Letters]:
        shape = shape_of(weight)
        kept = [d for d, size in enumerate(shape) if size != 1 or len(shape) <= 2]
        if len(kept) == len(shape):
            return weight, letters
        return self.emit(aten.reshape.default, (weight, [shape[d] for d in kept]), {}, node), [
            letters[d] for d in kept
        ]

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
            (source, number % self.experts, kept) if self.labels[source][dim : dim + 1] == (("e",),) else None
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
