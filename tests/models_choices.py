"""Mixtures whose experts choose tokens: `CHOICES["choice_" + name](**config)`, `LAYERS[name](config)`."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import einsum, nn

from tests import models_plain
from tests.models_plain import Config


class Choice(nn.Module):
    """`mixture(self, x)` of tokens [B, S, H]."""

    def __init__(self, c: Config, mixture):
        super().__init__()
        self.c, self.mixture = c, mixture
        E, H, I = c.experts, c.hidden_size, c.inner_size
        self.router = nn.Linear(H, E, bias=False)
        self.w1 = nn.Parameter(torch.randn(E, H, I) / H**0.5)
        self.w2 = nn.Parameter(torch.randn(E, I, H) / I**0.5)
        self.b1, self.b2 = nn.Parameter(torch.randn(E, 1, I)), nn.Parameter(torch.randn(E, 1, H))
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(H, I), nn.GELU(), nn.Linear(I, H)) for _ in range(E)
        )

    def forward(self, x):
        return self.mixture(self, x), 0.0

    def capacity(self, tokens):
        return self.c.top_k * tokens // self.c.experts


def batch(m, x):
    """Each expert takes its tokens of the whole batch."""
    shape, x = x.shape, x.flatten(0, 1)
    weights, token = m.router(x).softmax(-1).topk(m.capacity(x.shape[0]), dim=0)
    rows = torch.bmm(F.gelu(torch.bmm(x[token.T], m.w1) + m.b1), m.w2) + m.b2
    rows = rows * weights.T.unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, token.T.flatten(), rows.flatten(0, 1)).view(shape)


def sequence(m, x):
    """Each expert takes its tokens of every sequence; a one-hot matrix takes them there and back."""
    weights, token = m.router(x).softmax(-1).mT.topk(m.capacity(x.shape[1]), dim=-1)
    hot = F.one_hot(token, x.shape[1]).to(x.dtype)
    rows = einsum("bect,bth->bech", hot, x)
    rows = einsum("beci,eih->bech", F.gelu(einsum("bech,ehi->beci", rows, m.w1)), m.w2)
    return einsum("bect,bech->bth", hot, rows * weights[..., None])


def modules(m, x):
    """Experts that are modules; added to what was there, weights normalised among an expert's tokens."""
    shape, x = x.shape, x.flatten(0, 1)
    scores, token = m.router(x).T.topk(m.capacity(x.shape[0]), dim=-1)
    weights, rows = scores.softmax(-1), x.index_select(0, token.flatten()).view(*token.shape, -1)
    done = torch.stack([expert(own) for expert, own in zip(m.experts, rows)]) * weights.unsqueeze(-1)
    index = token.reshape(-1, 1).expand(-1, x.shape[1])
    return x.scatter_add(0, index, done.flatten(0, 1)).view(shape)


MIXTURES = {"batch": batch, "sequence": sequence, "modules": modules}
LAYERS = {name: partial(Choice, mixture=mixture) for name, mixture in MIXTURES.items()}


CHOICES = {f"choice_{name}": partial(models_plain.with_mixtures, layer) for name, layer in LAYERS.items()}
