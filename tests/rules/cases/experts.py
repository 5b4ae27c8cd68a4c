"""The ops of a mixture."""

from __future__ import annotations

import torch

import tedfx.ops.experts  # noqa: F401  (registers torch.ops.tedfx)
from tedfx.graph.nodes import operands
from tedfx.placement.factors import leaves
from tedfx.placement.types import Shard
from tests.rules.cases.values import order, t
from tests.rules.one_op import Case

aten = torch.ops.aten
moe = torch.ops.tedfx


def _whole_experts(program, types):
    """Rows and experts whole: where they are split, counts and row numbers are a rank's own
    (tests/passes/test_lower_experts.py)."""
    nodes = operands(program.call)
    split = {
        leaf
        for node, d in ((nodes[0], 0), (nodes[1], 0), (nodes[2], 0))
        for leaf in leaves(node.meta["dims"][d])
    }
    return not any(isinstance(p, Shard) and p.factor.root() in split for p in types)


_counts = torch.tensor([2, 0, 3, 1])
EXPERTS = [
    Case(
        "grouped_linear",
        moe.grouped_linear.default,
        (t(6, 8), t(4, 2, 8), _counts),
        reaches=("R S1 I>S1", "S1 S2 I>P", "P R I>P"),
        meets=_whole_experts,
    ),
    Case(
        "grouped_linear transposed",
        moe.grouped_linear.default,
        (t(6, 8), t(4, 8, 2), _counts, True),
        reaches=("R S2 I>S1", "S1 S1 I>P"),
        meets=_whole_experts,
    ),
    Case(
        "expert_rows",
        moe.expert_rows.default,
        (t(4, 8), _counts, t(6, 3)),
        reaches=("S1 I I>S1", "I I I>I"),
        meets=_whole_experts,
        frozen=(2,),
    ),
    Case(
        "combine",
        moe.combine.default,
        (t(8, 6), order(8), t(4, 2)),
        reaches=("P I R>P", "S1 I R>S1"),
        meets=_whole_experts,
    ),
]
