"""Styles of mixtures that are not captured are named, with their line; a captured or dense model has none."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedfx.passes.capture_loops import find_uncaptured
from tests.capture.test_models import Layer, capture

E, H, I = 4, 32, 48


class Mixture(nn.Module):
    def __init__(self, mixture):
        super().__init__()
        self.router = nn.Linear(H, E)
        self.up, self.down = nn.Parameter(torch.randn(E, H, I)), nn.Parameter(torch.randn(E, I, H))
        self.experts = nn.ModuleList(nn.Linear(H, H) for _ in range(E))
        self.mixture = mixture

    def forward(self, x):
        x = x.reshape(-1, H)
        w, ids = self.router(x).softmax(-1).topk(2, dim=-1)
        return {"loss": self.mixture(self, x, w, ids).square().sum()}


def one_hot_einsum(m, x, w, ids):
    capacity = 8
    hits = F.one_hot(ids[:, 0], E)
    place = (hits.cumsum(0) - 1) * hits
    mask = F.one_hot(place.clamp(0, capacity - 1), capacity) * (hits * (place < capacity)).unsqueeze(-1)
    rows = torch.einsum("nec,nh->ech", mask.to(x.dtype), x)
    rows = torch.bmm(F.relu(torch.bmm(rows, m.up)), m.down)
    return torch.einsum("nec,ech->nh", mask.to(x.dtype), rows)


def gathered(m, x, w, ids):
    up, down = m.up[ids], m.down[ids]
    rows = F.relu(torch.einsum("nh,nkhi->nki", x, up))
    return (torch.einsum("nki,nkih->nkh", rows, down) * w.unsqueeze(-1)).sum(1)


def all_einsum(m, x, w, ids):
    rows = torch.einsum("nei,eih->neh", F.relu(torch.einsum("nh,ehi->nei", x, m.up)), m.down)
    return (rows * torch.zeros(x.shape[0], E).scatter(1, ids, w).unsqueeze(-1)).sum(1)


def stacked_outputs(m, x, w, ids):
    rows = torch.stack([expert(x) for expert in m.experts], dim=1)
    return (rows.gather(1, ids.unsqueeze(-1).expand(-1, -1, H)) * w.unsqueeze(-1)).sum(1)


@pytest.mark.parametrize(
    "mixture, style",
    [
        (one_hot_einsum, "one-hot dispatch with capacity"),
        (gathered, "gathered weights"),
        (all_einsum, "all experts on all tokens"),
        (stacked_outputs, "all experts on all tokens"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_styles(mixture, style):
    traced, result = capture(Mixture(mixture))
    assert result.matches == 0
    found = find_uncaptured(traced.graph_module.graph)
    assert {s for s, _ in found} == {style} and all("test_uncaptured.py:" in line for _, line in found)


def test_captured_and_dense_models_have_none():
    traced, _ = capture(Layer("stacked"))
    assert find_uncaptured(traced.graph_module.graph) == []
    traced, _ = capture(Mixture(lambda m, x, w, ids: m.experts[1](F.relu(m.experts[0](x)))))
    assert find_uncaptured(traced.graph_module.graph) == []
