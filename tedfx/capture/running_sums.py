"""Running sums that leave out their own entry, written as such.

    F.pad(mask, (0, 0, 1, 0)).cumsum(1)[:, :-1]       zero before the first, and the last is not asked for
    F.pad(mask, (0, 0, 1, -1)).cumsum(1)              the same, the last cut off before the sum

Both are `mask.cumsum(1) - mask`, exactly where the entries are zeros and ones, and that is what stands in the
graph afterwards: a sum over a dim of tokens, which a mesh may cut, in place of one over a dim that is one
longer.
"""

from __future__ import annotations

import torch
from torch import fx

from tedfx.capture.routing import argument, dim_of, name_of, shape_of
from tedfx.capture.slot_facts import slot_facts
from tedfx.capture.slots import Mask
from tedfx.graph.emit import emit
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import function, operand

__all__ = ["without_their_own"]

aten = torch.ops.aten


def without_their_own(graph: fx.Graph) -> None:
    """Rewrite them, one after the other: what one of them is says what the mask of the next is."""
    todo = [n for n in graph.nodes if name_of(n) == "cumsum" and name_of(n.args[0]) in _PADS]
    for node in todo:
        ends = _ends(node)
        mask = operand(operand(node, 0), 0)
        fact = slot_facts(graph).get(mask) if ends else None
        if not isinstance(fact, Mask) or len(fact.terms) != 1 or not fact.terms[0].exact:
            continue
        with graph.inserting_before(node):
            args = (mask, *node.args[1:])
            whole = emit(graph, function(node), args, dict(node.kwargs), like=node)
            if VAL[mask].dtype != VAL[whole].dtype:
                mask = emit(graph, aten.to.dtype, (mask, VAL[whole].dtype), like=node)
            before = emit(graph, aten.sub.Tensor, (whole, mask), like=node)
        for end in ends:
            end.replace_all_uses_with(before)


_PADS = ("pad", "constant_pad_nd")


def _ends(node: fx.Node) -> list[fx.Node]:
    """The nodes that are such a sum: the running sum itself, or those that take all of it but the last; none
    where it is another."""
    pad = operand(node, 0)
    rank = len(shape_of(pad))
    dim, pairs = dim_of(node, rank), argument(pad, "pad")
    fill, mode = argument(pad, "value"), argument(pad, "mode", "constant")
    if dim is None or fill not in (None, 0) or mode != "constant" or len(pairs) % 2:
        return []
    widths = {rank - 1 - i: (pairs[2 * i], pairs[2 * i + 1]) for i in range(len(pairs) // 2)}
    own = widths.pop(dim, (0, 0))
    if own[0] != 1 or own[1] not in (0, -1) or any(pair != (0, 0) for pair in widths.values()):
        return []
    if own[1] == -1:
        return [node]
    whole = shape_of(operand(pad, 0))
    cut = lambda n: name_of(n) == "slice" and dim_of(n, rank, default=0) == dim and shape_of(n) == whole
    if not all(cut(n) and argument(n, "start") in (None, 0) and argument(n, "step") == 1 for n in node.users):
        return []
    return list(node.users)
