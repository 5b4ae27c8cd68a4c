"""A tiny mixture with what mixed precision has to leave alone: a float32 buffer, a tied weight, a router in
float32, autocast regions. And a dense model."""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn


class Mixture(nn.Module):
    """forward(input_ids[B, S], labels[B, S]) -> loss. regions: the experts in an autocast region, the router
    outside of it."""

    def __init__(self, regions=False, vocabulary=32, width=16, hidden=24, experts=2):
        super().__init__()
        self.regions = regions
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.norm, self.router = nn.LayerNorm(width), nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
            for _ in range(experts)
        )
        self.register_buffer("table", torch.linspace(0.5, 1.5, width))

    def forward(self, input_ids, labels):
        x = self.embed(input_ids).flatten(0, 1)
        x = x * self.table.to(x.dtype)
        with torch.autocast("cpu", torch.bfloat16) if self.regions else contextlib.nullcontext():
            rows = self.norm(x)
            with torch.autocast("cpu", enabled=False):
                weights, ids = F.linear(rows.float(), self.router.weight.float()).softmax(-1).topk(1, -1)
            out = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                token, slot = torch.where(ids == e)
                out.index_add_(0, token, (expert(rows[token]) * weights[token, slot, None]).to(out.dtype))
            return F.cross_entropy(self.head(x + out).float(), labels.flatten())


class Dense(nn.Module):
    """Three uses of one activation, a weight used twice, a product without gradients: what autocast's cache
    and casts could get wrong."""

    def __init__(self, width=16):
        super().__init__()
        self.norm, self.a, self.b = (
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.Linear(width, width, bias=False),
        )
        self.register_buffer("table", torch.linspace(0.5, 1.5, width))

    def forward(self, x):
        x = x.to(self.norm.weight.dtype)
        h = self.norm(x)
        with torch.no_grad():
            gain = self.a(x).float().sigmoid()
        q, k, v = self.a(h), self.b(h), self.a(F.gelu(self.b(h)))
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        with torch.autocast("cpu", enabled=False):
            z = F.linear(h.float(), self.b.weight.float())
        y = torch.cat([y * gain.to(y.dtype), z.to(x.dtype)], -1).float() * self.table.repeat(2)
        return y.square().sum()


def tokens(step, rows=4, length=8, vocabulary=32):
    text = (
        torch.randint(vocabulary, (rows, length + 1), generator=torch.Generator().manual_seed(step))
        .sort()
        .values
    )
    return {"input_ids": text[:, :-1], "labels": text[:, 1:]}
