"""The first classes of a one-hot with as many as the data ask for (tedfx/frontends/wide.py).

However many classes there are, if they are enough, its first n are `ids[..., None] == arange(n)`, provided
that there are n for certain. That is put in the place of every slice of it; anything else that is read of it
has a size that is data, and is refused with its line.
"""

from __future__ import annotations

import torch
from torch import fx

from tedfx.errors import TraceError, user_line
from tedfx.graph.emit import emit
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import argument, op_name
from tedfx.placement.sizes import as_size

__all__ = ["take_first_classes"]

aten = torch.ops.aten


def take_first_classes(graph: fx.Graph) -> None:
    for wide in graph.find_nodes(op="call_function", target=torch.ops.tedfx.wide_one_hot.default):
        for user in list(wide.users):
            if not _is_first(user, wide):
                raise TraceError(
                    "a one-hot with as many classes as the data ask for is read as a whole | at "
                    f"{user_line(user)} | take the first classes that it has for certain, "
                    "F.one_hot(ids, max(ids.max() + 1, n))[..., :n], or give it a number of classes"
                )
            ids, end = argument(wide, 0), argument(user, 3, "end")
            with graph.inserting_before(user):
                classes = emit(graph, aten.arange.default, (end,), {"device": VAL[ids].device}, like=user)
                column = emit(graph, aten.unsqueeze.default, (ids, -1), like=user)
                first = emit(graph, aten.eq.Tensor, (column, classes), like=user)
                first = emit(graph, aten.to.dtype, (first, torch.int64), like=user)
            user.replace_all_uses_with(first)
            graph.erase_node(user)
        graph.erase_node(wide)


def _is_first(user: fx.Node, wide: fx.Node) -> bool:
    """Whether it takes the first classes, no more than there are for certain."""
    rank = VAL[wide].dim()
    if op_name(user) != "aten.slice" or argument(user, 1, "dim", 0) % rank != rank - 1:
        return False
    if argument(user, 2, "start") not in (None, 0) or argument(user, 4, "step", 1) != 1:
        return False
    taken, least = as_size(VAL[user].shape[-1]), as_size(VAL[wide].shape[-1] - 1)
    return taken == least or (isinstance(taken, int) and isinstance(least, int) and taken < least)
