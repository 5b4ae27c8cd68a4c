"""Weights of tokens at experts: masked weights, gate matrices, masked logits (the terms are in routing.py).

| the model writes | fact |
|---|---|
| a hit times (or `&`) truth values, where a token has at most one entry per expert | gate that is a mask |
| `w * hit`, `where(hit, w, 0)`, `w.masked_fill(miss, 0)` | weighed |
| `sum` of weighed over the choices; w scattered into zeros at unique ids | gate |
| logits scattered into -inf at unique ids; their softmax over the experts, their sigmoid | logits; gate |
| a gate matrix times or over anything of its own shape | gate (zero stays zero) |
| the same for a matrix over the experts and a reduced hit; logits filled with -inf | gate; logits |

A gate is exactly zero for an expert that the token did not choose. That, and unique ids where the matrix has
one entry for two choices, is what lets `combine` read its entries at the ids and forget the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from torch import fx

from tedfx.capture.routing import (
    Dims,
    Fact,
    argument,
    dim_of,
    is_bits,
    known_of,
    name_of,
    product,
    shape_of,
)
from tedfx.graph import nodes
from tedfx.graph.nodes import operand, overload
from tedfx.placement.sizes import Size

__all__ = ["both", "masked_fill", "multiply", "scatter", "sigmoid", "softmax", "where"]

Known: TypeAlias = Mapping[fx.Node, Fact]


def multiply(node: fx.Node, known: Known) -> Fact | None:
    """A mask times weights; a gate times (or over) anything is a gate."""
    left, right = node.args[:2]
    if known_of(known, left) is None and isinstance(right, fx.Node) and name_of(node) != "div":
        left, right = right, left
    fact = known_of(known, left)
    if fact is None or fact.kind not in ("hit", "gate") or known_of(known, right) is not None:
        return None
    found, bits = _weigh(node, fact, right), (fact.kind == "hit" or fact.mask) and is_bits(right, known)
    if found is None or found.kind != "gate" or ("e",) not in found.dims or name_of(node) == "div":
        return found
    return replace(found, weight=(node, found.dims), mask=True) if bits else found


def both(node: fx.Node, known: Known) -> Fact | None:
    """`hit & kept`."""
    found = multiply(node, known)
    return found if found is not None and found.mask else None


def _weigh(node: fx.Node, fact: Fact, weight: object) -> Fact | None:
    """A mask, of which `fact` is known, times `weight`."""
    shape = shape_of(node)
    dims: Dims = ((),) * (len(shape) - len(fact.dims)) + fact.dims
    if shape != [product(fact.routing.sizes[label] for label in dim) for dim in dims]:
        return None  # the other operand broadcasts the mask: a product with rows, say
    if fact.kind == "gate":
        return replace(fact, dims=dims, weight=(node, dims), mask=False) if fact.expert is None else None
    if not isinstance(weight, fx.Node) or name_of(node) == "div":
        return None
    once = fact.reduced or fact.routing.choices == 1
    if once and fact.routing.unique and ("e",) in dims and shape_of(weight) == shape:
        return Fact("gate", fact.routing, dims, weight=(node, dims))
    if fact.reduced and fact.routing.choices > 1:
        return None
    theirs: list[Size] = [1] * (len(dims) - len(shape_of(weight))) + shape_of(weight)
    weight_dims: list[tuple[str, ...]] = []
    for dim, size in zip(dims, theirs):
        labels = [label for label in dim if label != "e" and fact.routing.sizes[label] != 1]
        if labels and size == 1:
            return None  # one weight for many tokens or choices
        if dim == ("e",) and size != 1:
            return None  # weights by expert: not the weight of a choice
        weight_dims.append(() if dim == ("e",) else dim)
    found = Fact(
        "weighed",
        fact.routing,
        dims,
        fact.expert,
        weight=(weight, tuple(weight_dims[len(weight_dims) - len(shape_of(weight)) :])),
    )
    return replace(found, kind="gate") if fact.routing.choices == 1 else found


def scatter(node: fx.Node, known: Known) -> Fact | None:
    """Ids scattered into a matrix over the experts: a mask (of ones), gates (into zeros) or logits (into
    -inf)."""
    index = operand(node, 2)
    ids, rank = known.get(index), len(shape_of(node))
    dim = dim_of(node, rank)
    if (
        ids is None
        or dim is None
        or ids.kind != "ids"
        or len(ids.dims) != rank
        or ids.dims[dim] not in (("k",), ())
    ):
        return None
    routing = ids.routing
    tokens = tuple(d for position, d in enumerate(ids.dims) if position != dim)
    sizes = [s for position, s in enumerate(shape_of(node)) if position != dim]
    if shape_of(node)[dim] != routing.experts or sizes != [
        product(routing.sizes[label] for label in d) for d in tokens
    ]:
        return None
    dims = (*ids.dims[:dim], ("e",), *ids.dims[dim + 1 :])
    value = _filled(node.args[0])
    source = argument(node, "src" if "src" in overload(node) else "value")
    if value == 0 and source == 1:
        return Fact("hit", routing, dims, reduced=True)
    if not isinstance(source, fx.Node) or not routing.unique or shape_of(source) != shape_of(index):
        return None
    if value == 0:
        return Fact("gate", routing, dims, weight=(source, ids.dims))
    return Fact("logits", routing, dims) if value == -math.inf else None


def softmax(node: fx.Node, known: Known) -> Fact | None:
    fact = known[operand(node, 0)]
    dim = dim_of(node, len(fact.dims))
    if fact.kind != "logits" or dim is None or fact.dims[dim] != ("e",):
        return None
    return replace(fact, kind="gate", weight=(node, fact.dims))


def sigmoid(node: fx.Node, known: Known) -> Fact | None:
    """0 at -inf, and so is its gradient."""
    fact = known[operand(node, 0)]
    return replace(fact, kind="gate", weight=(node, fact.dims)) if fact.kind == "logits" else None


def masked_fill(node: fx.Node, known: Known) -> Fact | None:
    """`w.masked_fill(ids != e, 0)`."""
    fact = known.get(operand(node, 1))
    if fact is None or fact.kind != "miss":
        return None
    if node.args[2] == -math.inf:
        return _mask_logits(node, fact)
    return None if node.args[2] != 0 else _weigh(node, replace(fact, kind="hit"), node.args[0])


def where(node: fx.Node, known: Known) -> Fact | None:
    """`where(hit, w, 0)` weighs; `where(hit, logits, -inf)` are logits."""
    fact = known.get(operand(node, 0))
    if fact is None or fact.kind != "hit":
        return None
    other = _filled(node.args[2])
    if other == -math.inf:
        return _mask_logits(node, fact)
    return _weigh(node, fact, node.args[1]) if other == 0 else None


def _mask_logits(node: fx.Node, fact: Fact) -> Fact | None:
    """Logits with -inf where an expert is not chosen."""
    whole = fact.reduced or fact.routing.choices == 1
    if not (whole and fact.routing.unique and ("e",) in fact.dims) or shape_of(node) != [
        product(fact.routing.sizes[x] for x in d) for d in fact.dims
    ]:
        return None
    return Fact("logits", fact.routing, fact.dims)


def _filled(value: Any) -> Any:
    """The number that `value` is everywhere, if it is known; a constant is itself."""
    if not isinstance(value, fx.Node):
        return value
    name = name_of(value)
    if name in ("zeros", "zeros_like", "new_zeros"):
        return 0
    if name in ("full", "full_like", "new_full", "scalar_tensor"):
        return nodes.argument(value, 0 if name == "scalar_tensor" else len(value.args) - 1)
    return None
