"""Gathers and scatters, and values made from sizes."""

from __future__ import annotations

import torch

from tests.rules.cases.values import X, ids, mask, t
from tests.rules.one_op import Case

aten = torch.ops.aten

INDEXING = [
    Case("index rows", aten.index.Tensor, (t(6, 8), [ids(6, 4)]), reaches=("S1 I>S1", "R S0>S0", "P I>P")),
    Case(
        "index two",
        aten.index.Tensor,
        (t(6, 5, 8), [ids(6, 4), ids(5, 4)]),
        reaches=("S2 I I>S1", "R S0 S0>S0"),
    ),
    Case(
        "index middle",
        aten.index.Tensor,
        (t(4, 6, 8), [None, ids(6, 2, 4)]),
        reaches=("S0 I>S0", "R S1>S2", "S2 I>S3"),
    ),
    Case(
        "index apart",
        aten.index.Tensor,
        (t(6, 4, 5), [ids(6, 2), None, ids(5, 2)]),
        reaches=("S1 I I>S1", "R S0 S0>S0"),
    ),
    Case(
        "index broadcast",
        aten.index.Tensor,
        (t(6, 5, 8), [ids(6, 4, 1), ids(5, 2)]),
        reaches=("R S0 I>S0", "S2 I I>S2"),
    ),
    Case("index mask", aten.index.Tensor, (t(4, 6), [mask(4)])),
    Case("index_select", aten.index_select.default, (t(4, 6), 1, ids(6, 8)), reaches=("S0 I>S0", "R S0>S1")),
    Case("gather", aten.gather.default, (t(4, 6), 1, ids(6, 4, 2)), reaches=("S0 S0>S0", "R S1>S1")),
    Case("gather fewer rows", aten.gather.default, (t(4, 6), 1, ids(6, 2, 2)), reaches=("R S1>S1",)),
    Case("take_along_dim", aten.take_along_dim.default, (t(4, 6), ids(6, 4, 2), 1), reaches=("S0 S0>S0",)),
    Case("take_along_dim broadcast", aten.take_along_dim.default, (t(4, 6), ids(6, 1, 2), 1)),
    Case("take_along_dim flat", aten.take_along_dim.default, (t(4, 6), ids(24, 5))),
    Case("scatter value", aten.scatter.value, (t(4, 6), 1, ids(6, 4, 2), 1.5), reaches=("S0 S0>S0",)),
    Case(
        "scatter source",
        aten.scatter.src,
        (t(4, 6), 1, torch.stack([torch.randperm(6)[:2] for _ in range(4)]), t(4, 2)),
        reaches=("S0 S0 S0>S0",),
    ),
    Case(
        "scatter dim 0",
        aten.scatter.src,
        (t(4, 6), 0, torch.stack([torch.randperm(4)[:2] for _ in range(6)], 1), t(2, 6)),
        reaches=("S1 S1 S1>S1",),
    ),
    Case(
        "scatter_add",
        aten.scatter_add.default,
        (t(4, 6), 1, ids(6, 4, 2), t(4, 2)),
        reaches=("S0 S0 S0>S0", "P I P>P"),
    ),
    Case(
        "scatter_add fewer rows",
        aten.scatter_add.default,
        (t(4, 6), 1, ids(6, 2, 2), t(2, 2)),
        reaches=("P I P>P",),
    ),
    Case(
        "scatter_reduce",
        aten.scatter_reduce.two,
        (t(4, 6), 1, ids(6, 4, 2), t(4, 2), "sum"),
        reaches=("S0 S0 S0>S0",),
    ),
    Case("index_add", aten.index_add.default, (t(6, 8), 0, ids(6, 4), t(4, 8)), reaches=("S1 I S1>S1",)),
    Case("one_hot", aten.one_hot.default, (ids(4, 6, 2), 4), reaches=("S0>S0", "S1>S1")),
    Case(
        "slice_scatter",
        aten.slice_scatter.default,
        (t(4, 6), t(4, 2), 1, 2, 4),
        reaches=("S0 S0>S0", "P P>P"),
    ),
    Case(
        "select_scatter",
        aten.select_scatter.default,
        (t(4, 6, 8), t(4, 8), 1, 3),
        reaches=("S0 S0>S0", "S2 S1>S2", "P P>P"),
    ),
    Case("triu", aten.triu.default, (t(4, 6, 6), 1), reaches=("S0>S0", "P>P")),
    Case("tril", aten.tril.default, (t(6, 8),), reaches=("P>P",)),
]

CREATION = [
    Case("zeros", aten.zeros.default, ([4, 6],), reaches=(">S0", ">S1")),
    Case("ones", aten.ones.default, ([4, 6],), {"dtype": torch.float64}, reaches=(">S0",)),
    Case("full", aten.full.default, ([4, 6], 2.5), reaches=(">S1",)),
    Case("arange", aten.arange.default, (8,), reaches=(">S0",)),
    Case("arange start", aten.arange.start, (3, 11), reaches=(">S0",)),
    Case("arange step", aten.arange.start_step, (3, 19, 2), reaches=(">S0",)),
    Case("arange step only", aten.arange.start_step, (0, 16, 2), reaches=(">S0",)),
    Case(
        "arange float", aten.arange.start_step, (0.5, 2.5, 0.25), {"dtype": torch.float64}, reaches=(">S0",)
    ),
    Case("scalar_tensor", aten.scalar_tensor.default, (2.0,)),
    Case("eye", aten.eye.default, (4,)),
    Case("linspace", aten.linspace.default, (0.0, 1.0, 8)),
    Case("new_zeros", aten.new_zeros.default, (t(3), [4, 6]), reaches=("R>S0", "P>S1")),
    Case("new_ones", aten.new_ones.default, (t(3), [4, 6]), reaches=("R>S0",)),
    Case("new_full", aten.new_full.default, (t(3), [4, 6], 2.0), reaches=("R>S0",)),
    Case("lift_fresh_copy", aten.lift_fresh_copy.default, (t(4),), reaches=("S0>S0",)),
    Case("zeros_like", aten.zeros_like.default, (X,), reaches=("S0>S0", "R>I")),
    Case("ones_like", aten.ones_like.default, (X,), reaches=("S2>S2", "P>I")),
    Case("full_like", aten.full_like.default, (X, 3.0), reaches=("S2>S2",)),
]
