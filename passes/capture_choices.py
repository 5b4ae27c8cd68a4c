"""Expert choice, where each expert takes the tokens that score highest for it, becomes dispatch and combine.

    weights, token = scores.topk(capacity, dim=0)                   scores [N, E]
    rows = experts(x[token.T]) * weights.T.unsqueeze(-1)            (E, capacity, ..)
    y = zeros_like(x).index_add(0, token.T.flatten(), rows.flatten(0, 1))

says no more than: token n goes to every expert that chose it, each with a weight. So a token has E choices of
which most are dropped: ids [N, E] are e where expert e chose token n, and no expert's elsewhere (the tail of
the dispatch, which is not sent), and the weights are scattered to [N, E]. The top-k stays the model's own
node, over the scores of the global batch in its order: who is chosen, ties included, is what a single device
says.

Algorithm:
1. `chosen_tokens` (tedfx/capture/chosen_tokens.py): which values are numbers of chosen tokens.
2. A gather of tokens at such numbers, or a product with a one-hot matrix of them, begins a body (E, C, ..); a
   sum of rows at the same numbers ends it.
3. The body is walked by `SlotBodies`, which refuses what mixes slots. What is not proven is left as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import fx

from tedfx.capture.batched import Batched, refuse
from tedfx.capture.chains import is_zero
from tedfx.capture.chosen_tokens import Chosen, Selection, chosen_tokens
from tedfx.capture.letters import contraction_of
from tedfx.capture.routing import Dims, Routing, argument, name_of, product, shape_of
from tedfx.capture.rows import Dispatched
from tedfx.capture.slot_bodies import SlotBodies
from tedfx.capture.stacks import Stacks
from tedfx.capture.uncaptured import LEFT
from tedfx.capture.weights import Weight
from tedfx.errors import TedfxError, user_line
from tedfx.graph.emit import emit
from tedfx.graph.facts import CHOOSES, SLOTS, VAL
from tedfx.graph.nodes import REGROUPS, is_tensor, operand, reached_from
from tedfx.passes.base import Pass, PassResult
from tedfx.placement.sizes import Size
from tedfx.placement.slots import Slots
from tedfx.stages.graphs import GlobalGraph

__all__ = ["CaptureChoices"]

aten = torch.ops.aten


@dataclass(frozen=True)
class CaptureChoices(Pass[GlobalGraph]):
    """See the module's docstring."""

    requires: ClassVar[frozenset[str]] = frozenset({"functional"})
    provides: ClassVar[frozenset[str]] = frozenset({"choices captured"})

    def __call__(self, program: GlobalGraph) -> PassResult:
        graph, result = program.graph_module.graph, PassResult()
        known = chosen_tokens(graph)
        if not known:
            return result
        stacks = Stacks(program.trace, program.trainable)
        starts = [start for node in graph.nodes if (start := _start(node, known)) is not None]
        for start in starts:
            before, state = set(graph.nodes), stacks.state()
            inside = reached_from(graph, [start.node])
            ends = [end for node in graph.nodes if (end := _end(node, known, inside)) is not None]
            ends = [end for end in ends if end.chosen.of is start.chosen.of]
            if len(ends) != 1:
                continue
            try:
                _capture(graph, start, ends[0], inside, stacks)
            except TedfxError as error:
                for node in reversed(list(graph.nodes)):
                    if node not in before:
                        graph.erase_node(node)
                stacks.restore(state)
                result.notes.append(LEFT + str(error).partition(": ")[2])
                continue
            result.matches += 1
            result.notes.append(
                f"{start.chosen.of.experts} experts that choose tokens at {user_line(ends[0].node)}"
            )
        for node in reversed(graph.nodes):
            if node.op == "call_function" and not node.users and not node.is_impure():
                graph.erase_node(node)
        graph.eliminate_dead_code()
        stacks.finish()
        result.changes = result.matches
        return result


@dataclass(frozen=True)
class _Start:
    """`node` has the tokens `x` at the chosen numbers; `dims` are the labels of its dims but the last."""

    node: fx.Node
    x: fx.Node
    chosen: Chosen
    dims: Dims


@dataclass(frozen=True)
class _End:
    """`node` adds `rows`, whose leading dims have labels `dims`, at chosen tokens of `base` (None: zeros)."""

    node: fx.Node
    rows: fx.Node
    base: fx.Node | None
    chosen: Chosen
    dims: Dims


def _groups(selection: Selection) -> list:
    """The leading sizes of a value by token."""
    return [*(selection.sizes[label] for label in selection.groups), selection.tokens]


