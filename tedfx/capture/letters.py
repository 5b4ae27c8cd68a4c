"""Products of two tensors with a letter per dim, as an einsum has them."""

from __future__ import annotations

from torch import fx

from tedfx.capture.routing import name_of, shape_of

__all__ = ["contraction_of"]


def contraction_of(node: fx.Node):
    """((left, its letters), (right, its letters), letters of the result) of an einsum of two, matmul, mm,
    bmm, baddbmm; None for anything else."""
    name = name_of(node)
    if name == "einsum":
        left, _, out = node.args[0].replace(" ", "").partition("->")
        terms = left.split(",")
        if len(terms) != 2 or "." in left or not out or any(len(set(t)) != len(t) for t in (*terms, out)):
            return None
        return (node.args[1][0], list(terms[0])), (node.args[1][1], list(terms[1])), list(out)
    if name not in ("matmul", "mm", "bmm", "baddbmm"):
        return None
    left, right = node.args[1:3] if name == "baddbmm" else node.args[:2]
    ranks = [len(shape_of(x)) for x in (left, right)]
    if min(ranks) < 2:
        return None
    lead = max(ranks) - 2
    batch = list(range(lead))
    return (
        (left, batch[lead - ranks[0] + 2 :] + ["m", "k"]),
        (right, batch[lead - ranks[1] + 2 :] + ["k", "n"]),
        batch + ["m", "n"],
    )
