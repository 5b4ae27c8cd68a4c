"""`place`: types, and the conversions that ops ask for."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from tedfx.placement.types import I, P, R
from tests.passes import models as m
from tests.passes.helpers import conversions, find, parity, placeholder, typed, upto


def scaled(model):
    """The model on x * w, so that its input has a gradient, as a layer's has."""
    net = m.Fn(lambda s, x: s.inner(x * s.w), w=(8,))
    net.inner = model
    return net


@pytest.mark.parametrize("mesh", ["tp=2", "dp=2,tp=4"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_column_then_row_pair_needs_one_sum_in_each_direction(mesh, bias):
    """h I -> R -> linear(up S0) -> relu -> linear(down S1) P -> I -> + h."""
    program, result = upto(scaled(m.Mlp(bias=bias)), mesh, m.inputs(), "place")
    found = Counter(c for c in conversions(program) if c.startswith("tp"))
    assert found == {
        "tp:I>R": 1,
        "tp:P>I": 1,
        **({"tp:I>P": 1} if bias else {}),
    }  # the bias enters on one rank
    assert result.changes == len(conversions(program))
    assert typed(placeholder(program, "inner.up.weight")).endswith("tp:S(0)") and typed(
        placeholder(program, "inner.down.weight")
    ).endswith("tp:S(1)")
    assert not bias or typed(placeholder(program, "inner.up.bias")).endswith("tp:S(0)")


def test_a_learned_input_is_converted_once_for_all_that_share_it():
    """h = x * w -> q, k, v: one I -> R of h (its cotangent is summed once), one P -> I behind o."""
    program, _ = upto(scaled(m.Attention()), "tp=2", m.inputs(), "place")
    assert Counter(conversions(program)) == {"tp:I>R": 1, "tp:P>I": 1}
    (conversion,) = [n for n in find(program, "convert") if n.meta["conversion"][1:] == (I, R)]
    assert len(conversion.users) == 3 and all(u.target.__name__ == "linear.default" for u in conversion.users)


def test_the_bias_of_a_row_parallel_linear_is_added_once():
    """linear(x S, w S, b) -> linear(x, w) P, b: either the sum before the bias, or the bias on one rank
    only."""
    program, _ = upto(m.make(m.Mlp), "tp=2", m.inputs(), "place")
    row = find(program, "linear")[1]
    assert len(row.args) == 2 and row.meta["type"]["tp"] == P
    bias = placeholder(program, "down.bias")
    (conversion,) = bias.users
    assert conversion.meta["conversion"] == (("tp",), I, P)
    (total,) = conversion.users
    assert total.args == (row, conversion) and total.meta["type"]["tp"] == P


@pytest.mark.parametrize("mesh, expected", [("dp=2", "dp:R"), ("dp=2,tp=2", "dp:R"), ("tp=2", "I")])
def test_a_parameter_is_reduced_at_the_boundary_over_the_axes_where_all_its_uses_are_R(mesh, expected):
    program, _ = upto(m.make(m.LM), mesh, m.tokens(), "place")
    assert typed(placeholder(program, "norm.weight")) == expected


def test_a_parameter_used_only_as_R_on_the_tensor_axis_becomes_R():
    """down(relu(up(x)) * w.repeat): w meets sharded rows only, so I -> R moves to the boundary; used as I as
    well it stays I."""
    only = m.Fn(
        lambda s, x: ((x @ s.up) * s.w).matmul(s.down).add(x).square().sum(), up=(8, 12), w=(1,), down=(12, 8)
    )
    program, _ = upto(only, "tp=2", m.inputs(), "place")
    assert typed(placeholder(program, "w")) == "tp:R" and "tp:I>R" not in conversions(program)
    both = m.Fn(
        lambda s, x: ((x @ s.up) * s.w).matmul(s.down).add(x).square().sum() + (x * s.w).sum(),
        up=(8, 12),
        w=(1,),
        down=(12, 8),
    )
    program, _ = upto(both, "tp=2", m.inputs(), "place")
    assert typed(placeholder(program, "w")) == "I" and conversions(program).count("tp:I>R") == 1


@pytest.mark.parametrize("mesh", ["dp=2", "dp=2,tp=2"])
def test_the_loss_leaves_as_I_and_rows_stay_with_their_rank(mesh):
    model = m.Fn(lambda s, x: ((x * s.w).square().mean(), x * s.w), w=(8,))
    program, _ = upto(model, mesh, m.inputs(), "place")
    (output,) = program.graph_module.graph.find_nodes(op="output")
    loss, rows = output.args[0]
    assert typed(loss) == "I" and typed(rows) == "dp:S(0)"
    assert conversions(program) == ["dp:P>I"]


def test_partial_sums_pass_linear_ops_and_are_reduced_before_the_residual_stream():
    """embedding P + position P -> one sum; linear P + bias P -> one sum; the residual add is I."""
    program, _ = upto(m.make(m.LM), "dp=2,tp=2", m.tokens(), "place")
    first, biased, residual = find(program, "add")[:3]
    assert [n.meta["type"]["tp"] for n in (first, biased, residual)] == [P, P, I]
    assert conversions(program).count("tp:P>I") == 2
    assert conversions(program).count("dp:P>I") == 2  # the sum of the rows and their count


@pytest.mark.parametrize(
    "fn",
    [
        lambda w: F.embedding((w.sum(1) > 0).long(), w),  # ids of the vocabulary's own factor
        lambda w: torch.einsum("ij,k->ik", w.t(), w.sum(1)),  # j and k are one factor; j is summed, k stays
    ],
    ids=["embedding", "einsum"],
)
def test_a_factor_both_contracted_and_kept_is_not_sharded(fn):
    model = m.Fn(lambda s, x: fn(s.e).square().sum() + (x @ s.e.t()).tanh().sum(), e=(16, 8))
    parity(model, "tp=2", m.inputs())


def test_returned_rows_of_the_batch_stay_with_their_rank():
    """Rows that an op without a rule gives (its output has fresh factors), or one that needs the whole batch;
    a reduction over the batch is the same everywhere."""
    net = m.Fn(
        lambda s, x: (
            (y := x * s.w).square().sum(),
            torch.cdist(y, y),
            y.flip(0),
            y.flip(0).flatten(0, 1),
            y.mean(0),
        ),
        w=(8,),
    )
    program = parity(net, "dp=2,tp=2", m.inputs())
    (output,) = program.graph_module.graph.find_nodes(op="output")
    assert [typed(n).split()[:1] for n in output.args[0]] == [
        ["I"],
        ["dp:S(0)"],
        ["dp:S(0)"],
        ["dp:S(0)"],
        ["I"],
    ]


def test_rows_that_an_axis_cuts_inside_of_others_stay_in_order():
    """A convolution has no rule, so its images are whole on dp; tp then cuts the rows that dp has not. Where
    they meet what dp has cut, each rank's piece must be one of dp's pieces, cut by tp."""

    class Rows(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = torch.nn.Conv2d(3, 8, 2, 2, dtype=m.DTYPE)
            self.up, self.down = m.linear(8, 12), m.linear(12, 8)

        def forward(self, x, rows):
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = x + self.down(torch.relu(self.up(x)))
            return (x * (rows.view(-1, 1, 1) == 1)).square().sum()

    images = torch.randn(8, 3, 4, 4, dtype=m.DTYPE, generator=torch.Generator().manual_seed(0))
    call = {"x": images, "rows": torch.tensor([1, 1, 1, 1, 0, 0, 0, 1])}
    parity(m.make(Rows), "dp=2,tp=2", call, sequence_parallel=True)