def _start(node: fx.Node, known: Mapping[fx.Node, Chosen]) -> _Start | None:
    name, found = name_of(node), None
    if name == "index":
        found = _indexed(operand(node, 0), list(argument(node, "indices")), known)
    elif name == "index_select" and argument(node, "dim") == 0:
        found = _indexed(operand(node, 0), [argument(node, "index")], known)
    elif name == "gather":
        found = _spread(operand(node, 0), argument(node, "dim"), operand(node, 2), known)
    if found is not None and is_tensor(node) and len(shape_of(node)) == len(found.dims) + 1:
        return _Start(node, operand(node, 0), found, found.dims)
    for mine, (x, theirs), out in _by_one_hot(node, known):
        chosen, letters = mine
        gone = [label for letter, label in letters.items() if letter not in out]
        features = [letter for letter in theirs if letter not in letters]
        if gone == [("n",)] and features == [theirs[-1]] == [out[-1]]:
            tokens = [letters.get(letter) for letter in theirs[:-1]]
            if tokens == [*((g,) for g in chosen.of.groups), ("n",)]:
                return _Start(node, x, chosen, tuple(letters.get(letter, ()) for letter in out[:-1]))
    return None


def _end(node: fx.Node, known: Mapping[fx.Node, Chosen], inside: set[fx.Node]) -> _End | None:
    name = name_of(node)
    base, found, rows = None, None, None
    if name == "index_add" and argument(node, "alpha") == 1 and argument(node, "dim") == 0:
        base, rows = operand(node, 0), operand(node, 3)
        found = _indexed(base, [argument(node, "index")], known)
    elif name == "index_put" and argument(node, "accumulate"):
        base, rows = operand(node, 0), operand(node, 2)
        found = _indexed(base, list(argument(node, "indices")), known)
    elif name == "scatter_add":
        base, rows = operand(node, 0), operand(node, 3)
        found = _spread(base, argument(node, "dim"), operand(node, 2), known)
    if found is not None and rows in inside and len(shape_of(rows)) == len(found.dims) + 1:
        return _End(node, rows, base, found, found.dims)
    for (chosen, letters), (rows, theirs), out in _by_one_hot(node, known):
        gone = {label for letter, dim in letters.items() if letter not in out for label in dim}
        tokens = [letters.get(letter) for letter in out[:-1]]
        if rows in inside and gone == {"e", "c"} and tokens == [*((g,) for g in chosen.of.groups), ("n",)]:
            if theirs[-1] == out[-1] and theirs[-1] not in letters:
                return _End(node, rows, None, chosen, tuple(letters.get(x, ()) for x in theirs[:-1]))
    return None


_Letters: TypeAlias = Mapping[str, tuple[str, ...]]
_OneHot: TypeAlias = tuple[tuple[Chosen, _Letters], tuple[fx.Node, list[str]], list[str]]


def _by_one_hot(node: fx.Node, known: Mapping[fx.Node, Chosen]) -> Iterator[_OneHot]:
    """((chosen, labels by letter), (other, its letters), result) of products with a one-hot matrix."""
    parsed = contraction_of(node) if node.op == "call_function" else None
    if parsed is None:
        return
    left, right, out = parsed
    for (one, letters), other in ((left, right), (right, left)):
        chosen = known.get(one)
        if chosen is not None and any("n" in dim for dim in chosen.dims) and other[0] not in known:
            yield (chosen, dict(zip(letters, chosen.dims))), other, out


def _indexed(x: fx.Node, indices: list, known: Mapping[fx.Node, Chosen]) -> Chosen | None:
    """`x[ids]`, or `x[arange(B)[:, None, None], ids]` where each sequence chooses."""
    while indices and indices[-1] is None:
        indices.pop()
    chosen = known.get(indices[-1]) if indices else None
    if chosen is None or any("n" in d or "f" in d for d in chosen.dims):
        return None
    groups = chosen.of.groups
    if len(indices) != len(groups) + 1 or shape_of(x)[: len(indices)] != _groups(chosen.of):
        return None
    for label, numbers in zip(groups, indices):
        at = [d for d, dim in enumerate(chosen.dims) if dim == (label,)]
        if not isinstance(numbers, fx.Node) or len(at) != 1:
            return None
        shape: list[Size] = [1] * len(chosen.dims)
        shape[at[0]] = chosen.of.sizes[label]
        while shape and shape[0] == 1 and len(shape) > len(shape_of(numbers)):
            shape.pop(0)
        if shape_of(numbers) != shape:
            return None
        while name_of(numbers) in REGROUPS | {"unsqueeze"}:
            numbers = operand(numbers, 0)
        if name_of(numbers) != "arange" or len(numbers.args) != 1:
            return None
    return chosen


def _spread(x: fx.Node, dim: int, index: fx.Node, known: Mapping[fx.Node, Chosen]) -> Chosen | None:
    """Ids that are the same for all features, along the dim of the tokens."""
    chosen = known.get(index)
    if chosen is None or chosen.dims[-1] != ("f",) or len(shape_of(x)) != len(_groups(chosen.of)) + 1:
        return None
    dims, groups = chosen.dims[:-1], chosen.of.groups
    if dim % len(shape_of(x)) != len(groups) or len(dims) != len(groups) + 1:
        return None
    if dims[: len(groups)] != tuple((g,) for g in groups) or shape_of(index)[-1] != shape_of(x)[-1]:
        return None
    return Chosen(chosen.of, dims) if shape_of(x)[:-1] == _groups(chosen.of) else None


