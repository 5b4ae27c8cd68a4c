"""Rows of tokens and their weights: what enters the batched body of the experts, and what leaves it.

Rows enter by a gather, `x[token]` or `x[mask]`; or, where every expert runs on every token and is masked
afterwards, wherever the tokens meet an expert's parameter. Both become the rows of one `dispatch`. All
searches of a body must list an expert's tokens in one order.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from tedfx.capture.batched import Batched, refuse
from tedfx.capture.classes import runs_of
from tedfx.capture.routing import Dims, Fact, Routing, argument, name_of, number_of, product, shape_of
from tedfx.capture.weights import Weight, weight
from tedfx.errors import TedfxError
from tedfx.graph.emit import emit
from tedfx.graph.facts import SLOTS, VAL
from tedfx.graph.nodes import operand
from tedfx.placement.sizes import Size, as_size
from tedfx.placement.slots import Slots

__all__ = ["Dispatched", "Rows"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Dispatched:
    """What a `dispatch` made: rows sorted by expert, how many each expert has, and their order."""

    rows: fx.Node
    counts: fx.Node
    sorted: fx.Node


class Rows:
    """The rows of one loop: what `dispatch` made of its tokens."""

    def __init__(
        self,
        graph: fx.Graph,
        routing: Routing,
        gathered: bool,
        numbers: Sequence[int] | None = None,
        plain: Collection[fx.Node] = (),
    ):
        """`numbers`: which of the routing's experts, in ascending order; None: all. `plain`: the body of
        experts that all compute one value of a token (classes.py): rows are tokens, nothing is dispatched."""
        self.graph, self.routing, self.gathered, self.plain = graph, routing, gathered, plain
        self.numbers = list(range(routing.experts) if numbers is None else numbers)
        self.experts = len(self.numbers)
        self.order: tuple[str, ...] | None = None  # of the rows in every search of a body
        self.at_most: Any = None  # how many of an expert's tokens every search of a body keeps
        self.transposes: dict[fx.Node, fx.Node] = {}  # an emitted transpose of a stacked matrix -> the matrix
        self.flattened: dict[tuple[fx.Node, Dims], fx.Node] = {}
        self.x: fx.Node | None = None
        self.tokens_of: fx.Node | None = None  # the tokens [N, H] of plain experts
        self.dispatched: Dispatched | None = None
        # (True,) where some rows belong to no expert: the last argument of the ops that tell experts apart
        self.tail: tuple[bool, ...] = ()
        self._sent: fx.Node | None = None
        # the mask of the assignments that the searches of a body find; None: all
        self.kept: tuple[fx.Node, Dims] | None = None

    @property
    def _dispatched(self) -> Dispatched:
        if self.dispatched is None:
            raise TedfxError("rows of the experts are asked for before any token is dispatched")
        return self.dispatched

    @property
    def rows(self) -> fx.Node:
        return self._dispatched.rows if self.tokens_of is None else self.tokens_of

    @property
    def counts(self) -> fx.Node:
        return self._dispatched.counts

    @property
    def sorted(self) -> fx.Node:
        return self._dispatched.sorted

    def emit(self, target: Any, args: tuple, kwargs: dict, like: fx.Node) -> fx.Node:
        return emit(self.graph, target, tuple(args), dict(kwargs), like=like)

    def dispatch(self, x: fx.Node, like: fx.Node) -> fx.Node:
        """The rows of `x` (tokens first), sorted by expert; only one value is dispatched."""
        if self.x is not None:
            if self.x is not x:
                raise refuse(
                    "an expert reads two values of a token",
                    like,
                    "let every expert read one value per token (concatenate them)",
                )
            return self.rows
        self.x = x
        shape = shape_of(x)
        if not isinstance(shape[-1], int):
            raise refuse(
                "tokens whose number of features is not fixed", like, "let a token be a row of a fixed size"
            )
        flat = x if len(shape) == 2 else self.emit(aten.reshape.default, (x, [-1, shape[-1]]), {}, like)
        if self.plain:
            self.tokens_of = flat
            return flat
        ids = self.sent(like)
        self.tail = (True,) if ids is not self._ids(like) else ()
        out = self.emit(torch.ops.tedfx.dispatch.default, (flat, ids, self.experts, *self.tail), {}, like)
        if (capacity := number_of(self.at_most)) is not None:
            tokens = tuple((as_size(self.routing.sizes[label]), True) for label in self.routing.tokens)
            SLOTS[out] = Slots(capacity, tokens)
        self.dispatched = Dispatched(*(self.emit(operator.getitem, (out, i), {}, like) for i in range(3)))
        return self.rows

    def _ids(self, like: fx.Node) -> fx.Node:
        return self.flat(self.routing.node, self.routing.dims, like)

    def sent(self, like: fx.Node) -> fx.Node:
        """Which of these experts each assignment [N, K] goes to; those that are left out, and those of other
        experts, are no expert's, and their rows the tail."""
        if self._sent is not None:
            return self._sent
        ids = sent = self._ids(like)
        if self.experts < self.routing.experts:
            sent = self.emit(aten.full_like.default, (ids, self.experts), {}, like)
            for first, behind, place in runs_of(self.numbers):
                low = self.emit(aten.ge.Scalar, (ids, first), {}, like)
                high = self.emit(aten.lt.Scalar, (ids, behind), {}, like)
                mine = self.emit(aten.logical_and.default, (low, high), {}, like)
                own = self.emit(aten.sub.Scalar, (ids, first - place), {}, like)
                sent = self.emit(aten.where.self, (mine, own, sent), {}, like)
        if self.kept is not None and self.at_most is not None:
            raise refuse(
                "an expert takes the first of those of its tokens that a mask lets through",
                like,
                "count places among the tokens that are let through: (mask.cumsum(0) <= capacity) & mask",
            )
        if self.at_most is not None:
            sent = self._first(sent, self.at_most, like)
        if self.kept is not None:
            read = self.emit(aten.gather.default, (self.flat(*self.kept, like), 1, ids), {}, like)
            kept = self.emit(aten.ne.Scalar, (read, 0), {}, like)
            sent = self.emit(aten.where.ScalarOther, (kept, sent, self.experts), {}, like)
        self._sent = sent
        return sent

    def _first(self, ids: fx.Node, at_most: object, like: fx.Node) -> fx.Node:
        """The ids [N, K] of the first tokens of each expert, in the order of the searches; no expert's (E)
        where an expert has as many already."""
        tokens = self.routing.tokens
        if self.order not in (None, tokens, (*tokens, "k"), ("k", *tokens)):
            raise refuse(
                "an expert takes the first of tokens that are searched in another order than theirs",
                like,
                "search by token, or by choice and then by token",
            )
        choices_first = self.order is not None and self.order[:1] == ("k",)
        turn = lambda x: self.emit(aten.permute.default, (x, [1, 0]), {}, like) if choices_first else x
        flat = self.emit(aten.reshape.default, (turn(ids), [-1]), {}, like)
        hits = self.emit(aten.one_hot.default, (flat, self.experts), {}, like)
        place = self.emit(aten.cumsum.default, (hits, 0), {}, like)  # counted from 1
        column = self.emit(aten.unsqueeze.default, (flat, -1), {}, like)
        place = self.emit(aten.gather.default, (place, 1, column), {}, like)
        kept = self.emit(aten.le.Scalar, (place, at_most), {}, like)
        count = self.routing.choices
        kept = self.emit(
            aten.reshape.default, (kept, [count, -1] if choices_first else [-1, count]), {}, like
        )
        return self.emit(aten.where.ScalarOther, (turn(kept), ids, self.experts), {}, like)

    def flat(self, node: fx.Node, dims: Dims, like: fx.Node) -> fx.Node:
        """A value with these labels as [N, K] (or [N, E])."""
        if (node, dims) in self.flattened:
            return self.flattened[node, dims]
        given = (node, dims)
        while name_of(node) == "unsqueeze" and dims[at := argument(node, "dim") % len(dims)] == ():
            node, dims = operand(node, 0), dims[:at] + dims[at + 1 :]
        if dims[0][-1:] == ("k",) and len(dims[0]) > 1 and not any(dims[1:]):
            node = self.emit(aten.reshape.default, (node, [-1, self.routing.choices]), {}, like)
            dims = (dims[0][:-1], ("k",))
        last = [d for d, dim in enumerate(dims) if dim in (("k",), ("e",))]
        order = [d for d in range(len(dims)) if d not in last] + last
        tokens = tuple(label for d in order if d not in last for label in dims[d])
        if tokens != self.routing.tokens:
            raise refuse(
                "weights or ids with the tokens in another order", like, "keep the tokens' dims in order"
            )
        if order != list(range(len(dims))):
            node = self.emit(aten.permute.default, (node, order), {}, like)
        width = as_size(shape_of(node)[-1]) if last else 1
        if len(shape_of(node)) != 2 or not last:
            node = self.emit(aten.reshape.default, (node, [-1, width]), {}, like)
        self.flattened[given] = node
        return node

    def grouped(self, rows: fx.Node, weight: fx.Node, transposed: bool, like: fx.Node) -> fx.Node:
        """Rows times the matrices [E, I, O] of their experts, or [E, O, I] where not `transposed`."""
        args = (rows, weight, self.counts, transposed, *self.tail)
        return self.emit(torch.ops.tedfx.grouped_linear.default, args, {}, like)

    def expert_rows(self, param: fx.Node, lead: Batched, like: fx.Node) -> fx.Node:
        rows = lead.node if VAL[lead.node].dim() == 2 and lead.right == 1 else self.rows
        return self.emit(
            torch.ops.tedfx.expert_rows.default, (param, self.counts, rows, *self.tail), {}, like
        )

    def weights(self, weight: Weight | None, like: fx.Node) -> fx.Node:
        """The weights for `combine`: [N, K]."""
        if weight is None:
            ids = self.flat(self.routing.node, self.routing.dims, like)
            return self.emit(aten.ones_like.default, (ids,), {"dtype": VAL[self.rows].dtype}, like)
        node = self.flat(weight.node, weight.dims, like)
        if any("e" in dim for dim in weight.dims):
            node = self.emit(
                aten.gather.default,
                (node, 1, self.flat(self.routing.node, self.routing.dims, like)),
                {},
                like,
            )
        for dtype in weight.casts:
            if VAL[node].dtype != dtype:
                node = self.emit(aten.to.dtype, (node, dtype), {}, like)
        return node

    # --- rows ---

    def indexed(self, first: fx.Node, name: str, args: tuple) -> Batched:
        """`v[token]`, `v[token, slot]`, `v[mask]`: rows of tokens, or weights of rows."""
        if name == "sym_size":
            return Batched("count", None, first)
        if name == "index":
            source, where = args[0], list(args[1])
        elif name == "index_select" and args[0].kind != "index":
            source, where = args[0], [None] * (args[1] % len(args[0].shape)) + [args[2]]
        else:
            raise refuse(
                f"{first.target} computes with which tokens are an expert's",
                first,
                "use that to gather, to weigh and to add rows only",
            )
        labels, at = self.indexed_dims(where, first)
        shape = shape_of(source.node) if source.kind == "picked" else source.shape
        if source.kind not in ("shared", "picked", "weight"):
            raise refuse("an expert gathers from what it computed", first, "gather from the layer's input")
        if source.kind == "weight":
            if not self.routing.unique and self.routing.choices > 1:
                raise refuse(
                    "a token that may name an expert twice is weighed by the sum of both",
                    first,
                    "weigh by w[token, slot]",
                )
            behind = len(shape) - at - len(self.columns(where))
            return weight(first, ((),) * at + (labels,) + ((),) * behind, source.of)
        own = list(range(len(shape)))
        if source.kind == "picked":
            own.remove(source.of)
        full: list[tuple[str, ...]] = [()] * len(shape)
        for d, label in zip(own[at:], self.columns(where)):
            full[d] = label
            if as_size(shape[d]) != self.size(label):
                raise refuse(
                    "an expert's tokens index a value that has other rows",
                    first,
                    "index values with a row per token",
                )
        rest = own[at + len(self.columns(where)) :]
        if (
            "k" in labels
            or source.kind == "picked"
            or (self.routing.choices == 1 and all(shape[d] == 1 for d in rest))
        ):
            if source.kind == "picked":
                full[source.of] = ("e",)
            if any(shape[d] != 1 for d in range(len(shape)) if not full[d]):
                raise refuse(
                    "a routing weight that is not one number per row",
                    first,
                    "weigh by w[token, slot] or probs[token, e]",
                )
            return weight(first, ((),) * at + (labels,) + ((),) * len(rest), Weight(source.node, tuple(full)))
        if len(rest) != 1 or any(shape[d] != 1 for d in range(at)):
            raise refuse("a token that is not a row of features", first, "flatten a token to one row")
        x = source.node
        while at and name_of(x) == "unsqueeze" and x.args[1] == 0:
            x, at = operand(x, 0), at - 1
        node = self.dispatch(x, first)
        left = len(shape_of(first)) - 2
        if left:
            node = self.emit(aten.reshape.default, (node, [1] * left + [-1, shape_of(first)[-1]]), {}, first)
        return Batched("rows", node, first, right=1, span=1)

    def columns(self, where: Sequence[Batched | None]) -> list[tuple[str, ...]]:
        """Labels of the dims that are indexed, in order."""
        out: list[tuple[str, ...]] = []
        for value in where:
            if value is not None:
                fact = value.of
                out += [fact.dims[fact.column]] if fact.kind == "search" else list(fact.dims)
        return out

    def size(self, label: Iterable[str]) -> Size:
        return product(self.routing.sizes[part] for part in label)

    def indexed_dims(self, where: Sequence[Batched | None], like: fx.Node) -> tuple[tuple[str, ...], int]:
        """The labels that an index runs over, and the first dim it indexes; every search in a body lists its
        rows in one order."""
        given = [d for d, value in enumerate(where) if value is not None]
        indexing = [value for value in where if value is not None]
        if given != list(range(given[0], given[-1] + 1)) or any(v.kind != "index" for v in indexing):
            raise refuse(
                "an index that mixes an expert's tokens with others",
                like,
                "index by token, or by token and slot",
            )
        found: list[Fact] = [value.of for value in indexing]
        if any(f.kind == "search" and f.column is None or f.kind != "search" and f.dims == () for f in found):
            raise refuse(
                "an index of all columns of a search",
                like,
                "take its columns apart: token, slot = torch.where(mask)",
            )
        for fact in found:
            if fact.reduced and not self.routing.unique and self.routing.choices > 1:
                raise refuse(
                    "a token that may name an expert twice is found once",
                    like,
                    "take ids from a topk, or search (ids == e) itself",
                )
            if self.order is None:
                self.order, self.kept, self.at_most = fact.order, fact.kept, fact.at_most
            if (fact.order, fact.kept) != (self.order, self.kept):
                raise refuse("an expert finds its tokens twice, in different orders", like, "search once")
            if number_of(fact.at_most) != number_of(self.at_most):
                raise refuse(
                    "an expert takes the first of its tokens, and elsewhere all or others of them",
                    like,
                    "cut the tokens off once: token, slot = token[:capacity], slot[:capacity]",
                )
        labels = tuple(label for dim in self.columns(where) for label in dim)
        tokens = tuple(label for label in labels if label != "k")
        if tokens != self.routing.tokens or len(set(labels)) != len(labels):
            raise refuse(
                f"an index over {labels} of the tokens' dims {self.routing.tokens}",
                like,
                "index by token, or by token and slot",
            )
        return labels, given[0]

    def tokens(self, value: Batched, like: fx.Node) -> Batched:
        """Every expert runs on all tokens of a shared value: their rows."""
        shape = value.shape
        count = self.size(self.routing.tokens)
        span = next((s for s in range(1, len(shape)) if product(shape[:s]) == count), None)
        if self.gathered or span is None or len(shape) != span + 1:
            raise refuse(
                "an expert mixes its rows with a value that is not per row",
                like,
                "gather that value by token",
            )
        return replace(value, kind="rows", made=self.dispatch(value.node, like), right=1, span=span)
