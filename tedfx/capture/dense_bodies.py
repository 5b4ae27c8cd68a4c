"""Experts that are computed for a tensor of assignments become the same on the rows of a dispatch.

Two ways to begin (the walk between is labelled.py's):

- **gathered weights**, `w[ids]`: an entry of a stack per (token, choice), `stacked` with the labels of the
  ids. A token meets its matrices in a product, as it is or as a copy per choice (expansions.py).
- **all experts on all tokens**: a product of tokens with weights that have a dim of experts, or E values
  stacked, each of one expert: labels e and the tokens'. Only rows that the router chose are computed. So what
  it chose is read at its ids (`picks`: label e becomes k), or what is summed in the end is provably zero for
  all others: its weights are a gate (masks.py), or the tokens were multiplied by one before the experts, and
  these map zero to zero (vanishing.py).

The end is a sum over the choices, or over the experts (`ending`). With one choice per token nothing is summed
and the body ends with the last product (`last`).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from tedfx._torch import pytree
from tedfx.capture.batched import Batched, is_pointwise, refuse, unknown
from tedfx.capture.batched_dims import ALONG
from tedfx.capture.expansions import copied, unexpanded
from tedfx.capture.gathers import Picked
from tedfx.capture.labelled import LabelledBodies, Side
from tedfx.capture.letters import Letters, contraction_of
from tedfx.capture.routing import (
    Dims,
    Fact,
    Routing,
    argument,
    dim_of,
    known_of,
    name_of,
    product,
    relabel,
    shape_of,
    swapped,
)
from tedfx.capture.rows import Dispatched
from tedfx.capture.rules import apply_rule
from tedfx.capture.stacks import Stacks
from tedfx.capture.vanishing import vanishes
from tedfx.capture.weights import Weight
from tedfx.graph import nodes
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import REGROUPS, is_tensor, operand, operator_of

__all__ = ["DenseBodies", "Ending"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Ending:
    """What `node` sums: rows, their weights, and the labels of its own dims ("f": the features)."""

    node: fx.Node
    rows: Batched
    weight: Weight | None
    dims: Dims


class DenseBodies(LabelledBodies):
    """One body. `gathers`: of each `w[ids]` the stack and the labels of the ids; `spread`: of nodes that
    begin it, the dim of experts; `picks`: those that read at the ids what all experts made."""

    def __init__(
        self,
        graph: fx.Graph,
        routing: Routing,
        known: dict[fx.Node, Fact],
        stacks: Stacks,
        inside: set[fx.Node],
        gathers: Mapping[fx.Node, tuple[fx.Node, Dims]],
        spread: Mapping[fx.Node, int],
        picks: Mapping[fx.Node, Picked],
    ):
        super().__init__(graph, routing, known, stacks, False, routing.sizes, inside)
        self.gathers, self.spread, self.picks = gathers, spread, picks
        self.summed = "k" if gathers or picks else "e"
        self.gates: set[Weight] = set()  # weights that are zero for experts that were not chosen
        self.zeros: set[fx.Node] = set()  # tokens times a gate
        self.scale: Weight | None = None  # that gate
        self.scaled: Any = None  # which token it scales, and casts

    # --- how a body begins ---

    def _entry(self, node: fx.Node, name: str) -> tuple[Batched, Dims] | None:
        if node in self.gathers:
            stack, dims = self.gathers[node]
            return Batched(
                "stacked", stack, node, right=len(shape_of(node)) - len(dims), dropped=len(dims)
            ), dims
        if node in self.picks:
            return self._picked(node, self.picks[node])
        if (
            name in ("stack", "cat")
            and node in self.spread
            and not any(x in self.spread for x in nodes.argument(node, 0))
        ):
            return self._listed(node, name)
        return None

    def _picked(self, node: fx.Node, pick: Picked) -> tuple[Batched, Dims]:
        """The rows of all experts at the ids: what a row is does not change."""
        value, labels, dim = self.value(pick.source), self.labels[pick.source], pick.dim
        front = pick.dims[: len(labels)] if name_of(node) == "gather" else pick.dims
        others = [*labels[:dim], *labels[dim + 1 :]]
        theirs = [x for d, x in enumerate(front) if d != dim]
        if value.kind not in ("rows", "weighted") or labels[dim : dim + 1] != (("e",),) or others != theirs:
            raise refuse("what experts made is read at other ids", node, "read y[n, ids[n, k]]")
        return replace(value, like=node, span=len(front)), front

    def _listed(self, node: fx.Node, name: str) -> tuple[Batched, Dims]:
        """E values, one per expert."""
        out = self.lift(tuple(nodes.argument(node, 0)))
        if out.kind not in ("rows", "weighted") or out.start:
            raise refuse("what an expert gives is not a row per token", node, "give every token a row")
        if out.kind == "weighted":  # no weight of a single expert is known but a gate's (bodies.py)
            self._gate(out.of, node)
        dim = dim_of(node, len(shape_of(node)), default=0)
        shape = shape_of(node)
        if name == "cat" or dim is None or dim > out.span:
            raise refuse(
                "the experts' rows are put together along features",
                node,
                "stack them along a dim of experts",
            )
        del shape[dim]
        tokens = tuple((label,) for label in self.routing.tokens)
        labels = relabel(tokens, self.sizes, shape[: out.span])
        if labels is None:
            raise refuse("what an expert gives is not a row per token", node, "give every token a row")
        return replace(out, like=node, span=out.span + 1), (*labels[:dim], ("e",), *labels[dim:])

    def _begin(self, node: fx.Node, sides: tuple[Side, Side], out: Letters) -> tuple[Side, Side]:
        fixed = [all(isinstance(s, int) for s in shape_of(s.node)) for s in sides]
        if fixed[0] == fixed[1]:
            raise unknown(node)
        weight, row = (sides[0], sides[1]) if fixed[0] else (sides[1], sides[0])
        both = [x for x in out if x in weight.letters and x in row.letters]
        expert = out[self.spread[node]] if node in self.spread else both[0] if len(both) == 1 else ""
        if weight.sizes.get(expert) != self.experts:
            raise unknown(node)
        weight.labels[expert] = ("e",)
        if row.sizes.get(expert, 1) != 1:
            row.labels[expert] = ("e",)
        counting = [x for x in row.letters if x in out and x != expert and row.sizes[x] != 1]
        tokens = relabel(
            tuple((label,) for label in self.routing.tokens), self.sizes, [row.sizes[x] for x in counting]
        )
        if tokens is None:
            raise refuse("not all tokens meet the experts", node, "let every expert read every token")
        row.labels.update(zip(counting, tokens))
        return weight, row

    def _tokens_of(self, side: Side, labels: dict, inner: str, node: fx.Node) -> Batched:
        sizes = {**self.sizes, "f": side.sizes[inner]}
        dims = tuple(
            () if side.sizes[x] == 1 else ("f",) if x == inner else labels.get(x) or ("?",)
            for x in side.letters
        )
        x, dims, casts = unexpanded(side.node, dims, sizes)
        scale, product_of = None, x
        if copied(dims) and name_of(x) == "mul":
            x, dims, scale = self._unscaled(x, dims)
            x, dims, before = unexpanded(x, dims, sizes)
        else:
            before, casts = casts, []
        flat = [label for dim in dims for label in dim]
        if sorted(flat) != sorted((*self.routing.tokens, "f")) or ("f",) not in dims:
            raise refuse(
                "what meets an expert's weights is not a row of features per token",
                node,
                "let an expert read the token itself",
            )
        order = sorted(
            (d for d, dim in enumerate(dims) if dim),
            key=lambda d: -1 if dims[d] == ("f",) else self.routing.tokens.index(dims[d][0]),
        )
        order = [*order[1:], order[0]]
        if tuple(label for d in order[:-1] for label in dims[d]) != self.routing.tokens:
            raise refuse("tokens in another order than their ids", node, "keep the tokens' dims in order")
        key = (x, tuple(before), scale, tuple(casts))
        if self.scaled is not None and self.scaled != key:
            raise refuse(
                "an expert reads two values of a token",
                node,
                "let every expert read one value per token (concatenate them)",
            )
        if self.scaled is None:
            self.scaled, self.scale = key, scale
            if order != sorted(order):
                rest = [d for d, dim in enumerate(dims) if not dim]
                x = self.emit(aten.permute.default, (x, [*order, *rest]), {}, node)
            self._dispatch(x, before, casts, side.sizes[inner], node)
        if scale is not None:
            self.zeros.add(product_of)
        return Batched("rows", self.rows, side.node, right=1, span=0)

    def _unscaled(self, x: fx.Node, dims: Dims) -> tuple[fx.Node, Dims, Weight]:
        """(tokens, their dims, gate) of tokens times a gate, a copy per expert."""
        left, right = x.args[:2]
        for source, gate in ((left, right), (right, left)):
            fact = known_of(self.known, gate)
            if fact is None or not is_tensor(source) or not is_tensor(gate):
                continue
            own = tuple(
                () if size == 1 else dim
                for size, dim in zip(shape_of(gate), dims[len(dims) - len(shape_of(gate)) :])
            )
            if fact.kind == "gate" and fact.dims == own and ("f",) not in own:
                theirs = dims[len(dims) - len(shape_of(source)) :]
                kept = tuple(() if size == 1 else dim for size, dim in zip(shape_of(source), theirs))
                return source, kept, self._weight(gate, own, x)
        raise refuse(
            "a token meets the experts in different forms", x, "weigh by a gate that is zero where not chosen"
        )

    def _dispatch(self, x: fx.Node, before: list, casts: list, width: Any, node: fx.Node) -> None:
        if not isinstance(width, int):
            raise refuse(
                "tokens whose number of features is not fixed", node, "let a token be a row of a fixed size"
            )
        if len(shape_of(x)) != 2:
            x = self.emit(aten.reshape.default, (x, [-1, width]), {}, node)
        for dtype in before:
            x = self.emit(aten.to.dtype, (x, dtype), {}, node)
        ids = self.flat(self.routing.node, self.routing.dims, node)
        if self.scale is not None:
            weights = self.weights(self.scale, node)
            if self.routing.choices > 1:  # an assignment is a token of one choice
                x = self.emit(aten.unsqueeze.default, (x, 1), {}, node)
                weights = self.emit(aten.unsqueeze.default, (weights, 2), {}, node)
                ids = self.emit(aten.reshape.default, (ids, [-1, 1]), {}, node)
            x = self.emit(aten.mul.Tensor, (x, weights), {}, node)
            if self.routing.choices > 1:
                x = self.emit(aten.reshape.default, (x, [-1, width]), {}, node)
            for dtype in casts:
                x = self.emit(aten.to.dtype, (x, dtype), {}, node)
        out = self.emit(torch.ops.tedfx.dispatch.default, (x, ids, self.experts), {}, node)
        self.dispatched = Dispatched(*(self.emit(operator.getitem, (out, i), {}, node) for i in range(3)))

    # --- entries per assignment ---

    def _layout(
        self, node: fx.Node, name: str, mine: list[fx.Node], values: list[Batched]
    ) -> tuple[Batched, Dims]:
        """Done to the stack itself, on the features of its entries."""
        source, value, labels = mine[0], values[0], self.labels[mine[0]]
        lead, rank = len(labels), len(shape_of(source))
        if is_pointwise(node):
            if any(self.labels[n] != labels or len(shape_of(n)) != rank for n in mine):
                raise refuse("entries of different assignments meet", node, "keep them in one order")
            convert = lambda x: (
                (self.values[x] if x in self.inside else Batched("shared", x, x))
                if isinstance(x, fx.Node)
                else x
            )
            args, kwargs = pytree.tree_map(
                convert, (tuple(node.args), dict(node.kwargs)), is_leaf=lambda x: isinstance(x, fx.Node)
            )
            if len(shape_of(node)) != rank:
                raise unknown(node)
            out = apply_rule(self, node, args, kwargs)
            return replace(out, right=rank - lead, dropped=lead), labels
        if sum(is_tensor(x) for x in node.all_input_nodes) > 1:
            raise unknown(node)
        if name in REGROUPS:
            return self._regrouped(node, value, labels)
        if name in ("permute", "transpose"):
            order = swapped(node, name, rank)
            if sorted(order[:lead]) != list(range(lead)):
                raise unknown(node)
            dims = [0, *(d - lead + 1 for d in order[lead:])]
            made = value.node
            if dims != sorted(dims):
                made = self.emit(aten.permute.default, (made, dims), {}, node)
            return replace(value, made=made, like=node), tuple(labels[d] for d in order[:lead])
        if name == "unsqueeze":
            at = argument(node, "dim") % (rank + 1)
            if at < lead:
                return replace(value, like=node, dropped=lead + 1), (*labels[:at], (), *labels[at:])
            made = self.emit(aten.unsqueeze.default, (value.node, at - lead + 1), {}, node)
            return replace(value, made=made, like=node, right=value.right + 1), labels
        dim = dim_of(node, rank) if name in ALONG | {"select", "unbind"} else None
        if dim is None or dim < lead:
            raise unknown(node)
        others = operator_of(node)._schema.arguments[1:]
        given = [dim - lead + 1 if spec.name == "dim" else argument(node, spec.name) for spec in others]
        made = self.emit(node.target, (value.node, *given), {}, node)
        gone = name in ("select", "unbind")
        return replace(value, made=made, like=node, right=value.right - gone), labels

    def _regrouped(self, node: fx.Node, value: Batched, labels: Dims) -> tuple[Batched, Dims]:
        shape, features = shape_of(node), product(value.shape)
        for lead in range(1, len(shape) + 1):
            found = relabel(labels, self.sizes, shape[:lead])
            if found is not None and product(shape[lead:]) == features:
                made = self.emit(aten.reshape.default, (value.node, [self.experts, *shape[lead:]]), {}, node)
                return Batched("stacked", made, node, right=len(shape) - lead, dropped=lead), found
        raise unknown(node)

    # --- weights ---

    def _differing(self, x: fx.Node, node: fx.Node, over: Dims) -> Batched:
        shape = shape_of(x)
        dims = (*over, *((),) * (len(shape) - len(over)))
        dims = tuple(() if size == 1 else dim for size, dim in zip(shape, dims))
        if any(size != 1 for size in shape[len(over) :]):
            raise refuse(
                "a value that differs between the rows of an expert meets them",
                node,
                "compute a row from its token alone",
            )
        span = len(shape_of(node)) - len(shape) + len(over)
        weight = self._weight(x, dims, node)
        return Batched("weight", None, node, right=len(shape_of(node)) - span, span=span, of=weight)

    def _weight(self, x: fx.Node, dims: Dims, like: fx.Node) -> Weight:
        """One number per row; over all experts it is a gate."""
        if any(
            dim and size != product(self.sizes[label] for label in dim)
            for size, dim in zip(shape_of(x), dims)
        ):
            raise refuse("a weight that is not one number per row", like, "weigh by w[token, choice]")
        if any("e" in dim for dim in dims):
            fact = self.known.get(x)
            if (
                fact is None
                or (fact.kind, fact.routing, fact.dims) != ("gate", self.routing, dims)
                or fact.expert is not None
                or fact.weight is None
            ):
                raise refuse(
                    "every expert runs on every token, and nothing makes its result zero where it was not "
                    "chosen",
                    like,
                    "weigh by a gate made from the router's choice: zeros.scatter(1, ids, w)",
                )
            if not any("e" in dim for dim in fact.weight[1]):
                return self._gate(Weight(*fact.weight, casts=(VAL[x].dtype,)), like)
            return self._gate(Weight(*self._apart(x, dims, like)), like)
        return Weight(*self._apart(x, dims, like))

    def _gate(self, weight: Weight, like: fx.Node) -> Weight:
        over_experts = any("e" in dim for dim in weight.dims)
        if over_experts and not self.routing.unique and self.routing.choices > 1:
            raise refuse(
                "a token that may name an expert twice is weighed by the sum of both",
                like,
                "take ids from a topk",
            )
        self.gates.add(weight)
        return weight

    def _apart(self, x: fx.Node, dims: Dims, like: fx.Node) -> tuple[fx.Node, Dims]:
        """With the choices or experts in a dim of their own."""
        out: list[tuple[str, ...]] = []
        for dim in dims:
            if len(dim) > 1 and copied((dim,)):
                first = dim[:1] if dim[0] in "ke" else dim[:-1]
                out += [first, dim[len(first) :]]
            else:
                out.append(dim)
        if out == list(dims):
            return x, dims
        sizes = [product(self.sizes[label] for label in dim) for dim in out]
        shape = [size if isinstance(size, int) else -1 for size in sizes]
        if shape.count(-1) > 1:
            raise refuse("weights of flattened choices", like, "weigh by w[token, choice]")
        return self.emit(aten.reshape.default, (x, shape), {}, like), tuple(out)

    # --- how it ends ---

    def ending(self, node: fx.Node) -> Ending | None:
        """What a sum over the choices or experts sums; None for what is none."""
        name = name_of(node)
        if name == "sum" and operand(node, 0) in self.inside and argument(node, "dim") is not None:
            return self._summed(node, operand(node, 0))
        parsed = contraction_of(node) if name in ("einsum", "bmm", "matmul", "mm") else None
        if parsed is None or (parsed[0][0] in self.inside) == (parsed[1][0] in self.inside):
            return None
        (y, mine), (w, theirs), out = (
            parsed if parsed[0][0] in self.inside else (parsed[1], parsed[0], parsed[2])
        )
        side = self._side(y, mine)
        if side.value is None or side.kind not in ("rows", "weighted"):
            return None
        gone = {label for x, dim in side.labels.items() if x not in out for label in dim}
        if not gone:
            return None
        self._check_gone(gone, node)
        sizes = dict(zip(theirs, shape_of(w)))
        features = [x for x, size in side.sizes.items() if not side.labels.get(x) and size != 1]
        if (
            len(features) != 1
            or features[0] in theirs
            or any(sizes[x] != 1 and not side.labels.get(x) for x in theirs)
        ):
            raise refuse("a weight that is not one number per row", node, "weigh by w[token, choice]")
        weight = self._weight(w, tuple(() if sizes[x] == 1 else side.labels[x] for x in theirs), node)
        dims = tuple(("f",) if x in features else side.labels.get(x) or () for x in out)
        return self._end(node, y, side.value, weight, dims)

    def _summed(self, node: fx.Node, y: fx.Node) -> Ending | None:
        rank, given = len(shape_of(y)), argument(node, "dim")
        over = {d % rank for d in (given if isinstance(given, (list, tuple)) else [given])}
        parsed_later = (
            name_of(y) == "mul" and not any(x in self.values for x in (y,)) and self._begins_with(y)
        )
        if parsed_later:
            return None
        value = self.value(y)
        if value.kind not in ("rows", "weighted"):
            return None
        labels = (*self.labels[y], *((),) * (rank - len(self.labels[y])))
        gone = {label for d in over for label in labels[d]}
        if not gone:
            return None
        self._check_gone(gone, node)
        features = [d for d in range(len(self.labels[y]), rank) if shape_of(y)[d] != 1]
        if len(features) != 1 or over & set(features):
            raise refuse("what is summed is not a row of features per token", node, "give every token a row")
        dims = tuple(("f",) if d in features else () if d in over else labels[d] for d in range(rank))
        if not argument(node, "keepdim"):
            dims = tuple(dim for d, dim in enumerate(dims) if d not in over)
        return self._end(node, y, value, None, dims)

    def _begins_with(self, y: fx.Node) -> bool:
        """Whether a product is one of tokens with a matrix per assignment, of which only the sum is rows."""
        return all(
            x not in self.inside or self.value(x).kind == "stacked" for x in y.all_input_nodes if is_tensor(x)
        )

    def last(self, node: fx.Node) -> Ending:
        """The end of a body with one choice per token."""
        value = self.value(node)
        rank, labels = len(shape_of(node)), self.labels[node]
        features = [d for d in range(len(labels), rank) if shape_of(node)[d] != 1]
        if value.kind not in ("rows", "weighted") or len(features) != 1:
            raise refuse(
                "what an expert gives is not a row of features per token", node, "give every token a row"
            )
        dims = tuple(labels[d] if d < len(labels) else ("f",) if d in features else () for d in range(rank))
        return self._end(node, node, value, None, dims)

    def _check_gone(self, gone: set[str], node: fx.Node) -> None:
        if gone != {self.summed}:
            raise refuse("rows of different tokens are summed", node, "sum over a token's own choices only")

    def _end(self, node: fx.Node, y: fx.Node, value: Batched, weight: Weight | None, dims: Dims) -> Ending:
        if value.kind == "weighted":
            if weight is not None or self.scale is not None:
                raise refuse("rows are weighed twice", node, "weigh an expert's result once")
            weight = value.of
        if self.scale is not None:
            if weight is not None:
                raise refuse("rows are weighed twice", node, "weigh an expert's result once")
            if not vanishes(y, self.zeros):
                raise refuse(
                    "tokens are weighed before the experts, which may give something for a token of zeros",
                    node,
                    "weigh what the experts give",
                )
        elif self.summed == "e" and weight not in self.gates:
            raise refuse(
                "every expert runs on every token, and nothing makes its result zero where it was not chosen",
                node,
                "weigh by a gate made from the router's choice: zeros.scatter(1, ids, w)",
            )
        if self.dispatched is None:
            raise refuse("no token meets an expert", node, "")
        return Ending(node, value, weight, dims)

    def finish(self, end: Ending) -> fx.Node:
        """Emit combine, in the shape and dtype of the model's sum."""
        like, rows = end.node, end.rows.node
        width = next(size for size in shape_of(rows)[1:] if size != 1)
        if len(shape_of(rows)) != 2:
            rows = self.emit(aten.reshape.default, (rows, [-1, width]), {}, like)
        choices = self.routing.choices
        weights = self.weights(end.weight, like)
        each = self.scale is not None and choices > 1
        if each:
            weights = self.emit(aten.reshape.default, (weights, [-1, 1]), {}, like)
        elif shape_of(weights)[1] != choices:  # one of all choices
            weights = self.emit(aten.expand.default, (weights, [-1, choices]), {}, like)
        out = self.emit(torch.ops.tedfx.combine.default, (rows, self.sorted, weights), {}, like)
        if each:
            out = self.emit(aten.reshape.default, (out, [-1, choices, width]), {}, like)
            out = self.emit(aten.sum.dim_IntList, (out, [1]), {}, like)
        if VAL[out].dtype != VAL[like].dtype:
            out = self.emit(aten.to.dtype, (out, VAL[like].dtype), {}, like)
        return self._shaped(out, end.dims, like)

    def _shaped(self, out: fx.Node, dims: Dims, like: fx.Node) -> fx.Node:
        """[N, H] as the model has it."""
        given = [dim for dim in dims if dim]
        tokens = sorted(
            (dim for dim in given if dim != ("f",)), key=lambda dim: self.routing.tokens.index(dim[0])
        )
        if tuple(label for dim in tokens for label in dim) != self.routing.tokens:
            raise refuse("what is summed is not a row per token", like, "let it be (tokens, features)")
        if len(tokens) > 1:
            sizes = [self.size_of(dim, like) for dim in tokens]
            out = self.emit(aten.reshape.default, (out, [*sizes, shape_of(out)[-1]]), {}, like)
        now = [*tokens, ("f",)]
        if now != given:
            out = self.emit(aten.permute.default, (out, [now.index(dim) for dim in given]), {}, like)
        for d, dim in enumerate(dims):
            if not dim:
                out = self.emit(aten.unsqueeze.default, (out, d), {}, like)
        if shape_of(out) != shape_of(like):
            raise refuse(f"a sum of shape {shape_of(like)} of rows of shape {shape_of(out)}", like, "")
        return out

    def size_of(self, dim: tuple[str, ...], like: fx.Node) -> fx.Node:
        """The size of a dim with this label, as the ids have it."""
        if dim not in self.routing.dims:
            raise refuse(
                "tokens are grouped otherwise than where they were routed",
                like,
                "route and sum in the same groups",
            )
        return self.emit(aten.sym_size.int, (self.routing.node, self.routing.dims.index(dim)), {}, like)
