"""`shard_experts` and `shard_tensors`: which factors the axes split."""

import pytest
import torch

from tedfx.errors import CaptureError, ConfigError
from tedfx.passes.shard import _stays_whole
from tests.passes import models as m
from tests.passes.helpers import placeholder, upto


def planned(program, axis):
    return sorted((f.root().name, f.root().size) for f in program.plan.factors.get(axis, ()))


@pytest.mark.parametrize("mesh", ["tp=2", "dp=2,tp=4"])
def test_heads_are_split_and_hidden_and_head_dims_are_not(mesh):
    program, _ = upto(m.make(m.Attention, 4, 4), mesh, m.inputs(), "shard_tensors")
    assert [size for _, size in planned(program, "tp")] == [4]
    (heads,) = program.plan.factors["tp"]
    for name, dim in (("q.weight", 0), ("k.weight", 0), ("v.weight", 0), ("o.weight", 1)):
        first, second = (
            placeholder(program, name).meta["dims"][dim][0].leaves()
            if len(placeholder(program, name).meta["dims"][dim]) == 1
            else placeholder(program, name).meta["dims"][dim]
        )
        assert first.root() is heads.root() and second.root() is not heads.root()
    assert not program.plan.shards("tp", placeholder(program, "q.weight").meta["dims"][1][0])


@pytest.mark.parametrize("mesh", ["tp=2", "ep=1,dp=2,tp=2"])
def test_feed_forward_and_vocabulary_are_split_and_hidden_is_not(mesh):
    program, _ = upto(m.make(m.LM), mesh, m.tokens(), "shard_tensors")
    assert sorted(size for _, size in planned(program, "tp")) == [
        8,
        16,
        16,
        32,
    ]  # inner, the embedding's rows, the head's, the positions'
    hidden = placeholder(program, "up.weight").meta["dims"][1][0]
    assert hidden.size == 6 and not program.plan.shards("tp", hidden)
    assert planned(program, "dp") == ([("B", program.batch_factor.size)] if "dp" in mesh else [])


def test_a_factor_that_the_axis_does_not_divide_is_cut_unequally_and_noted():
    program, result = upto(m.make(m.LM, 15), "tp=2", m.tokens(vocabulary=15), "shard_tensors")
    assert sorted(size for _, size in planned(program, "tp")) == [8, 15, 15, 32]
    assert len([n for n in result.notes if "size 15 does not divide by 2: 8, 7 on the ranks" in n]) == 2


@pytest.mark.parametrize(
    "count, degree, cut",
    [
        (50257, 2, True),
        (3, 2, True),
        (3, 4, True),  # 1, 1, 1, 0: 3 times fewer weights, 4/3 of the work of a quarter
        (2, 4, True),
        (2, 8, False),
        (9, 8, True),  # 2, 2, 2, 2, 1, 0, 0, 0
        (3, 16, False),
    ],
)
def test_what_a_cut_saves_is_no_less_than_what_it_costs(count, degree, cut):
    assert (_stays_whole(count, ("tp",), degree, False) == "") is cut
    assert "one axis" in _stays_whole(count, ("tp", "ep"), degree, False)


def test_pieces_of_experts_stay_multiples_that_grouped_kernels_take():
    assert _stays_whole(40, ("tp",), 3, True) == "grouped kernels take multiples of 8, and 14 is none"
    for count, degree, of_experts in ((40, 3, False), (33, 2, True)):
        assert _stays_whole(count, ("tp",), degree, of_experts) == ""


def test_no_piece_is_empty_where_an_operator_refuses_that():
    """torch's convolutions and Fourier transforms do."""

    def fn(s, x):
        x = x + x @ s.square  # so that the hidden dim is no candidate
        return (x + torch.conv1d(x.transpose(1, 2), s.kernels).transpose(1, 2) @ s.out).square().sum()

    model = m.Fn(fn, square=(8, 8), kernels=(5, 8, 1), out=(5, 8))
    assert [f.size for f in upto(model, "tp=2", m.inputs(), "shard_tensors")[0].plan.factors["tp"]] == [5]
    program, result = upto(model, "tp=4", m.inputs(), "shard_tensors")
    assert 5 not in [size for _, size in planned(program, "tp")]
    assert any("replicated" in n and "aten.conv1d, which takes no empty dim" in n for n in result.notes)


def test_what_stays_whole_is_noted_with_its_cost():
    program, result = upto(m.make(Residual, 2), "tp=8", m.inputs(), "shard_tensors")
    assert planned(program, "tp") == []
    (note,) = [n for n in result.notes if "size 2 does not divide by 8: replicated over ('tp',)" in n]
    assert "weight elements and their products whole on each rank, since pieces of 1 are 4.0 times" in note


@pytest.mark.parametrize(
    "mesh, roles, on",
    [
        ("ep=2", None, {"ep": [4]}),
        ("tp=2", {"expert": ("tp",)}, {"tp": [4]}),
        ("ep=2,tp=2", None, {"ep": [4], "tp": [16]}),
        ("ep=2,tp=2", {"expert": ("ep", "tp")}, {"ep": [4], "tp": [4]}),
    ],
)
def test_experts_go_over_their_axes_and_the_router_stays_whole(mesh, roles, on):
    program, _ = upto(m.make(m.MoE), mesh, m.inputs(), "shard_tensors", roles)
    for axis, sizes in on.items():
        assert [
            f.size for f in program.plan.factors[axis] if f.root() is not program.batch_factor.root()
        ] == sizes
    router = placeholder(program, "router").meta["dims"][0][0]
    assert not any(program.plan.shards(axis, router) for axis in on)


def test_experts_that_the_axes_do_not_divide_are_cut_unequally_and_noted():
    program, result = upto(m.make(m.MoE), "ep=3", m.inputs(), "shard_experts")
    assert [f.size for f in program.plan.factors["ep"]][-1] == 4
    (note,) = [n for n in result.notes if "experts" in n]
    assert note.startswith("4 experts do not divide by 3: 2, 2, 0 on the ranks of ('ep',)")


def test_expert_axes_without_a_mixture_are_refused():
    with pytest.raises(CaptureError, match=r"expert axes \('ep',\) of size 2, but no MoE layer was found"):
        upto(m.make(m.Mlp), "ep=2", m.inputs(), "shard_experts")
    upto(m.make(m.Mlp), "tp=2", m.inputs(), "shard_experts", {"expert": ("tp",)})  # the ranks have other work


class Residual(torch.nn.Module):
    """Both dims of a weight are the hidden factor: a shard of one cannot be told from a shard of the
    other."""

    def __init__(self, inner=16):
        super().__init__()
        self.square = torch.nn.Linear(8, 8)
        self.up, self.down = torch.nn.Linear(8, inner), torch.nn.Linear(inner, 8)

    def forward(self, x):
        x = x + self.square(x)
        return x + self.down(torch.relu(self.up(x)))


def test_a_factor_that_a_weight_carries_twice_stays_whole():
    program, _ = upto(m.make(Residual), "tp=2", m.inputs(), "shard_tensors")
    assert [size for _, size in planned(program, "tp")] == [16]


def test_a_batch_that_the_model_fixes_is_not_split():
    class Fixed(m.Mlp):
        def __init__(self):
            super().__init__()
            self.offset = torch.nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x):
            return super().forward(x + self.offset)

    with pytest.raises(
        ConfigError,
        match="mesh dp=2 splits the batch over dp, but batch = 4: the model fixes this size: write",
    ):
        upto(m.make(Fixed), "dp=2", m.inputs(4), "shard_experts")
    upto(m.make(Fixed), "tp=2", m.inputs(4), "shard_experts")
