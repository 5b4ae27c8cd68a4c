"""Experts that choose tokens become dispatch, body, combine; near misses are left as they are."""

import functools

import pytest
import torch
import torch.nn.functional as F

from tedfx.errors import ConfigError
from tests.marks import slow, slow_but
from tests.models_choices import LAYERS, Choice, batch
from tests.models_plain import Config
from tests.passes.helpers import count, parity, upto

H = 8


class Layer(torch.nn.Module):
    def __init__(self, mixture):
        super().__init__()
        torch.manual_seed(0)
        config = Config(hidden_size=H, inner_size=6)
        self.moe = LAYERS[mixture](config) if isinstance(mixture, str) else Choice(config, mixture)

    def forward(self, x):
        return x + self.moe(x)[0]


@functools.cache
def layer(mixture):
    """One model, and so one trace, for all tests."""
    return Layer(mixture).double()


def given(rows=4):
    return {"x": torch.randn(rows, 6, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("name", LAYERS)
def test_captured(name):
    program, result = upto(layer(name), "ep=2", given(), "capture_choices")
    assert result.matches == 1
    assert count(program, "dispatch", "combine", "bmm") == {"dispatch": 1, "combine": 1, "bmm": 0}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "mesh, roles", [("ep=2,tp=2", None), slow("dp=2,ep=2", None), slow("tp=2", {"expert": "tp"})]
)
def test_on_ranks(name, mesh, roles):
    parity(layer(name), mesh, given(), roles, dedup=True, sequence_parallel=True)


@pytest.mark.parametrize("mesh", [slow("ep=2"), "dp=2"])
def test_ties_are_broken_as_on_one_device(mesh):
    """All tokens are alike: who is chosen is the top-k's own choice, over all of the batch."""
    x = torch.ones(4, 6, H, dtype=torch.float64)
    parity(layer("batch"), mesh, {"x": x})


def other_tokens(m, x):
    """Added at the neighbours of the tokens that were taken."""
    shape, x = x.shape, x.flatten(0, 1)
    weights, token = m.router(x).topk(m.capacity(x.shape[0]), dim=0)
    rows = torch.bmm(F.gelu(torch.bmm(x[token.T], m.w1)), m.w2) * weights.T.unsqueeze(-1)
    index = (token.T.flatten() + 1) % x.shape[0]
    return torch.zeros_like(x).index_add(0, index, rows.flatten(0, 1)).view(shape)


def turned(m, x):
    """Rows are put back in another order than they were taken in."""
    shape, x = x.shape, x.flatten(0, 1)
    weights, token = m.router(x).topk(m.capacity(x.shape[0]), dim=0)
    rows = torch.bmm(F.gelu(torch.bmm(x[token.T], m.w1)), m.w2) * weights.T.unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, token.flatten(), rows.flatten(0, 1)).view(shape)


def mixed(m, x):
    """An expert's slots are mixed."""
    shape, x = x.shape, x.flatten(0, 1)
    weights, token = m.router(x).topk(m.capacity(x.shape[0]), dim=0)
    rows = torch.bmm(torch.bmm(x[token.T], m.w1).softmax(1), m.w2) * weights.T.unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, token.T.flatten(), rows.flatten(0, 1)).view(shape)


def another_choice(m, x):
    """Taken by one choice, put back by another."""
    shape, x = x.shape, x.flatten(0, 1)
    scores = m.router(x)
    weights, token = scores.topk(m.capacity(x.shape[0]), dim=0)
    other = (-scores).topk(m.capacity(x.shape[0]), dim=0).indices
    rows = torch.bmm(F.gelu(torch.bmm(x[token.T], m.w1)), m.w2) * weights.T.unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, other.T.flatten(), rows.flatten(0, 1)).view(shape)


NEAR = [other_tokens, turned, mixed, another_choice]


@pytest.mark.parametrize("mixture", slow_but([other_tokens, mixed], NEAR))
def test_near_misses_stay_as_they_are(mixture):
    """The rules alone place them: all tokens go to all ranks, and each computes the slots of its experts."""
    model = Layer(mixture).double()
    program, result = upto(model, "ep=2", given(), "capture_choices")
    assert result.matches == 0 and count(program, "dispatch") == {"dispatch": 0}
    parity(model, "ep=2", given())


def test_local_capacities_are_none_of_theirs():
    with pytest.raises(ConfigError, match="choose among all tokens of the batch .* at .*models_choices"):
        upto(Layer(batch).double(), "dp=2", given(), "local_capacity", capacity="local")


def test_a_token_that_no_expert_takes_gets_nothing():
    model = Layer(batch).double()
    with torch.no_grad():
        model.moe.router.weight.copy_(model.moe.router.weight[:1].expand(4, -1))  # all take the same half
    x = given()["x"]
    assert (model(x) == x).all(-1).sum() == x.shape[0] * x.shape[1] // 2
    parity(model, "dp=2,ep=2", {"x": x})
