"""Rows that go to no expert: what experts make of them reaches nothing, not even as NaN.

The experts here divide by the norm of what they compute, so zeros give NaN, forward and backward, and all of
them read one scale.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.marks import slow
from tests.passes.helpers import count, parity, upto

H, E = 8, 4


class Layer(nn.Module):
    def __init__(self, mixture):
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(H, E)
        self.experts = nn.ModuleList(nn.Linear(H, H, bias=False) for _ in range(E))
        self.w = nn.Parameter(torch.randn(E, H, H))
        self.scale = nn.Parameter(torch.rand(H))
        self.mixture = mixture

    def forward(self, x):
        flat = x.flatten(0, 1)
        return self.mixture(self, flat, self.router(flat).softmax(-1)).view(x.shape)

    def unit(self, h):
        return h / h.norm(dim=-1, keepdim=True) * self.scale


def first_of_each(m, x, probs):
    """The first tokens of each expert, the others to none."""
    (w, ids), out = probs.topk(2, dim=-1), torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(ids == e)
        token, slot = token[: x.shape[0] * 3 // 10], slot[: x.shape[0] * 3 // 10]
        out.index_add_(0, token, m.unit(m.experts[e](x[token])) * w[token, slot, None])
    return out


def classes(m, x, probs):
    """Rows of the other class's experts stand in the tail."""
    (w, ids), out = probs.topk(2, dim=-1), torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(ids == e)
        h = m.experts[e](m.unit(x[token]))
        out.index_add_(0, token, (m.unit(h) if e < 2 else m.unit(h.tanh())) * w[token, slot, None])
    return out


def masked(m, x, probs):
    """A mask leaves hits out."""
    gate, ids = probs.max(-1)
    hits = F.one_hot(ids, E)
    mask = hits * (hits.cumsum(0) <= x.shape[0] // 6)
    out = torch.zeros_like(x)
    for e in range(E):
        token = mask[:, e].nonzero().squeeze(-1)
        out.index_add_(0, token, m.unit(m.experts[e](x[token])) * gate[token, None])
    return out


def chosen(m, x, probs):
    weights, token = probs.topk(x.shape[0] // E, dim=0)
    rows = m.unit(torch.bmm(x[token.T], m.w)) * weights.T.unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, token.T.flatten(), rows.flatten(0, 1))


MIXTURES = [first_of_each, classes, masked, chosen]


def given(*zero):
    x = torch.randn(4, 6, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return {"x": x}


@pytest.mark.parametrize("mixture", MIXTURES, ids=lambda each: each.__name__)
@pytest.mark.parametrize(
    "mesh, roles",
    [
        ("dp=2", None),
        slow("tp=2", None),
        slow("ep=2", None),
        slow("ep=2,tp=2", None),
        ("tp=2", {"expert": "tp"}),  # of first_of_each in slots
    ],
)
def test_on_ranks(mixture, mesh, roles):
    parity(Layer(mixture).double(), mesh, given(), roles)


@pytest.mark.parametrize("mixture", MIXTURES, ids=lambda each: each.__name__)
def test_where_one_expert_gets_all(mixture):
    """Ranks with nothing but a tail, and with empty slots only."""
    model = Layer(mixture).double()
    with torch.no_grad():
        model.router.bias.copy_(torch.tensor([9.0, 5.0, 0.0, 0.0]))
    for mesh, roles in (("dp=2", None), ("tp=2", {"expert": "tp"})):
        parity(model, mesh, given(), roles)


@pytest.mark.parametrize("mesh", ["dp=2", "ep=2"])
def test_a_tail_is_cut_off(mesh):
    """No expert meets it: by its length where nothing travels, by the splits where rows do."""
    program, _ = upto(Layer(first_of_each).double(), mesh, given(), "lower_experts")
    assert count(program, "cut_tail") == {"cut_tail": int(mesh == "ep=2")}
    kept = [n.kwargs.get("tail", False) for n in program.graph_module.graph.nodes if n.name == "route"]
    assert kept == [mesh == "dp=2"]
    tails = [n for n in program.graph_module.graph.nodes if "tedfx" in str(n.target) and True in n.args[2:]]
    assert not tails
