"""Tokens of which a value holds a copy per choice or expert: `x.unsqueeze(1).expand(-1, K, -1)`,
`x.repeat(E, 1)`, `x.repeat_interleave(K, 0)`, and views of these."""

from __future__ import annotations

import torch
from torch import fx

from tedfx.capture.routing import TRANSPOSES, Dims, Sizes, argument, name_of, relabel, shape_of, swapped
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import REGROUPS, is_tensor, operand, operand_or_none

__all__ = ["copied", "unexpanded"]

_COPIES = ("k", "e")


def copied(dims: Dims) -> bool:
    return any(label in _COPIES for dim in dims for label in dim)


def unexpanded(x: fx.Node, dims: Dims, sizes: Sizes) -> tuple[fx.Node, Dims, list[torch.dtype]]:
    """(value, its dims, casts that follow it), as far back as no dim of choices or experts is left, or as
    expansions go; dims of size 1 that were only put in are left out."""
    casts: list[torch.dtype] = []
    while copied(dims) or name_of(x) == "unsqueeze":
        source = operand_or_none(x, 0)
        found = _before(x, dims, sizes) if is_tensor(source) else None
        if source is None or found is None:
            break
        if VAL[source].dtype != VAL[x].dtype:
            casts.insert(0, VAL[x].dtype)
        x, dims = source, found
    return x, dims, casts


def _before(x: fx.Node, dims: Dims, sizes: Sizes) -> Dims | None:
    """The dims of the first operand of `x`; None where `x` is no layout."""
    name, shape = name_of(x), shape_of(x)
    before = shape_of(operand(x, 0))
    if name in ("to", "_to_copy", "clone", "contiguous", "alias"):
        return dims
    if name in REGROUPS:
        return relabel(dims, sizes, before)
    if name == "unsqueeze":
        at = argument(x, "dim") % len(shape)
        return dims[:at] + dims[at + 1 :]
    if name in TRANSPOSES:
        order = swapped(x, name, len(before))
        return tuple(dims[order.index(d)] for d in range(len(before)))
    if name == "expand":
        own = dims[len(dims) - len(before) :]
        return tuple(() if size == 1 else dim for size, dim in zip(before, own))
    if name == "repeat":
        own = dims[len(dims) - len(before) :]
        return _each([(size, dim, True) for size, dim in zip(before, own)], sizes)
    if name == "repeat_interleave" and isinstance(argument(x, "dim"), int):
        at = argument(x, "dim") % len(shape)
        parts = [(size, dim, d != at) for d, (size, dim) in enumerate(zip(before, dims))]
        return _each(parts, sizes)
    return None


def _each(parts: list, sizes: Sizes) -> Dims | None:
    """What of each dim is its source's: of a repeated one the minor labels, of an interleaved one the major
    ones."""
    out: list[tuple[str, ...]] = []
    for size, dim, minor in parts:
        cut = next(
            (
                d
                for d in range(len(dim) + 1)
                if relabel((dim[d:] if minor else dim[: len(dim) - d],), sizes, [size]) is not None
            ),
            None,
        )
        if cut is None:
            return None
        out.append(dim[cut:] if minor else dim[: len(dim) - cut])
    return tuple(out)
