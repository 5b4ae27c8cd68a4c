"""The tiny models of tests/models_plain.py with mixtures of which a tensor of assignments is computed:
weights gathered by the router's ids, or all experts on all tokens.

`DENSE["dense_" + name](**config)` is a model; `LAYERS[name](config)` one mixture by itself, which gives its
result and an auxiliary loss of 0. Where a name ends in _one, a token has one choice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import einsum, nn

from tests import models_plain
from tests.models_plain import Config


class Stacks(nn.Module):
    """Stacked weights, a gate and an up half interleaved or one after the other; `mixture(self, x, w, ids)`
    gives what is added to the residual stream."""

    def __init__(self, c: Config, mixture: Callable, top_k: int | None = None, flat=True):
        super().__init__()
        self.c, self.mixture, self.top_k, self.flat = c, mixture, top_k or c.top_k, flat
        E, H, I = c.experts, c.hidden_size, c.inner_size
        self.router = nn.Linear(H, E)
        self.w1, self.w3 = (nn.Parameter(torch.randn(E, H, I) / H**0.5) for _ in range(2))
        self.w13 = nn.Parameter(torch.randn(E, 2 * I, H) / H**0.5)
        self.w2 = nn.Parameter(torch.randn(E, I, H) / I**0.5)
        self.b1, self.b2 = nn.Parameter(torch.randn(E, I)), nn.Parameter(torch.randn(E, H))
        self.b13 = nn.Parameter(torch.randn(E, 2 * I))
        self.norm = nn.LayerNorm(I)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(H, I), nn.GELU(), nn.Linear(I, H)) for _ in range(E)
        )

    def forward(self, x):
        shape = x.shape
        if self.flat:
            x = x.reshape(-1, shape[-1])
        probs = self.router(x).softmax(-1)
        w, ids = probs.topk(self.top_k, dim=-1)
        return self.mixture(self, x, w, ids).reshape(shape), 0.0

    def scattered(self, x, w, ids):
        return x.new_zeros(*x.shape[:-1], self.c.experts).scatter(-1, ids, w)


# --- weights gathered by ids --------------------------------------------------------------------------------


def by_einsum(m, x, w, ids):
    hidden = F.gelu(einsum("nh,nkhi->nki", x, m.w1[ids]))
    return (einsum("nki,nkih->nkh", hidden, m.w2[ids]) * w.unsqueeze(-1)).sum(1)


def interleaved(m, x, w, ids):
    """OpenAI's gpt-oss."""
    t = einsum("beck,bk->bec", m.w13[ids, ...], x) + m.b13[ids, ...]
    t = F.silu(t[..., ::2].clamp(max=7.0)) * (t[..., 1::2].clamp(-7.0, 7.0) + 1)
    t = einsum("bekc,bek->bec", m.w2[ids, ...], t)
    t += m.b2[ids, ...]
    return einsum("bec,be->bc", t, w)


def three_gathers(m, x, w, ids):
    """gpt-fast."""
    x1 = F.silu(einsum("ti,taio->tao", x, m.w1[ids]))
    x3 = einsum("ti, taio -> tao", x, m.w3[ids])
    y = einsum("tao, taoi -> tai", x1 * x3, m.w2[ids])
    return einsum("tai,ta -> ti", y, w / w.sum(-1, keepdim=True))


def flattened(m, x, w, ids):
    rows, flat = x.repeat_interleave(m.top_k, 0).unsqueeze(1), ids.flatten()
    gate, up = torch.bmm(rows, m.w13[flat].transpose(1, 2)).squeeze(1).chunk(2, -1)
    y = torch.bmm((F.silu(gate) * up).unsqueeze(1), m.w2.index_select(0, flat)).squeeze(1)
    return (y * w.reshape(-1, 1)).view(-1, m.top_k, x.shape[-1]).sum(1)


def columns(m, x, w, ids):
    """Matrices from the left, weights by bmm."""
    rows = x[:, None, :, None].expand(-1, m.top_k, -1, -1)
    gate, up = m.w13[ids].chunk(2, dim=-2)
    hidden = F.silu(gate @ rows) * (up @ rows)
    y = m.w2[ids].transpose(-1, -2) @ hidden + m.b2[ids].unsqueeze(-1)
    return torch.bmm(w.unsqueeze(1), y.squeeze(-1)).squeeze(1)


def by_sums(m, x, w, ids):
    hidden = (x[:, None, :, None] * m.w1[ids]).sum(-2) + m.b1[ids]
    y = (m.norm(hidden).unsqueeze(-1) * m.w2[ids]).sum(2)
    return (y.transpose(1, 2) @ w.unsqueeze(-1)).squeeze(-1)


def looked_up(m, x, w, ids):
    """An embedding of matrices; the weight before the last product."""
    shape = (*ids.shape, *m.w1.shape[1:])
    hidden = F.relu(einsum("nh,nkhi->nki", x, F.embedding(ids, m.w1.flatten(1)).view(shape)))
    hidden = hidden * w[..., None]
    return torch.matmul(hidden.unsqueeze(2), m.w2[ids]).squeeze(2).sum(dim=1)


def unflattened(m, x, w, ids):
    """Tokens that were never flattened."""
    hidden = F.gelu(einsum("bsh,bskhi->bski", x, m.w1[ids]) + m.b1[ids])
    return (einsum("bski,bskih->bskh", hidden, m.w2[ids]) * w[..., None]).sum(-2)


def gathered_one(m, x, w, ids):
    ids = ids.squeeze(-1)
    hidden = F.gelu(torch.bmm(x.unsqueeze(1), m.w1[ids]) + m.b1[ids].unsqueeze(1))
    return w * (torch.bmm(hidden, m.w2[ids]).squeeze(1) + m.b2[ids])


