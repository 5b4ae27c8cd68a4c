"""Experts written one by one, on all tokens, become products with a dim of experts, if they are alike."""

import functools
from collections import Counter

import pytest
import torch
from torch import nn

from tedfx.errors import CaptureError
from tests.marks import slow, slow_but
from tests.models_dense_experts import LAYERS, Soft
from tests.models_plain import Config
from tests.passes.helpers import conversions, parity, placeholder, typed, upto

H = 8
STACKED = ("loop", "loop_over_slices", "listed", "listed_slots")


class Layer(nn.Module):
    def __init__(self, mixture):
        super().__init__()
        torch.manual_seed(0)
        config = Config(hidden_size=H, inner_size=6)
        self.moe = LAYERS[mixture](config) if isinstance(mixture, str) else Soft(config, mixture, flat=False)

    def forward(self, x):
        return x + self.moe(x)[0]


@functools.cache
def layer(mixture):
    """One model, and so one trace, for all tests."""
    return Layer(mixture).double()


def given():
    return {"x": torch.randn(4, 6, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("name", slow_but(["listed_slots"], STACKED))
def test_stacked(name):
    _, result = upto(layer(name), "ep=2", given(), "stack_experts")
    assert result.matches == 1


@pytest.mark.parametrize("name", slow_but(["loop"], LAYERS))
def test_on_ranks(name):
    for mesh, roles in (("ep=2,tp=2", None), ("dp=2,ep=2", None), ("tp=2", {"expert": "tp"})):
        parity(layer(name), mesh, given(), roles, dedup=True, sequence_parallel=True)


@pytest.mark.parametrize(
    "name",
    slow_but(
        ["plain", "loop"], ["plain", "threshold", "weighed_hidden", "loop", "loop_over_slices", "listed"]
    ),
)
def test_tokens_and_scores_are_gathered_and_sums_scattered(name):
    program, _ = upto(layer(name), "ep=2", given(), "place")
    kinds = Counter("gather" if c.startswith("ep:S") else c for c in conversions(program))
    assert kinds in ({"gather": 2, "ep:R>S": 1, "ep:P>S": 1}, {"gather": 2, "ep:I>S": 1, "ep:P>S": 1})


@pytest.mark.slow
def test_routers_stay_whole():
    for name, router in (("plain", "moe.router.weight"), ("plain", "moe.router.bias"), ("moe", "moe.slots")):
        program, _ = upto(layer(name), "ep=2", given(), "place")
        assert typed(placeholder(program, router)) == "ep:R"
        assert typed(placeholder(program, "moe.w1")) == "ep:S(0)"


def differing(m, x):
    gate, out = m.router(x).softmax(-1), torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        out = out + gate[..., e : e + 1] * (expert(x) if e else expert(x).tanh())
    return out


def shifted(m, x):
    """Expert e is weighed by the gate of another: only an order of the gate's entries."""
    gate, out = m.router(x).softmax(-1), torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        out = out + gate[..., e : e + 1] * gate[..., (e + 1) % 4 : (e + 1) % 4 + 1] * expert(x)
    return out


def one_left_out(m, x):
    gate = m.router(x).softmax(-1)
    out = sum(gate[..., e, None] * m.experts[e](x) for e in range(3))
    return out + gate[..., 3, None] * x


@pytest.mark.parametrize("mixture", slow_but([shifted], [differing, shifted, one_left_out]))
def test_near_misses_stay_as_they_are(mixture):
    model = Layer(mixture).double()
    _, result = upto(model, "dp=2", given(), "stack_experts")
    assert result.matches == 0
    parity(model, "dp=2", given())
    with pytest.raises(CaptureError):
        upto(model, "ep=2", given(), "shard_experts")


class OfSequences(nn.Module):
    """The caller says which expert each sequence is for, as in ViTPose+."""

    def __init__(self, mask=lambda ids, e: ids.view(-1, 1, 1) == e):
        super().__init__()
        torch.manual_seed(0)
        expert = lambda: nn.Sequential(nn.Linear(H, 6), nn.GELU(), nn.Linear(6, H))
        self.layers = nn.ModuleList(nn.ModuleList(expert() for _ in range(4)) for _ in range(2))
        self.mask = mask

    def forward(self, x, ids):
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            out = torch.zeros_like(x)
            for e, expert in enumerate(layer):
                out = out + expert(x) * self.mask(ids, e)
            x = x + out.tanh()
        return x


@pytest.mark.parametrize("mesh", ["ep=2,tp=2", slow("dp=2,ep=2")])
def test_ids_of_the_caller(mesh):
    """Those that are no expert's, too."""
    model, call = OfSequences().double(), {**given(), "ids": torch.tensor([2, -1, 7, 0])}
    _, result = upto(model, mesh, call, "stack_experts")
    assert result.matches == 2
    parity(model, mesh, call)


@pytest.mark.parametrize(
    "mask",
    [
        lambda ids, e: ids.view(-1, 1, 1) == e + (e > 2),
        lambda ids, e: ids.view(-1, 1, 1) >= e,
        lambda ids, e: ids[:, None, None].expand(-1, -1, H) == e,
    ],
)
def test_other_masks_of_the_callers_ids(mask):
    model, call = OfSequences(mask).double(), {**given(), "ids": torch.tensor([2, -1, 7, 0])}
    assert upto(model, "dp=2", call, "stack_experts")[1].matches == 0
    parity(model, "dp=2", call)


class Heads(nn.Module):
    """Attention with a matrix per head."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(H, 4, 2)) for _ in range(3))
        self.o = nn.Parameter(torch.randn(4, 2, H))

    def forward(self, x):
        q, k, v = (torch.einsum("bth,hnd->bntd", x, w) for w in (self.q, self.k, self.v))
        return x + torch.einsum("bntd,ndh->bth", (q @ k.mT).softmax(-1) @ v, self.o)


def test_attention_heads_are_no_experts():
    with pytest.raises(CaptureError, match="no MoE layer was found"):
        upto(Heads().double(), "ep=2", given(), "shard_experts")