class _Slots(SlotBodies):
    """A body on slots each of which has a weight of its own."""

    def _differing(self, x: fx.Node, node: fx.Node, over: Dims) -> Batched:
        shape = shape_of(x)
        labels = [label for dim in over for label in dim]
        if (
            shape[: len(over)] != [product(self.sizes[label] for label in dim) for dim in over]
            or any(size != 1 for size in shape[len(over) :])
            or sorted(labels) != sorted(self.routing.sizes)
        ):
            raise refuse(
                "a value that differs between slots meets them", node, "weigh by one number per slot"
            )
        span = len(shape_of(node)) - len(shape) + len(over)
        weight = Weight(x, (*over, *((),) * (len(shape) - len(over))))
        return Batched("weight", None, node, right=len(shape_of(node)) - span, span=span, of=weight)


def _capture(graph: fx.Graph, start: _Start, end: _End, inside: set[fx.Node], stacks: Stacks) -> None:
    of, like = start.chosen.of, end.node
    sizes = {label: of.sizes[label] for label in ("e", "c", *of.groups)}
    routing = Routing(of.ids, of.dims, sizes, of.experts, unique=True)

    def make(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return emit(graph, target, args, kwargs, like=like)

    def by_token(value: Any, dtype: torch.dtype) -> fx.Node:
        """[N, E] of a number per slot, or of one for all of them; zero elsewhere."""
        zeros = make(aten.zeros_like.default, of.scores, dtype=dtype)
        target = aten.scatter.src if isinstance(value, fx.Node) else aten.scatter.value
        made = make(target, zeros, of.dim, of.ids, value)
        labels = ["n" if d == of.dim else dim[0] for d, dim in enumerate(of.dims)]
        order = [labels.index(label) for label in (*of.groups, "n", "e")]
        made = made if order == sorted(order) else make(aten.permute.default, made, order)
        return made if len(order) == 2 else make(aten.reshape.default, made, [-1, of.experts])

    with graph.inserting_before(like):
        bodies = _Slots(graph, routing, stacks, start.node, start.dims, sizes, inside)
        x = start.x
        width = shape_of(x)[-1]
        if not isinstance(width, int):
            raise refuse("tokens whose number of features is not fixed", start.node, "fix it")
        x = x if len(shape_of(x)) == 2 else make(aten.reshape.default, x, [-1, width])
        chosen = by_token(1, torch.int64)
        numbers = make(aten.arange.default, of.experts, device=VAL[chosen].device)
        hit = make(aten.eq.Scalar, chosen, 1)
        ids = make(aten.where.self, hit, numbers, make(aten.full_like.default, chosen, of.experts))
        out = make(torch.ops.tedfx.dispatch.default, x, ids, of.experts, True)
        if of.groups:
            within = ((of.sizes[of.groups[0]], False), (of.tokens, True))
            SLOTS[out] = Slots(of.sizes["c"], within)
        else:
            CHOOSES[out] = True
        dispatched = Dispatched(*(make(operator.getitem, out, i) for i in range(3)))
        bodies.start(dispatched, True)
        value = bodies.value(end.rows)
        if value.kind not in ("rows", "weighted") or value.right != 1 or bodies.labels[end.rows] != end.dims:
            raise refuse(
                "what is added is not a row per chosen token", like, "add row (e, c) at token (e, c)"
            )
        rows = value.node
        weights = by_token(1, VAL[rows].dtype)
        if value.kind == "weighted":
            weights = by_token(_as_chosen(bodies, value.of, of, make), VAL[rows].dtype)
        new = make(torch.ops.tedfx.combine.default, rows, dispatched.sorted, weights)
        if VAL[new].dtype != VAL[like].dtype:
            new = make(aten.to.dtype, new, VAL[like].dtype)
        if len(shape_of(like)) > 2:
            leading = [make(aten.sym_size.int, start.x, d) for d in range(len(shape_of(like)) - 1)]
            new = make(aten.reshape.default, new, [*leading, shape_of(new)[-1]])
        if end.base is not None and not is_zero(end.base):
            new = make(aten.add.Tensor, end.base, new)
        if shape_of(new) != shape_of(like):
            raise refuse(f"a sum of shape {shape_of(like)} of rows of {shape_of(new)}", like, "")
    like.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def _as_chosen(bodies: _Slots, weight: Weight, of: Selection, make: Any) -> fx.Node:
    """A weight per slot in the shape of the ids."""
    labels = [label for dim in weight.dims for label in dim]
    where = {dim[0]: d for d, dim in enumerate(of.dims)}
    sizes = [of.experts if x == "e" else make(aten.sym_size.int, of.ids, where[x]) for x in labels]
    node = weight.node
    if [dim for dim in weight.dims] != [(label,) for label in labels]:
        node = make(aten.reshape.default, node, sizes)
    order = [labels.index(dim[0]) for dim in of.dims]
    node = node if order == sorted(order) else make(aten.permute.default, node, order)
    for dtype in (*weight.casts, VAL[bodies.rows].dtype):
        node = node if VAL[node].dtype == dtype else make(aten.to.dtype, node, dtype)
    return node
