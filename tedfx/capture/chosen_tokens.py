"""Which tokens experts choose: indices of a top-k over the tokens, and what keeps them (terms: routing.py).

    weights, token = scores.topk(capacity, dim=0)        scores [N, E], of the global batch
    weights, token = scores.mT.topk(capacity, dim=-1)    scores [B, T, E], of each sequence

A value that is known holds, for each expert "e", each of its places "c", and each group of tokens "t0" (a
sequence), the number of a token within its group. A one-hot matrix of it has a dim "n" of the tokens besides.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

from torch import fx

from tedfx.capture.routing import Dims, Sizes, dim_of, moved, name_of, shape_of
from tedfx.graph.nodes import argument as nth
from tedfx.graph.nodes import operand
from tedfx.placement.sizes import Size

__all__ = ["Chosen", "Selection", "chosen_tokens"]


@dataclass(frozen=True, eq=False)
class Selection:
    """One top-k: `dim` of `scores` is that of the tokens, `dims` are the labels of what it gives."""

    scores: fx.Node
    ids: fx.Node
    dim: int
    dims: Dims
    sizes: Sizes
    experts: int

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(label for dim in self.dims for label in dim if label.startswith("t"))

    @property
    def tokens(self) -> Size:
        """How many tokens a group has."""
        return shape_of(self.scores)[self.dim]


@dataclass(frozen=True)
class Chosen:
    of: Selection
    dims: Dims


def chosen_tokens(graph: fx.Graph) -> dict[fx.Node, Chosen]:
    known: dict[fx.Node, Chosen] = {}
    for node in graph.nodes:
        if node.op != "call_function" or not node.args:
            continue
        source = node.args[0]
        if not isinstance(source, fx.Node):
            continue
        if node.target is operator.getitem and nth(node, 1) == 1 and name_of(source) == "topk":
            selection = _selection(node, source)
            if selection is not None:
                known[node] = Chosen(selection, selection.dims)
        elif source in known:
            dims = _moved(node, name_of(node), known[source])
            if dims is not None:
                known[node] = replace(known[source], dims=dims)
    return known


def _selection(ids: fx.Node, topk: fx.Node) -> Selection | None:
    scores = operand(topk, 0)
    shape = shape_of(scores)
    dim = dim_of(topk, len(shape), default=-1)
    if dim is None or len(shape) not in (2, 3):
        return None
    others = [d for d in range(len(shape)) if d != dim]
    fixed = [d for d in others if isinstance(shape[d], int)]
    experts = others[0] if len(others) == 1 else fixed[0] if len(fixed) == 1 else None
    count = None if experts is None else shape[experts]
    if experts is None or not isinstance(count, int) or count < 2 or isinstance(shape[dim], int):
        return None  # tokens have no number that the model fixes
    labels = ["c" if d == dim else "e" if d == experts else "t0" for d in range(len(shape))]
    sizes = {**dict(zip(labels, shape_of(ids))), "n": shape[dim]}
    return Selection(scores, ids, dim, tuple((x,) for x in labels), sizes, count)


def _moved(node: fx.Node, name: str, known: Chosen) -> Dims | None:
    if name in ("to", "_to_copy", "clone", "contiguous", "alias", "detach"):
        return known.dims
    if name == "one_hot":
        return (*known.dims, ("n",)) if shape_of(node)[-1] == known.of.tokens else None
    if name == "eq" and known.dims[-1] == ():  # with 0, 1, ..: a one-hot matrix
        numbers = nth(node, 1)
        counts = name_of(numbers) == "arange" and len(numbers.args) == 1
        return (*known.dims[:-1], ("n",)) if counts and shape_of(node)[-1] == known.of.tokens else None
    if name in ("expand", "repeat") and shape_of(node)[:-1] == shape_of(operand(node, 0))[:-1]:
        return (*known.dims[:-1], ("f",)) if known.dims[-1] == () else None  # the same for all features
    if any("f" in dim for dim in known.dims):
        return None
    return moved(node, name, known.dims, known.of.sizes)
