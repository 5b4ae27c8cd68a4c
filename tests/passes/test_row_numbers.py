"""`row_numbers`: where a dropout draws on routed rows, their numbers travel as they do."""

import pytest
import torch
import torch.nn.functional as F

from tests.passes import models as m
from tests.passes.helpers import count, find, upto


class Dropping(m.MoE):
    def __init__(self, probability):
        super().__init__(bias=False)
        self.probability = probability

    def forward(self, x):
        x = x.flatten(0, 1)
        weights, ids = F.linear(x, self.router).softmax(-1).topk(self.top, -1)
        rows, counts, order = torch.ops.tedfx.dispatch(x, ids, self.experts)
        h = F.dropout(torch.ops.tedfx.grouped_linear(rows, self.up, counts), self.probability)
        y = torch.ops.tedfx.grouped_linear(h, self.down, counts)
        return torch.ops.tedfx.combine(y, order, weights).square().mean()


@pytest.mark.parametrize("probability, drawn", [(0.5, 1), (0.0, 0)])
def test_numbers_go_the_way_of_the_rows_where_something_is_drawn(probability, drawn):
    program, _ = upto(Dropping(probability), "ep=2", m.inputs(), "lower_experts")
    assert count(program, "row_numbers", "all_to_all_single") == {
        "row_numbers": drawn,
        "all_to_all_single": 2 + drawn,
    }
    assert len(program.row_numbers) == drawn
    if drawn:
        ((arrived, made, _, top_k),) = program.row_numbers.values()
        (numbers,) = find(program, "row_numbers")
        there = next(n for n in numbers.users if n in find(program, "all_to_all_single"))
        beside = [n for n in find(program, "all_to_all_single") if n.args[1:] == there.args[1:]]
        assert made is numbers and top_k == 2 and there in arrived.all_input_nodes and len(beside) == 2
