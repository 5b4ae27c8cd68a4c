"""What sorted rows become: rows of a dispatch, bodies of runs in lock-step, and a combine
(passes/capture_sorted.py)."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from tedfx._torch import pytree
from tedfx.capture.batched import Batched, is_pointwise
from tedfx.capture.bodies import Bodies
from tedfx.capture.routing import Fact, Routing, argument, name_of, shape_of
from tedfx.capture.rows import Dispatched
from tedfx.capture.sorted_rows import Sorted
from tedfx.capture.stacks import Stacks
from tedfx.capture.weights import Weight, weight
from tedfx.errors import CaptureError, user_line
from tedfx.graph import nodes
from tedfx.graph.emit import emit
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import REGROUPS, leading_to, operand

__all__ = ["RowsOf", "SortedRows", "refuse"]

aten, ops = torch.ops.aten, torch.ops.tedfx
_CASTS = ("to", "_to_copy", "type_as")


def refuse(what: str, node: fx.Node, fix: str) -> CaptureError:
    return CaptureError(f"cannot capture the rows sorted by expert: {what} | at {user_line(node)} | {fix}")


@dataclass(frozen=True)
class RowsOf:
    """Rows of a dispatch. node: their node in the canonical form. weight: of assignments [N, K], where they
    were weighed. per_token: whether a token, or each assignment by itself, was dispatched."""

    dispatch: fx.Node
    routing: Routing
    node: fx.Node
    counts: fx.Node
    order: fx.Node
    weight: fx.Node | None = None
    per_token: bool = True

    def through(self, node: fx.Node) -> RowsOf:
        return replace(self, node=node)


class _Runs(Bodies):
    """The bodies of the experts' runs."""

    def __init__(self, sorted_rows: SortedRows, routing: Routing, like: fx.Node):
        super().__init__(sorted_rows.graph, routing, {}, sorted_rows.stacks, True)
        self._sorted, self._at = sorted_rows, like
        self.of: RowsOf | None = None

    def _lift(self, runs: tuple[fx.Node, ...]) -> Batched:
        if any(node.target is not ops.expert_run.default for node in runs):
            return super()._lift(runs)
        cut, counts = operand(runs[0], 0), operand(runs[0], 1)
        found = self._sorted.found.get(counts)
        if any(n.args[:2] != runs[0].args[:2] for n in runs) or [n.args[2] for n in runs] != self.numbers:
            raise refuse("an expert computes on the rows of another", runs[0], "let expert e work on run e")
        if found is None or found.kind != "load" or found.routing is not self.routing:
            raise refuse(
                "nothing proves that the rows are cut by the counts of the ids that they are sorted by",
                runs[0],
                "count them: ids.flatten().bincount(minlength=E)",
            )
        width = shape_of(runs[0])[1:]
        value = self._sorted.found.get(cut)
        if all(size == 1 for size in width) and value is not None and not value.per_token:
            natural = self._sorted.weight(cut, self._at)
            if natural is not None:
                labels = (*self.routing.tokens, "k") if self.routing.choices > 1 else self.routing.tokens
                dims = (
                    (self.routing.tokens, ("k",)) if self.routing.choices > 1 else (self.routing.tokens, ())
                )
                return weight(runs[0], (labels, *((),) * len(width)), Weight(natural, dims))
        of = self._sorted.rows.get(cut) or self._sorted.dispatched(cut, self._at)
        if of is None or of.routing is not self.routing or len(width) != 1 or of.weight is not None:
            raise refuse(
                "runs are cut from values that are not rows of features sorted by expert",
                runs[0],
                "sort the tokens: x[order // k]",
            )
        if self.of is not None and self.of.dispatch is not of.dispatch:
            raise refuse("an expert reads two sorted values", runs[0], "concatenate what an expert reads")
        self.of = of
        self.dispatched = Dispatched(of.node, of.counts, of.order)
        return Batched("rows", of.node, runs[0], right=1, span=1)


