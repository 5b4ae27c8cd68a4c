"""The smallest models that show each pass something. All in float64, all with a loss."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

import tedfx.ops.experts  # noqa: F401  (registers torch.ops.tedfx)

moe = torch.ops.tedfx
DTYPE = torch.float64


def linear(i, o, bias=False):
    return nn.Linear(i, o, bias, dtype=DTYPE)


def inputs(batch=4, length=3, width=8, seed=0):
    return {
        "x": torch.randn(batch, length, width, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))
    }


def tokens(batch=4, length=6, vocabulary=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocabulary, (batch, length), generator=g)
    labels[0, :4] = -100
    return {"ids": torch.randint(0, vocabulary, (batch, length), generator=g), "labels": labels}


class Fn(nn.Module):
    """`fn(self, x)` with the parameters given by shape."""

    def __init__(self, fn, **shapes):
        super().__init__()
        self.fn = fn
        g = torch.Generator().manual_seed(3)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, dtype=DTYPE, generator=g)))

    def forward(self, x):
        return self.fn(self, x)


class Mlp(nn.Module):
    def __init__(self, hidden=8, inner=12, bias=True):
        super().__init__()
        self.up, self.down = linear(hidden, inner, bias), linear(inner, hidden, bias)

    def forward(self, x):
        return (x + self.down(torch.relu(self.up(x)))).square().mean()


class GateUp(nn.Module):
    """gate|up in one matrix, concatenated or interleaved."""

    def __init__(self, hidden=8, inner=4, interleaved=False):
        super().__init__()
        self.gate_up, self.down, self.interleaved = (
            linear(hidden, 2 * inner),
            linear(inner, hidden),
            interleaved,
        )

    def forward(self, x):
        h = self.gate_up(x)
        gate, up = (h[..., ::2], h[..., 1::2]) if self.interleaved else h.chunk(2, -1)
        return (x + self.down(F.silu(gate) * up)).square().sum()


class Attention(nn.Module):
    def __init__(self, heads=4, kv_heads=4, head=4, dropout=0.0, gqa=False):
        super().__init__()
        self.heads, self.kv_heads, self.head, self.dropout, self.gqa = heads, kv_heads, head, dropout, gqa
        self.q, self.k, self.v = (
            linear(8, heads * head),
            linear(8, kv_heads * head),
            linear(8, kv_heads * head),
        )
        self.o = linear(heads * head, 8)

    def forward(self, x):
        b, s = x.shape[:2]
        q = self.q(x).view(b, s, self.heads, self.head).transpose(1, 2)
        k = self.k(x).view(b, s, self.kv_heads, self.head).transpose(1, 2)
        v = self.v(x).view(b, s, self.kv_heads, self.head).transpose(1, 2)
        if not self.gqa and self.heads != self.kv_heads:
            n = self.heads // self.kv_heads
            k, v = (
                t[:, :, None].expand(b, self.kv_heads, n, s, self.head).reshape(b, self.heads, s, self.head)
                for t in (k, v)
            )
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.dropout, enable_gqa=self.gqa
        )
        y = self.o(y.transpose(1, 2).reshape(b, s, -1))
        return (x + y).square().mean()


class LM(nn.Module):
    """Embedding, norm, MLP, head, token mean with ignored labels."""

    def __init__(self, vocabulary=16, hidden=6, inner=8):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden, dtype=DTYPE)
        self.position = nn.Embedding(32, hidden, dtype=DTYPE)
        self.norm = nn.LayerNorm(hidden, dtype=DTYPE)
        self.up, self.down, self.head = (
            linear(hidden, inner, True),
            linear(inner, hidden, True),
            linear(hidden, vocabulary),
        )

    def forward(self, ids, labels):
        h = self.embed(ids) + self.position(torch.arange(ids.shape[1]))
        h = h + self.down(F.gelu(self.up(self.norm(h))))
        return F.cross_entropy(self.head(h).flatten(0, 1), labels.flatten())


class MoE(nn.Module):
    """A router, a dispatch, two grouped linears with biases, a combine and a loss over the router."""

    def __init__(self, experts=4, hidden=8, inner=16, top=2, bias=True):
        super().__init__()
        g = torch.Generator().manual_seed(1)
        make = lambda *shape: nn.Parameter(torch.randn(shape, dtype=DTYPE, generator=g) / 2)
        self.experts, self.top = experts, top
        self.router, self.up, self.down = (
            make(experts, hidden),
            make(experts, inner, hidden),
            make(experts, hidden, inner),
        )
        self.up_bias, self.down_bias = (make(experts, inner), make(experts, hidden)) if bias else (None, None)

    def forward(self, x):
        x = x.flatten(0, 1)
        p = F.linear(x, self.router).softmax(-1)
        weights, ids = p.topk(self.top, -1)
        rows, counts, order = moe.dispatch(x, ids, self.experts)
        h = moe.grouped_linear(rows, self.up, counts)
        if self.up_bias is not None:
            h = h + moe.expert_rows(self.up_bias, counts, h)
        y = moe.grouped_linear(torch.tanh(h), self.down, counts)
        if self.down_bias is not None:
            y = y + moe.expert_rows(self.down_bias, counts, y)
        y = x + moe.combine(y, order, weights)
        balance = (p.mean(0) * F.one_hot(ids, self.experts).to(x.dtype).sum(1).mean(0)).sum()
        return y.square().mean() + balance


@functools.cache
def make(kind: type, *args, **kwargs) -> nn.Module:
    """One instance, hence one trace, per way of calling it."""
    return kind(*args, **kwargs)
