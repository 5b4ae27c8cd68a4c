"""The models of `python benchmarks/memory.py state`: plain ones, for a single device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Shape:
    """kind: "llama", of transformers, or "gpt", whose every second layer has `experts` where there are
    any."""

    kind: str
    hidden: int
    layers: int
    heads: int
    experts: int = 0
    inner: int = 0
    vocabulary: int = 1024  # small: the formulas know none

    @property
    def base(self) -> int:
        """Parameters of a gpt without experts: TED's NP_base."""
        return self.layers * (12 * self.hidden + 13) * self.hidden + (self.vocabulary + 2) * self.hidden


ZERO_7B = Shape("llama", hidden=4096, layers=36, heads=32, inner=11008, vocabulary=32000)
SMALL = Shape("llama", hidden=2048, layers=2, heads=16, inner=5504, vocabulary=32000)
TED_7B = Shape(
    "gpt", hidden=4096, layers=32, heads=32, experts=16, vocabulary=51200
)  # "6.7B", with experts "40B"


class Switch(nn.Module):
    """Experts as Switch and DeepSpeed-MoE write them: top-1, a capacity, one-hot masks, weights of all
    experts in one tensor."""

    def __init__(self, hidden: int, experts: int, capacity_factor: float = 1.25):
        super().__init__()
        self.experts, self.capacity_factor = experts, capacity_factor
        self.router = nn.Linear(hidden, experts, bias=False)
        self.up, self.up_bias = (
            nn.Parameter(torch.empty(experts, hidden, 4 * hidden)),
            nn.Parameter(torch.empty(experts, 4 * hidden)),
        )
        self.down, self.down_bias = (
            nn.Parameter(torch.empty(experts, 4 * hidden, hidden)),
            nn.Parameter(torch.empty(experts, hidden)),
        )

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        capacity = int(self.capacity_factor * flat.shape[0] / self.experts)
        gate, index = self.router(flat).softmax(-1).max(-1)
        mask = F.one_hot(index, self.experts)
        place = torch.cumsum(mask, 0) * mask - mask
        mask = mask * torch.lt(place, capacity)
        slot = F.one_hot((place * mask).sum(-1), capacity)
        combine = (gate * mask.sum(-1))[:, None, None] * mask[:, :, None] * slot[:, None, :]
        inputs = torch.einsum("nec,nh->ech", combine.bool().to(x.dtype), flat)
        inner = F.gelu(torch.bmm(inputs, self.up) + self.up_bias[:, None])
        return torch.einsum(
            "nec,ech->nh", combine, torch.bmm(inner, self.down) + self.down_bias[:, None]
        ).reshape(x.shape)


class Dense(nn.Sequential):
    def __init__(self, hidden: int):
        super().__init__(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, experts: int):
        super().__init__()
        self.heads, self.norm, self.norm_2 = heads, nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.q, self.k, self.v, self.out = (nn.Linear(hidden, hidden) for _ in range(4))
        self.mlp = Switch(hidden, experts) if experts else Dense(hidden)

    def forward(self, x):
        batch, sequence, hidden = x.shape
        y = self.norm(x)
        q, k, v = (
            w(y).view(batch, sequence, self.heads, hidden // self.heads).transpose(1, 2)
            for w in (self.q, self.k, self.v)
        )
        x = x + self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True)
            .transpose(1, 2)
            .reshape(batch, sequence, hidden)
        )
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.embed, self.head = (
            nn.Embedding(shape.vocabulary, shape.hidden),
            nn.Linear(shape.hidden, shape.vocabulary, bias=False),
        )
        self.layers = nn.ModuleList(
            Layer(shape.hidden, shape.heads, shape.experts * (i % 2)) for i in range(shape.layers)
        )
        self.norm = nn.LayerNorm(shape.hidden)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


def make_model(shape: Shape) -> nn.Module:
    """In bfloat16, on the meta device."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            if shape.kind == "gpt":
                return GPT(shape)
            from transformers import LlamaConfig, LlamaForCausalLM

            return LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=shape.hidden,
                    intermediate_size=shape.inner,
                    num_hidden_layers=shape.layers,
                    num_attention_heads=shape.heads,
                    vocab_size=shape.vocabulary,
                )
            ).train()
    finally:
        torch.set_default_dtype(torch.float32)