def kept_one(m, x, w, ids):
    return by_einsum(m, x, w, ids)


def choice_by_choice(m, x, w, ids):
    y = torch.zeros_like(x)
    for k in range(m.top_k):
        e = ids[:, k]
        y = y + w[:, k, None] * einsum("ni,nih->nh", F.gelu(einsum("nh,nhi->ni", x, m.w1[e])), m.w2[e])
    return y


def twice(m, x, w, ids):
    """A token's two choices may be one expert."""
    ids = ids.gather(1, (x[:, :2] > 0).long())
    return by_einsum(m, x, w, ids)


# --- all experts on all tokens ------------------------------------------------------------------------------


def all_einsum(m, x, w, ids):
    return einsum("ne,enh->nh", m.scattered(x, w, ids), F.gelu(x @ m.w1) @ m.w2)


def all_biases(m, x, w, ids):
    hidden = F.gelu(einsum("nh,ehi->nei", x, m.w1) + m.b1)
    y = einsum("nei,eih->neh", m.norm(hidden), m.w2) + m.b2[None]
    return (y * m.scattered(x, w, ids).unsqueeze(-1)).sum(dim=1)


def all_expanded(m, x, w, ids):
    rows = x.unsqueeze(0).expand(m.c.experts, -1, -1)
    gate, up = torch.baddbmm(m.b13[:, None], rows, m.w13.transpose(1, 2)).chunk(2, -1)
    y = torch.bmm(F.silu(gate) * up, m.w2)
    return (y * m.scattered(x, w, ids).t()[..., None]).sum(0)


def all_modules(m, x, w, ids):
    y = torch.stack([expert(x) for expert in m.experts], dim=1)
    gates = (F.one_hot(ids, m.c.experts).to(x.dtype) * w.unsqueeze(-1)).sum(1)
    return torch.bmm(gates.unsqueeze(1), y).squeeze(1)


def all_masked(m, x, w, ids):
    """A softmax over what was chosen."""
    logits = m.router(x)
    mask = torch.full_like(logits, float("-inf")).scatter(1, ids, logits.gather(1, ids))
    y = torch.stack([expert(x) for expert in m.experts])
    return einsum("enh,ne->nh", y, mask.softmax(-1))


def all_normalised(m, x, w, ids):
    gates = m.router(x).softmax(-1) * torch.zeros(x.shape[0], m.c.experts, dtype=x.dtype).scatter(1, ids, 1.0)
    gates = gates / gates.sum(-1, keepdim=True)
    return (gates.unsqueeze(1) @ (F.gelu(x.unsqueeze(1).unsqueeze(1) @ m.w1) @ m.w2).squeeze(2)).squeeze(1)


def all_unflattened(m, x, w, ids):
    hidden = F.gelu(einsum("bsh,ehi->bsei", x, m.w1) + m.b1)
    return einsum("bsei,eih->bseh", hidden, m.w2).mul(m.scattered(x, w, ids)[..., None]).sum(2)


def llama4(m, x, w, ids):
    """Every expert reads all tokens times sigmoid scores."""
    top, ids = m.router(x).topk(m.top_k, dim=1)
    scores = torch.full((x.shape[0], m.c.experts), float("-inf"), dtype=x.dtype).scatter_(1, ids, top)
    scores = torch.sigmoid(scores)
    rows = x.repeat(m.c.experts, 1) * scores.transpose(0, 1).reshape(-1, 1)
    rows = rows.view(m.c.experts, -1, x.shape[-1])
    gate, up = torch.bmm(rows, m.w13.mT).chunk(2, dim=-1)
    y = torch.bmm(up * F.silu(gate), m.w2).view(-1, x.shape[-1])
    return y.reshape(m.c.experts, -1, y.shape[-1]).sum(dim=0)


def read_at_ids(m, x, w, ids):
    """Of all experts' results those of the chosen ones."""
    y = torch.stack([expert(x) for expert in m.experts], dim=1)
    return (y.gather(1, ids.unsqueeze(-1).expand(-1, -1, y.shape[-1])) * w.unsqueeze(-1)).sum(1)


def indexed(m, x, w, ids):
    y = (F.gelu(x @ m.w1) @ m.w2 + m.b2[:, None]).transpose(0, 1)
    return einsum("nkh,nk->nh", y[torch.arange(x.shape[0])[:, None], ids], w)


def indexed_one(m, x, w, ids):
    y = torch.stack([expert(x) for expert in m.experts]).transpose(0, 1)
    return y[torch.arange(x.shape[0]), ids[:, 0]] * w


def all_one(m, x, w, ids):
    return all_biases(m, x, w, ids)


GATHERED = [by_einsum, interleaved, three_gathers, flattened, columns, by_sums, looked_up, unflattened]
GATHERED += [gathered_one, kept_one, choice_by_choice, twice]
ALL = [all_einsum, all_biases, all_expanded, all_modules, all_masked, all_normalised, all_unflattened, llama4]
ALL += [read_at_ids, indexed, indexed_one, all_one]


def layer(mixture: Callable, c: Config) -> Stacks:
    name = mixture.__name__
    return Stacks(c, mixture, 1 if name.endswith("_one") else None, not name.endswith("unflattened"))


LAYERS = {mixture.__name__: partial(layer, mixture) for mixture in (*GATHERED, *ALL)}
LAYERS["llama4_one"] = lambda c: Stacks(c, llama4, 1)


DENSE = {f"dense_{name}": partial(models_plain.with_mixtures, layer) for name, layer in LAYERS.items()}
