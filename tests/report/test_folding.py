"""Layers that are the same are shown once, and a fold hides no difference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedfx.report.explanation import explain
from tests.report import toy
from tests.report.toy import check, compile_toy


def members(compilation, **options):
    """Of each layer that is shown, the indices that it stands for."""
    layers = explain(compilation, **options).to_json()["layers"]
    return [[int(m.rpartition(".")[2]) for m in s["members"]] for s in layers if s["path"]]


@pytest.mark.slow
def test_layers_that_alternate(compilations):
    """GPT-OSS: sliding and full attention in turn."""
    told = explain(compilations("gpt_oss", "ep=2,tp=2"))
    check(told, r"^-- model.layers.0  x2: layers 0, 2$", r"^-- model.layers.1$")
    assert members(told.compilation) == [[0, 2], [1]]


@pytest.mark.slow
def test_recompute_and_gathers():
    """Regions and gathers of parameters have numbers of their own in every layer; they only name them."""
    for options in ({"checkpoint": "full"}, {"zero": 3}, {"checkpoint": "full", "zero": 3}):
        told = explain(compile_toy(options=options))
        assert members(told.compilation) == [[0, 1, 2, 3]]
        shown = [s for s in told.segments if s.path and s.like is None]
        assert any("gather_parameters" in n.name for n in shown[0].nodes) == ("zero" in options)


class Drops(toy.Block):
    rate = 1

    def forward(self, x):
        return x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.1 * self.rate, self.training)


@pytest.mark.slow
def test_every_dropout_draws_for_itself():
    model = toy.make()
    model.blocks = nn.ModuleList(Drops(16, 32) for _ in range(3))
    assert members(compile_toy(model=model)) == [[0, 1, 2]]
    model.blocks[1].rate = 2
    assert members(compile_toy(model=model)) == [[0, 2], [1]]


def test_another_width():
    compilation = compile_toy(wide=2)
    assert members(compilation) == [[0, 1, 3], [2]]
    assert members(compilation, fold=False) == [[0], [1], [2], [3]]


def test_another_graph():
    """One more user of a block's input inside one block."""
    model = toy.make()
    model.blocks[1].forward = lambda x, b=model.blocks[1]: x + b.down(torch.relu(b.up(b.norm(x))))
    assert members(compile_toy(model=model)) == [[0, 2, 3], [1]]


@pytest.mark.slow
def test_what_does_not_train():
    """The first layers send nothing in backward, and the first that trains has nobody to send to."""
    compilation = compile_toy(frozen="embed")
    assert members(compilation) == [[0], [1, 2, 3]]
    assert members(compile_toy(frozen="blocks.1.up")) == [[0, 2, 3], [1]]


class FurtherBack(nn.Module):
    """Block 2 reads what block 0 gave, the others what the one before gave; the shapes are the same."""

    def __init__(self):
        super().__init__()
        self.start = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        made = [self.start(x)]
        for i, block in enumerate(self.blocks):
            made.append(block(made[-2 if i == 2 else -1]))
        return made[4] + made[2]


def test_what_is_read_further_back():
    inputs = {"x": torch.randn(6, 10, 8)}
    assert members(compile_toy("dp=2", FurtherBack(), inputs)) == [[0, 1, 3], [2]]
