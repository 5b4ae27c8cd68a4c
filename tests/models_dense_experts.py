"""Mixtures of which every expert computes every token, or slots made of all of them: nothing is dispatched.

`DENSE_EXPERTS["soft_" + name](**config)` is a model (tests/models_plain.py); `LAYERS[name](config)` one
mixture.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import einsum, nn

from tests import models_plain
from tests.models_plain import Config


class Soft(nn.Module):
    """Stacked weights and a router; `mixture(self, x)` of tokens [N, H], or [B, S, H] where not `flat`."""

    def __init__(self, c: Config, mixture, flat=True):
        super().__init__()
        self.c, self.mixture, self.flat = c, mixture, flat
        E, H, I = c.experts, c.hidden_size, c.inner_size
        self.router = nn.Linear(H, E)
        self.w1 = nn.Parameter(torch.randn(E, H, I) / H**0.5)
        self.w2 = nn.Parameter(torch.randn(E, I, H) / I**0.5)
        self.b1, self.b2 = nn.Parameter(torch.randn(E, I)), nn.Parameter(torch.randn(E, H))
        self.experts = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(H), nn.Linear(H, I), nn.GELU(), nn.Linear(I, H)) for _ in range(E)
        )
        self.slots = nn.Parameter(torch.randn(H, E, 3) / H**0.5)
        self.scale = nn.Parameter(torch.ones(()))
        self.queries = nn.Linear(H, 2 * 2 * 4)  # two heads of two halves
        self.keys = nn.Parameter(torch.randn(2, 2, E, 4))
        self.down, self.up = nn.Embedding(E * E, H), nn.Embedding(E * E, H)

    def forward(self, x):
        shape = x.shape
        if self.flat:
            x = x.reshape(-1, shape[-1])
        return self.mixture(self, x).reshape(shape), 0.0


def plain(m, x):
    """A softmax over all experts, whose sum is an einsum."""
    return einsum("ne,enh->nh", m.router(x).softmax(-1), F.gelu(x @ m.w1) @ m.w2)


def threshold(m, x):
    """Gates below a threshold are zero, the others sum to one; tokens are never flattened."""
    gate = m.router(x).sigmoid()
    gate = torch.where(gate > 0.4, gate, 0.0)
    gate = gate / (gate.sum(-1, keepdim=True) + 1e-6)
    hidden = F.silu(einsum("bsh,ehi->bsei", x, m.w1) + m.b1)
    return ((einsum("bsei,eih->bseh", hidden, m.w2) + m.b2) * gate.unsqueeze(-1)).sum(2)


def weighed_hidden(m, x):
    """The gate stands before the second product, which sums over experts and features at once."""
    hidden = F.gelu(einsum("nh,ehi->nei", x, m.w1)) * m.router(x).softmax(-1)[..., None]
    return einsum("nei,eih->nh", hidden, m.w2)


def soft_moe(m, x):
    """Slots that are means of a sequence's tokens (Puigcerver and others)."""
    logits = einsum("bth,hes->btes", F.normalize(x, dim=-1), m.scale * F.normalize(m.slots, dim=0))
    slots = einsum("btes,bth->besh", logits.softmax(1), x)
    y = einsum("besi,eih->besh", F.gelu(einsum("besh,ehi->besi", slots, m.w1) + m.b1[:, None]), m.w2)
    return einsum("btes,besh->bth", logits.flatten(2).softmax(-1).view_as(logits), y)


def soft_moe_of_batch(m, x):
    """Slots that are means of all tokens of the batch."""
    logits = x @ m.slots.flatten(1)
    slots = (logits.softmax(0).T @ x).view(m.c.experts, 3, -1)
    y = torch.bmm(F.gelu(torch.bmm(slots, m.w1)), m.w2)
    return logits.softmax(-1) @ y.flatten(0, 1)


def peer(m, x):
    """Product keys, experts of one neuron each: rows of two embeddings."""
    q = m.queries(x).view(-1, 2, 2, 4)
    scores, ids = einsum("nhpd,hpkd->nhpk", q, m.keys).topk(2, -1)
    sums = (scores[:, :, 0, :, None] + scores[:, :, 1, None, :]).flatten(-2)
    pairs = (ids[:, :, 0, :, None] * m.c.experts + ids[:, :, 1, None, :]).flatten(-2)
    scores, best = sums.topk(2, -1)
    ids = pairs.gather(-1, best)
    hidden = F.gelu(einsum("nd,nhkd->nhk", x, m.down(ids))) * scores.softmax(-1)
    return einsum("nhk,nhkd->nd", hidden, m.up(ids))


def loop(m, x):
    """One expert after the other, written out, each with a gate that is never zero."""
    gate, out = m.router(x).softmax(-1), torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        out = out + gate[..., e : e + 1] * expert(x)
    return out


def loop_over_slices(m, x):
    gate = m.router(x).sigmoid()
    return x + sum(
        g[:, None] * (F.silu(x @ m.w1[e] + m.b1[e]) @ m.w2[e]) for e, g in enumerate(gate.unbind(1))
    )


def listed(m, x):
    """The experts' results side by side."""
    y = torch.stack([expert(x) for expert in m.experts], dim=2)
    return (m.router(x).softmax(-1).unsqueeze(2) @ y).squeeze(2)


def listed_slots(m, x):
    """Soft MoE whose experts are modules, each with the slots of its own (lucidrains' package)."""
    logits = einsum("bth,hes->btes", x, m.slots)
    slots = einsum("btes,bth->besh", logits.softmax(1), x).permute(1, 0, 2, 3)
    y = torch.stack([expert(own) for expert, own in zip(m.experts, slots)])
    combine = logits.flatten(2).softmax(-1)
    return einsum("bts,bsh->bth", combine, y.permute(1, 0, 2, 3).flatten(1, 2))


MIXTURES = {"loop": (loop, False), "loop_over_slices": (loop_over_slices, True)}
MIXTURES |= {"listed": (listed, False), "listed_slots": (listed_slots, False)}
MIXTURES |= {"moe": (soft_moe, False), "moe_of_batch": (soft_moe_of_batch, True), "peer": (peer, True)}
MIXTURES |= {
    "plain": (plain, True),
    "threshold": (threshold, False),
    "weighed_hidden": (weighed_hidden, True),
}
LAYERS = {name: partial(Soft, mixture=mixture, flat=flat) for name, (mixture, flat) in MIXTURES.items()}


DENSE_EXPERTS = {f"soft_{name}": partial(models_plain.with_mixtures, layer) for name, layer in LAYERS.items()}
