"""Convolutions."""

from __future__ import annotations

import torch

from tests.rules.cases.values import t
from tests.rules.one_op import Case

aten = torch.ops.aten

CONVOLUTIONS = [
    Case(
        "conv2d",
        aten.conv2d.default,
        (t(4, 2, 6, 6), t(6, 2, 2, 2), None, [2, 2]),
        reaches=("S0 R>S0", "R S0>S1", "S1 S1>P", "P R>P"),
    ),
    Case(
        "conv2d bias",
        aten.conv2d.default,
        (t(4, 2, 5, 6), t(6, 2, 2, 3), t(6)),
        reaches=("S0 R R>S0", "R S0 S0>S1"),
    ),
    Case("conv2d of one picture", aten.conv2d.default, (t(2, 6, 6), t(4, 2, 2, 2)), reaches=("R S0>S0",)),
    Case("conv1d", aten.conv1d.default, (t(4, 2, 8), t(6, 2, 3), t(6), [1], [2]), reaches=("S0 R R>S0",)),
    Case(
        "conv1d same",
        aten.conv1d.padding,
        (t(4, 2, 8), t(6, 2, 3), t(6), [1], "same"),
        reaches=("S0 R R>S0", "R S0 S0>S1"),
    ),
    Case(
        "conv1d of each channel",
        aten.conv1d.default,
        (t(4, 6, 8), t(6, 1, 3), t(6), [1], [2], [1], 6),
        reaches=("S0 R R>S0",),
    ),
    Case(
        "conv2d in groups",
        aten.conv2d.default,
        (t(4, 4, 6, 6), t(6, 2, 2, 2), None, [1, 1], [0, 0], [1, 1], 2),
        reaches=("S0 R>S0",),
    ),
    Case("conv3d", aten.conv3d.default, (t(2, 2, 4, 4, 4), t(4, 2, 2, 2, 2)), reaches=("S0 R>S0", "R S0>S1")),
    Case(
        "conv_transpose2d",
        aten.conv_transpose2d.input,
        (t(4, 2, 3, 3), t(2, 6, 2, 2), None, [2, 2]),
        reaches=("S0 R>S0", "R S1>S1", "S1 S0>P"),
    ),
    Case(
        "conv_transpose3d",
        aten.conv_transpose3d.input,
        (t(2, 2, 2, 2, 2), t(2, 4, 2, 2, 2)),
        reaches=("S0 R>S0", "R S1>S1"),
    ),
    Case(
        "conv_transpose1d in groups",
        aten.conv_transpose1d.default,
        (t(4, 4, 3), t(4, 3, 2), t(6), [2], [0], [0], 2),
        reaches=("S0 R R>S0",),
    ),
]
