"""A body of which one value holds the rows of all experts, as the same on the rows of one dispatch.

Where a loop has E bodies (bodies.py), here there is one, and its values have dims that count rows: (E, C, ..)
of slots, (N, K, ..) of assignments, (E, N, ..) where every expert gets every token. Each of these dims has
labels (routing.py; "c" is a slot), and whatever has them all becomes `rows`. How a body begins is what
`SlotBodies` and `DenseBodies` say; what every body does is here:

- operators with rules (rules.py) keep the rows apart;
- a bmm, matmul, einsum or summed product with weights that have an entry per expert is a `grouped_linear`:
  weights with a dim of experts, or a matrix per assignment (`stacked`, and labelled);
- a parameter with a dim of experts and 1 for all other rows gives a row per expert.

Labels in front, features behind: a value whose rows stand behind its features is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import fx

from tedfx._torch import pytree
from tedfx.capture.batched import Batched, aligned, is_pointwise, is_value, leaves, refuse, unknown
from tedfx.capture.bodies import Bodies
from tedfx.capture.letters import Contraction, Letters, contraction_of, summed_product
from tedfx.capture.routing import (
    Dims,
    Fact,
    Routing,
    Sizes,
    name_of,
    product,
    relabel,
    shape_of,
    swapped,
)
from tedfx.capture.rules import apply_rule
from tedfx.capture.stacks import Stacks
from tedfx.capture.weights import weighted
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import operand
from tedfx.placement.sizes import Size

__all__ = ["LabelledBodies", "Side", "stripped"]

aten = torch.ops.aten
_PRODUCTS = ("einsum", "bmm", "matmul", "mm", "baddbmm")


def stripped(labels: Dims) -> Dims:
    """Without trailing dims of size 1: those count as features."""
    while labels and labels[-1] == ():
        labels = labels[:-1]
    return labels


@dataclass
class Side:
    """An operand of a product. `labels` of its letters that count rows; `value` where it is in the body."""

    node: fx.Node
    letters: Letters
    value: Batched | None = None
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, Size]:
        return dict(zip(self.letters, shape_of(self.node)))

    @property
    def kind(self) -> str:
        return "" if self.value is None else self.value.kind


class LabelledBodies(Bodies):
    """`inside`: the nodes of the body; `sizes` of the labels. `over`: labels of token dims that have experts
    of their own, so that an expert is one of each of them and of "e", in this order."""

    def __init__(
        self,
        graph: fx.Graph,
        routing: Routing,
        known: dict[fx.Node, Fact],
        stacks: Stacks,
        gathered: bool,
        sizes: Sizes,
        inside: set[fx.Node],
        over: tuple[str, ...] = (),
    ):
        super().__init__(graph, routing, known, stacks, gathered)
        self.sizes, self.inside = sizes, inside
        self.expert: Dims = tuple((label,) for label in (*over, "e"))  # the labels that say which expert
        if over:
            self.experts = int(product(sizes[label] for label in (*over, "e")))
            self.numbers = list(range(self.experts))
        self.values: dict[fx.Node, Batched] = {}
        self.labels: dict[fx.Node, Dims] = {}  # of the dims that count rows

    def value(self, node: fx.Node) -> Batched:
        if node not in self.values:
            self.values[node], self.labels[node] = self._value(node)
        return self.values[node]

    # --- what a body says of itself ---

    def _entry(self, node: fx.Node, name: str) -> tuple[Batched, Dims] | None:
        """The value of a node of the body that is none of the operators below."""
        return None

    def _begin(self, node: fx.Node, sides: tuple[Side, Side], out: Letters) -> tuple[Side, Side]:
        """(weights, tokens) of a product of two values that are not in the body."""
        raise unknown(node)

    def _tokens_of(self, side: Side, labels: dict, inner: str, node: fx.Node) -> Batched:
        """The rows of a value that is not in the body and meets a matrix per assignment."""
        raise unknown(node)

    def _differing(self, x: fx.Node, node: fx.Node, over: Dims) -> Batched:
        """A value that is not in the body and not the same for all rows of an expert; `over` are the labels
        at its leading dims."""
        raise refuse(
            "a value that differs between slots meets them",
            node,
            "compute a slot from the token in it alone",
        )

    # --- operators ---

    def _value(self, node: fx.Node) -> tuple[Batched, Dims]:
        name = name_of(node)
        found = self._entry(node, name)
        if found is not None:
            return found
        if name in _PRODUCTS:
            parsed = contraction_of(node)
            if parsed is None:
                raise unknown(node)
            return self._product(node, parsed, operand(node, 0) if name == "baddbmm" else None)
        if name == "sum" and (parsed := summed_product(node)) is not None and self._is_product(parsed):
            return self._product(node, parsed, None)
        mine = [n for n in node.all_input_nodes if n in self.inside]
        values = [self.value(n) for n in mine]
        if name == "getitem":  # a part of a chunk
            made = self.emit(node.target, (values[0].node, node.args[1]), {}, node)
            return replace(values[0], made=made, like=node), self.labels[mine[0]]
        rows = [n for n, value in zip(mine, values) if value.kind != "stacked"]
        if not rows:
            return self._layout(node, name, mine, values)
        labels, lead = self.labels[rows[0]], self.values[rows[0]]
        if any(self.labels[n] != labels or v.start for n, v in zip(mine, values) if v.kind != "stacked"):
            raise refuse(
                "slots meet in different orders", node, "keep the dims of experts and slots in one order"
            )
        for n, value in zip(mine, values):
            if value.kind == "stacked" and (
                stripped(self.labels[n]) != stripped(labels) or len(shape_of(n)) != len(lead.shape)
            ):
                raise refuse("an entry per assignment meets other rows", node, "keep them in one order")
        if name in ("permute", "transpose"):
            order = swapped(node, name, len(shape_of(node)))
            span = lead.span
            if sorted(order[:span]) == list(range(span)) and order[span:] == list(range(span, len(order))):
                return replace(lead, like=node), tuple(labels[d] for d in order[:span])
        elementwise = is_pointwise(node)
        convert = lambda x: self._operand(x, node, labels, elementwise) if isinstance(x, fx.Node) else x
        args, kwargs = pytree.tree_map(
            convert, (tuple(node.args), dict(node.kwargs)), is_leaf=lambda x: isinstance(x, fx.Node)
        )
        kinds = {v.kind for v in leaves((args, kwargs)) if is_value(v)}
        if kinds & {"weight", "weighted"}:
            out = weighted(self, node, name, args, kwargs)
        else:
            out = apply_rule(self, node, args, kwargs)
        if out.kind not in ("rows", "weighted") or not isinstance(VAL[node], torch.Tensor):
            return out, labels
        counted, before = shape_of(node)[: out.span], shape_of(rows[0])[: lead.span]
        found = None if out.start else labels if counted == before else relabel(labels, self.sizes, counted)
        if found is None:
            raise refuse(
                f"{node.target} takes experts and slots apart", node, "keep each in a dim of its own"
            )
        return out, found

    def _layout(
        self, node: fx.Node, name: str, mine: list[fx.Node], values: list[Batched]
    ) -> tuple[Batched, Dims]:
        """An operator of entries per assignment, with no row among its operands."""
        raise unknown(node)

    def _operand(self, x: fx.Node, node: fx.Node, labels: Dims, elementwise: bool) -> Batched:
        """What meets the rows: other rows; a value of each expert; one of all."""
        if x in self.inside:
            return self.value(x)
        if not isinstance(VAL.get(x), torch.Tensor) or not elementwise:
            return Batched("shared", x, x)
        shape, rank = shape_of(x), len(shape_of(node))
        lead = shape[: max(len(labels) - (rank - len(shape)), 0)]  # its dims that count rows
        features, over = shape[len(lead) :], labels[len(labels) - len(lead) :]
        if all(size == 1 for size in lead):
            return Batched(
                "shared",
                x if not lead else self.emit(aten.reshape.default, (x, features), {}, node),
                x,
                dropped=len(lead),
            )
        varies = tuple(label for size, label in zip(lead, over) if size != 1)
        if varies != self.expert or product(lead) != self.experts:
            return self._differing(x, node, over)
        each = (
            x if len(lead) == 1 else self.emit(aten.reshape.default, (x, [self.experts, *features]), {}, node)
        )
        return Batched("stacked", each, x, right=len(features), dropped=len(lead))

    # --- products with weights ---

    def _side(self, x: fx.Node, letters: Letters) -> Side:
        """An operand in the body, seen through what only turns its dims."""
        while x in self.inside and x not in self.values and name_of(x) in ("permute", "transpose"):
            order = swapped(x, name_of(x), len(letters))
            x, letters = operand(x, 0), [letters[order.index(d)] for d in range(len(letters))]
        if x not in self.inside:
            return Side(x, letters)
        value = self.value(x)
        if value.start:
            raise refuse("rows that stand behind features", x, "keep the rows' dims in front")
        return Side(x, letters, value, dict(zip(letters, self.labels[x])))

    def _is_product(self, parsed: Contraction) -> bool:
        """Whether a sum of an elementwise product takes rows times matrices."""
        for x, letters in parsed[:2]:
            features = len([s for s in shape_of(x) if isinstance(s, int) and s != 1])
            if x in self.inside and self.value(x).kind == "stacked":
                features = len([s for s in shape_of(x)[len(self.labels[x]) :] if s != 1])
            elif x in self.inside:
                continue
            if features >= 2 and set(letters) - set(parsed[2]):
                return True
        return False

    def _product(self, node: fx.Node, parsed: Contraction, bias: fx.Node | None) -> tuple[Batched, Dims]:
        if bias is not None and node.kwargs:
            raise unknown(node)
        sides, out = [self._side(*parsed[0]), self._side(*parsed[1])], parsed[2]
        stacked = [s for s in sides if s.kind == "stacked"]
        rows = [s for s in sides if s.kind in ("rows", "weighted")]
        if len(rows) > 1 or (bias in self.inside and self.value(bias).kind != "stacked"):
            raise refuse("a product of slots with slots", node, "let an expert work on each row alone")
        if len(stacked) > 1:
            raise refuse("a product of an expert's parameters", node, "compute it for all experts first")
        if stacked or rows:
            weight = stacked[0] if stacked else next(s for s in sides if s is not rows[0])
            row = next(s for s in sides if s is not weight)
        else:
            weight, row = self._begin(node, (sides[0], sides[1]), out)
        matrix, left, expert = self._matrices(weight, row, node)
        labels = {x: weight.labels.get(x) or row.labels.get(x) for x in {*weight.letters, *row.letters}}
        inner, new = self._contracted(weight, row, left, out, labels, node)
        value = row.value if row.value is not None else self._tokens_of(row, labels, inner, node)
        front = max((d for d, x in enumerate(out) if labels.get(x)), default=-1) + 1
        order = tuple(labels.get(letter) or () for letter in out[:front])
        if front == 0 or new in out[:front]:
            raise refuse("rows that stand behind features", node, "keep the rows' dims in front")
        made = self._emit_product(value, matrix, left, expert, inner, new, node)
        features = out[front:]
        if features != [new]:
            made = self.emit(
                aten.reshape.default,
                (made, [-1, *(shape_of(made)[-1] if x == new else 1 for x in features)]),
                {},
                node,
            )
        result = Batched("rows", made, node, len(features), front)
        if bias is not None:
            if value.kind == "weighted":
                raise refuse(
                    "a bias on rows that carry their routing weight", node, "weigh the expert's result last"
                )
            given = self._operand(bias, node, order, elementwise=True)
            result = replace(
                result, made=self.emit(aten.add.Tensor, (made, aligned(self, node, given, result)), {}, node)
            )
        if value.kind == "weighted":
            result = replace(result, kind="weighted", of=value.of)
        return result, order

    def _matrices(self, weight: Side, row: Side, node: fx.Node) -> tuple[fx.Node, Letters, str | None]:
        """The weights without dims of size 1, their letters, and which of these is the expert's."""
        if weight.value is not None:  # one per assignment: the stack itself
            features = weight.letters[len(self.labels[weight.node]) :]
            left = ["expert", *features]
            if {x: y for x, y in row.labels.items() if y} != {
                x: y for x, y in weight.labels.items() if y
            } and (row.value is not None):
                raise refuse(
                    "rows meet matrices of other assignments", node, "let row (token, choice) meet its own"
                )
            squeezed, left = self._squeezed(weight.value.node, left, node)
            return squeezed, left, "expert"
        labels = {**row.labels, **weight.labels}
        matrix, left = self._squeezed(weight.node, weight.letters, node)
        own = [x for label in self.expert for x in left if labels.get(x) == label]
        if not own:
            return matrix, left, None  # one matrix for all
        if len(own) != len(self.expert):
            raise refuse("matrices of some experts alone", node, "let every expert have its own")
        if len(own) > 1:
            rest = [x for x in left if x not in own]
            order = [left.index(x) for x in (*own, *rest)]
            if order != list(range(len(order))):
                matrix = self.emit(aten.permute.default, (matrix, order), {}, node)
            shape = [self.experts, *shape_of(matrix)[len(own) :]]
            matrix, left = self.emit(aten.reshape.default, (matrix, shape), {}, node), [own[-1], *rest]
        return matrix, left, own[-1]

    def _contracted(
        self, weight: Side, row: Side, left: Letters, out: Letters, labels: dict, node: fx.Node
    ) -> tuple[str, str]:
        """The letter that is summed over, and the letter of the new features."""
        own = [x for x in left if x != "expert" and not labels.get(x)]
        features = [
            x for x, size in row.sizes.items() if not row.labels.get(x) and not labels.get(x) and size != 1
        ]
        inner, new = [x for x in own if x not in out], [x for x in own if x in out]
        rows = {x for x, label in labels.items() if label}
        stray = [x for x in left if x != "expert" and labels.get(x) not in (None, (), *self.expert)]
        if (
            (len(inner), len(new)) != (1, 1)
            or features != inner
            or not rows <= set(out)
            or (stray and weight.value is None)
        ):
            raise refuse(
                "a product that is not one of each row with a matrix of its expert",
                node,
                "contract the features alone: einsum('ech,ehf->ecf', ..)",
            )
        return inner[0], new[0]

    def _emit_product(
        self,
        value: Batched,
        matrix: fx.Node,
        left: Letters,
        expert: str | None,
        inner: str,
        new: str,
        node: fx.Node,
    ) -> fx.Node:
        rows = value.node
        if value.right != 1:
            width = next(size for size in shape_of(rows)[1:] if size != 1)
            rows = self.emit(aten.reshape.default, (rows, [-1, width]), {}, node)
        if expert is None:
            target = aten.matmul.default if left[0] == inner else aten.linear.default
            return self.emit(target, (rows, matrix), {}, node)
        transposed = left.index(inner) < left.index(new)
        if left[0] != expert:
            order = [left.index(x) for x in (expert, inner, new)]
            matrix, transposed = self.emit(aten.permute.default, (matrix, order), {}, node), True
        return self.grouped(rows, matrix, transposed, node)

    def _squeezed(self, weight: fx.Node, letters: Letters, node: fx.Node) -> tuple[fx.Node, Letters]:
        shape = shape_of(weight)
        kept = [d for d, size in enumerate(shape) if size != 1 or len(shape) <= 2]
        if len(kept) == len(shape):
            return weight, letters
        return self.emit(aten.reshape.default, (weight, [shape[d] for d in kept]), {}, node), [
            letters[d] for d in kept
        ]
