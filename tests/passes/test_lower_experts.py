"""`lower_experts`: rows travel, stay, or both, by the tokens' type; and the whole layer against one device,
forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from tests.passes import models as m
from tests.passes.helpers import count, find, parity, upto

PRESENT = (
    "route",
    "exchange_counts",
    "all_to_all_single",
    "local_counts",
    "permute_rows",
    "index_rows",
    "unindex_rows",
    "expert_major",
    "dispatch",
)


@pytest.mark.parametrize(
    "mesh, roles, owned, lanes, exchanged",
    [
        ("ep=2", None, (), (), ("ep",)),
        ("ep=2,tp=2", None, (), (), ("ep",)),
        ("tp=2", {"expert": ("tp",)}, ("tp",), (), None),
        ("dp=2,tp=2", {"expert": ("tp",)}, ("tp",), (), None),
        ("ep=2,tp=2", {"expert": ("ep", "tp")}, (), ("tp",), ("ep", "tp")),
        ("dp=2", None, (), (), None),
        ("dp=2,tp=2", None, (), (), None),
    ],
)
def test_what_travels_and_what_stays(mesh, roles, owned, lanes, exchanged):
    program, result = upto(m.make(m.MoE), mesh, m.inputs(), "lower_experts", roles)
    found = count(program, *PRESENT)
    (route,) = find(program, "route")
    assert route.kwargs == {"owned": owned, "lanes": lanes} and route.args[1] == 4
    assert result.matches == 1 and result.changes == bool(exchanged)
    assert found["dispatch"] == 0 and found["permute_rows"] == 1 and found["local_counts"] == bool(owned)
    if exchanged:
        there, back = find(program, "all_to_all_single")
        assert there.args[3] == back.args[3] == exchanged
        assert there.args[1:3] == back.args[2:0:-1]  # the splits of the way back are swapped
        assert [found[n] for n in ("exchange_counts", "expert_major", "index_rows", "unindex_rows")] == [
            1,
            1,
            1,
            1,
        ]
        (combine,) = find(program, "combine")
        assert combine.args[0] is back or back in combine.args[0].all_input_nodes
    else:
        assert not any(
            found[n]
            for n in ("exchange_counts", "all_to_all_single", "index_rows", "unindex_rows", "expert_major")
        )


@pytest.mark.parametrize(
    "mesh, roles",
    [
        ("ep=4", None),
        ("dp=2,ep=2", None),
        ("ep=2,tp=2", None),
        ("tp=4", {"expert": ("tp",)}),
        ("dp=2,tp=2", {"expert": ("tp",)}),
        ("ep=2,tp=2", {"expert": ("ep", "tp")}),
        ("tp=2,ep=2", {"expert": ("ep", "tp")}),
        ("dp=2,tp=2", None),
        ("dp=2,ep=2,tp=2", None),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_is_that_of_one_device(mesh, roles, bias):
    parity(m.make(m.MoE, bias=bias), mesh, m.inputs(8), roles)


class Renormed(m.MoE):
    """The weights are made by an operator without a rule, which takes all tokens and gives them a dim of its
    own."""

    def forward(self, x):
        x = x.flatten(0, 1)
        weights, ids = F.linear(x, self.router).softmax(-1).topk(self.top, -1)
        weights = torch.renorm(weights, 2.0, 0, 0.5)
        rows, counts, order = torch.ops.tedfx.dispatch(x, ids, self.experts)
        h = torch.tanh(torch.ops.tedfx.grouped_linear(rows, self.up, counts))
        y = torch.ops.tedfx.grouped_linear(h, self.down, counts)
        return torch.ops.tedfx.combine(y, order, weights).square().mean()


@pytest.mark.parametrize("mesh", ["dp=2", "ep=2,tp=2"])
def test_weights_that_were_made_of_all_tokens_meet_their_own(mesh):
    parity(Renormed(bias=False), mesh, m.inputs())
