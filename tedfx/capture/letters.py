"""Products of two tensors with a letter per dim, as an einsum has them."""

from __future__ import annotations

import string
from typing import TypeAlias

from torch import fx

from tedfx.capture import routing
from tedfx.capture.routing import name_of, shape_of
from tedfx.graph.nodes import argument, is_tensor, operand

__all__ = ["Contraction", "Letters", "contraction_of", "einsum_letters", "summed_product"]

Letters: TypeAlias = list[str]
Contraction: TypeAlias = tuple[tuple[fx.Node, Letters], tuple[fx.Node, Letters], Letters]


def einsum_letters(node: fx.Node) -> tuple[list[str], str] | None:
    """The letters of the operands and of the result of an einsum, those of an ellipsis written out; None
    where it has no result or a letter twice in an operand."""
    left, _, out = argument(node, 0).replace(" ", "").partition("->")
    terms = left.split(",")
    if "." in left:
        free = [x for x in string.ascii_letters if x not in left]
        over = [
            len(shape_of(x)) - len(term.replace(".", "")) if "." in term else 0
            for term, x in zip(terms, argument(node, 1))
        ]
        rest = "".join(free[: max(over)])  # its dims, aligned at the right
        terms = [term.replace("...", rest[len(rest) - n :]) for term, n in zip(terms, over)]
        out = out.replace("...", rest)
    return None if not out or any(len(set(t)) != len(t) for t in terms) else (terms, out)


def contraction_of(node: fx.Node) -> Contraction | None:
    """((left, its letters), (right, its letters), letters of the result) of an einsum of two, matmul, mm,
    bmm, baddbmm; None for anything else."""
    name = name_of(node)
    if name == "einsum":
        parsed = einsum_letters(node)
        if parsed is None or len(parsed[0]) != 2 or len(set(parsed[1])) != len(parsed[1]):
            return None
        (left, right), (one, other) = argument(node, 1), parsed[0]
        return (left, list(one)), (right, list(other)), list(parsed[1])
    if name not in ("matmul", "mm", "bmm", "baddbmm"):
        return None
    first = 1 if name == "baddbmm" else 0
    left, right = operand(node, first), operand(node, first + 1)
    ranks = [len(shape_of(x)) for x in (left, right)]
    if min(ranks) < 2:
        return None
    lead = max(ranks) - 2
    batch = [str(d) for d in range(lead)]
    return (
        (left, batch[lead - ranks[0] + 2 :] + ["m", "k"]),
        (right, batch[lead - ranks[1] + 2 :] + ["k", "n"]),
        batch + ["m", "n"],
    )


def summed_product(node: fx.Node) -> Contraction | None:
    """The same of `(a * b).sum(dims)`: a letter per dim of the product, also where an operand has size 1."""
    source, dim = operand(node, 0), routing.argument(node, "dim")
    if name_of(source) != "mul" or dim is None:
        return None
    left, right = source.args[:2]
    if not (is_tensor(left) and is_tensor(right)) or any(
        routing.argument(node, x) for x in ("keepdim", "dtype")
    ):
        return None
    rank = len(shape_of(source))
    gone = {d % rank for d in (dim if isinstance(dim, (list, tuple)) else [dim])}
    letters = [str(d) for d in range(rank)]
    return (
        (left, letters[rank - len(shape_of(left)) :]),
        (right, letters[rank - len(shape_of(right)) :]),
        [x for d, x in enumerate(letters) if d not in gone],
    )