class SortedRows:
    def __init__(
        self, graph: fx.Graph, known: Mapping[fx.Node, Fact], found: dict[fx.Node, Sorted], stacks: Stacks
    ):
        self.graph, self.known, self.found, self.stacks = graph, known, found, stacks
        self.rows: dict[fx.Node, RowsOf] = {}  # of the model's nodes
        self._made: dict[fx.Node, RowsOf] = {}
        self._ids: dict[tuple[Routing, bool], fx.Node] = {}

    def emit(self, target: Any, args: Sequence[Any], like: fx.Node, **kwargs: Any) -> fx.Node:
        return emit(self.graph, target, tuple(args), kwargs, like=like)

    def ids(self, routing: Routing, like: fx.Node, per_token: bool = True) -> fx.Node:
        """[N, K], or [N * K, 1]."""
        key = (routing, per_token)
        if key not in self._ids:
            with self.graph.inserting_after(routing.node):
                rows = Bodies(self.graph, routing, {}, self.stacks, True)
                node = rows.flat(routing.node, routing.dims, like)
            if not per_token:
                with self.graph.inserting_after(node):
                    node = self.emit(aten.reshape.default, (node, [-1, 1]), like)
            self._ids[key] = node
        return self._ids[key]

    # --- sorted values ---

    def dispatched(self, node: fx.Node, like: fx.Node) -> RowsOf | None:
        """The rows of a sorted value [M, H]."""
        if node in self._made:
            return self._made[node]
        value = self.found.get(node)
        if value is None or value.kind != "sorted" or len(shape_of(node)) != 2:
            return None
        routing = value.routing
        per_token = value.of is not None and value.per_token
        natural = value.of if per_token else self.natural(node, like)
        if natural is None or len(shape_of(natural)) != 2:
            return None
        out = self.emit(
            ops.dispatch.default, (natural, self.ids(routing, like, per_token), routing.experts), like
        )
        rows, counts, order = (self.emit(operator.getitem, (out, i), like) for i in range(3))
        self._made[node] = RowsOf(out, routing, rows, counts, order, per_token=per_token)
        return self._made[node]

    def natural(self, node: fx.Node, like: fx.Node) -> fx.Node:
        """A sorted value by assignment: [N * K, ..]."""
        value = self.found[node]
        if value.of is not None and not value.per_token:
            return value.of
        if value.of is not None:
            x, choices = value.of, value.routing.choices
            if choices == 1:
                return x
            shape = shape_of(x)
            spread = self.emit(aten.unsqueeze.default, (x, 1), like)
            spread = self.emit(aten.expand.default, (spread, [-1, choices, *[-1] * (len(shape) - 1)]), like)
            return self.emit(aten.reshape.default, (spread, [-1, *shape[1:]]), like)
        convert = lambda n: self.natural(n, like) if isinstance(n, fx.Node) and n in self.found else n
        args, kwargs = pytree.tree_map(
            convert, (tuple(node.args), dict(node.kwargs)), is_leaf=lambda x: isinstance(x, fx.Node)
        )
        if name_of(node) in REGROUPS:  # of a column
            args = (args[0], [-1, *[1] * (len(shape_of(node)) - 1)])
            return self.emit(aten.reshape.default, args, like)
        return self.emit(node.target, args, like, **kwargs)

    def weight(self, node: fx.Node, like: fx.Node) -> fx.Node | None:
        """A sorted weight, one number per row, by token and choice: [N, K]; None where it is more."""
        value = self.found[node]
        if any(size != 1 for size in shape_of(node)[1:]):
            return None
        return self.emit(aten.reshape.default, (self.natural(node, like), [-1, value.routing.choices]), like)

    # --- rows ---

    def joined(self, node: fx.Node) -> RowsOf | None:
        """The experts' results on their runs, one after the other."""
        parts: tuple[fx.Node, ...] = tuple(nodes.argument(node, 0))
        first = next((n for n in leading_to(parts[0]) if n.target is ops.expert_run.default), None)
        if first is None:
            return None
        value = self.rows.get(operand(first, 0)) or self.found.get(operand(first, 0))
        if value is None:
            return None
        bodies = _Runs(self, value.routing, node)
        out = bodies.lift(parts)
        if out.kind not in ("rows", "weighted") or out.right != 1 or out.made is None or bodies.of is None:
            raise refuse(
                "what an expert gives is not a row of features per row", parts[0], "give every row one"
            )
        weighed = bodies.weights(out.of, node) if out.kind == "weighted" else None
        return replace(bodies.of.through(out.made), weight=weighed)

    def by_row(self, node: fx.Node, rows: Sequence[fx.Node]) -> bool:
        """Whether a node works on each row of its operands alone; its other operands have no dim of rows."""
        name = name_of(node)
        if name == "getitem":  # of what was cut along the features
            return True
        count = shape_of(rows[0])[0]
        for other in node.all_input_nodes:
            value = VAL.get(other)
            if other not in rows and isinstance(value, torch.Tensor) and count in shape_of(other):
                return False
        if isinstance(VAL[node], torch.Tensor) and shape_of(node)[:1] != [count]:
            return False
        rank = len(shape_of(rows[0])) if isinstance(VAL[rows[0]], torch.Tensor) else 0
        if is_pointwise(node):
            return True
        if name in (
            "chunk",
            "split",
            "split_with_sizes",
            "slice",
            "narrow",
            "select",
            "softmax",
            "cat",
            "glu",
        ):
            dim = argument(node, "dim")
            return isinstance(dim, int) and dim % rank != 0
        if name in ("linear", "layer_norm", "rms_norm"):
            return operand(node, 0) in rows
        return name in ("matmul", "mm") and operand(node, 0) in rows and operand(node, 1) not in rows

    # --- back ---

    def at_assignments(self, of: RowsOf, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        """(the node that is replaced, what replaces it): rows at their assignments [N * K, H], or a weighted
        sum over the choices behind it."""
        choices, dtype = of.routing.choices, VAL[node].dtype
        end = self._weighed_sum(node, choices) if of.weight is None and of.per_token else None
        if end is not None:
            total, weights = end
            with self.graph.inserting_before(total):
                weights = self.emit(aten.reshape.default, (weights, [-1, choices]), total)
                out = self.emit(ops.combine.default, (of.node, of.order, weights), total)
                return total, self._cast(out, VAL[total].dtype, total)
        if of.weight is not None:
            weights = self.emit(aten.reshape.default, (of.weight, [-1, 1]), node)
        else:
            ids = self.ids(of.routing, node, per_token=False)
            weights = self.emit(aten.ones_like.default, (ids,), node, dtype=dtype)
        return node, self._cast(
            self.emit(ops.combine.default, (of.node, of.order, weights), node), dtype, node
        )

    def at_tokens(self, of: RowsOf, base: fx.Node, node: fx.Node) -> fx.Node:
        """Rows added at their tokens: [N, H]."""
        choices = of.routing.choices
        weights = of.weight
        if weights is None:
            ids = self.ids(of.routing, node)
            weights = self.emit(aten.ones_like.default, (ids,), node, dtype=VAL[node].dtype)
        if of.per_token:
            out = self.emit(ops.combine.default, (of.node, of.order, weights), node)
        else:
            weights = self.emit(aten.reshape.default, (weights, [-1, 1]), node)
            out = self.emit(ops.combine.default, (of.node, of.order, weights), node)
            out = self.emit(aten.reshape.default, (out, [-1, choices, shape_of(out)[-1]]), node)
            out = self.emit(aten.sum.dim_IntList, (out, [1]), node)
        return self.emit(aten.add.Tensor, (base, self._cast(out, VAL[node].dtype, node)), node)

    def _cast(self, node: fx.Node, dtype: torch.dtype, like: fx.Node) -> fx.Node:
        return node if VAL[node].dtype == dtype else self.emit(aten.to.dtype, (node, dtype), like)

    def _weighed_sum(self, node: fx.Node, choices: int) -> tuple[fx.Node, fx.Node] | None:
        """(the sum, the weights [N, K, 1]) of `rows.view(N, K, H) * w[..., None]).sum(1)`."""
        weights: fx.Node | None = None
        while len(node.users) == 1:
            (user,) = node.users
            name, shape = name_of(user), shape_of(user) if isinstance(VAL.get(user), torch.Tensor) else []
            if name in _CASTS and operand(user, 0) is node:
                pass
            elif name in REGROUPS and len(shape) == 3 and shape[1] == choices and len(shape_of(node)) == 2:
                if shape[2] != shape_of(node)[1]:
                    return None
            elif name == "mul" and weights is None and len(shape_of(node)) == 3:
                (weights, *more) = [n for n in user.all_input_nodes if n is not node] or [None]
                if more or weights is None or shape_of(weights) != [*shape_of(node)[:2], 1]:
                    return None
            elif name == "sum" and weights is not None and argument(user, "dim") in ([1], [-2], 1, -2):
                return (user, weights) if not argument(user, "keepdim") else None
            else:
                return None
            node = user
        return None
