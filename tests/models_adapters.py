"""Mixtures whose experts are frozen, or carry adapters, as people fine-tune them.

`ADAPTERS[name]()` is a language model of one layer; `forward(input_ids, labels)` gives the loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from tests.models_styles import HIDDEN, WIDTH, Mixture, Model

RANK = 3


class LowRank(nn.Module):
    """A linear layer that is frozen, and a trained pair beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = (
            nn.Linear(base.in_features, RANK, bias=False),
            nn.Linear(RANK, base.out_features, bias=False),
        )

    def forward(self, x):
        return self.base(x) + 2.0 * self.b(self.a(x))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Loop(nn.Module):
    """A loop over `expert(e, rows)`."""

    def __init__(self, experts=4, k=2, make: Callable[[], nn.Module] = MLP):
        super().__init__()
        self.k, self.gate = k, nn.Linear(WIDTH, experts, bias=False)
        self.experts = nn.ModuleList(make() for _ in range(experts))

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(self.k, -1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


class Sliced(Mixture):
    """A loop over slices of stacked weights."""

    def forward(self, x):
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.expert(e, x[token]) * weights[token, slot, None])
        return out


class Pairs(Sliced):
    """A pair [E, r, H], [E, F, r] per expert, its product added to the weights of all experts, or of one."""

    def __init__(self, experts=4, fused="all"):
        super().__init__(experts)
        self.fused = fused
        self.w1.requires_grad_(False)
        self.a = nn.Parameter(0.3 * torch.randn(experts, RANK, WIDTH))
        self.b = nn.Parameter(0.3 * torch.randn(experts, HIDDEN, RANK))

    def expert(self, e, rows):
        if self.fused == "rows":
            up = rows @ self.w1[e] + F.linear(F.linear(rows, self.a[e]), self.b[e])
        elif self.fused == "one":
            up = rows @ (self.w1[e] + (self.b[e] @ self.a[e]).T)
        else:
            up = rows @ (self.w1 + torch.bmm(self.b, self.a).transpose(1, 2))[e]
        return F.gelu(up) @ self.w2[e]


class Delta(nn.Module):
    """What peft's `target_parameters` registers on a stacked weight: one pair for all experts."""

    def __init__(self, weight):
        super().__init__()
        experts, ins, outs = weight.shape
        self.a, self.b = (
            nn.Linear(ins, RANK * experts, bias=False),
            nn.Linear(RANK * experts, outs, bias=False),
        )

    def forward(self, weight):
        experts = weight.shape[0]
        a = self.a.weight.reshape(experts, -1, weight.shape[1])
        b = self.b.weight.reshape(weight.shape[2], -1, experts)
        return weight + 2.0 * torch.einsum("o r e, e r i -> e i o", b, a)


class OwnDelta(nn.Module):
    """The same for the weight of one expert's linear layer."""

    def __init__(self, weight):
        super().__init__()
        self.a, self.b = (
            nn.Parameter(torch.randn(RANK, weight.shape[1]) / 3),
            nn.Parameter(torch.randn(weight.shape[0], RANK) / 3),
        )

    def forward(self, weight):
        return weight + self.b @ self.a


def parametrized(module, *names):
    """`module` with these weights frozen and a pair for each."""
    for name in names:
        weight = getattr(module, name).requires_grad_(False)
        parametrize.register_parametrization(module, name, (Delta if weight.dim() == 3 else OwnDelta)(weight))
    return module


def low_rank():
    mlp = MLP()
    mlp.up, mlp.down = LowRank(mlp.up), LowRank(mlp.down)
    return mlp


def own_deltas():
    mlp = MLP()
    parametrized(mlp.up, "weight"), parametrized(mlp.down, "weight")
    return mlp


class Twice(nn.Module):
    """A mixture that is called twice."""

    def __init__(self, mixture):
        super().__init__()
        self.mixture = mixture

    def forward(self, x):
        return self.mixture(x) + self.mixture(torch.tanh(x))


def tied():
    """Two layers with routers of their own and the same experts."""
    one, other = Loop(), Loop()
    other.experts = one.experts
    return Model(one, other)


ADAPTERS = {
    "low_rank": lambda experts=4: Model(Loop(experts, make=low_rank)),
    "pairs_of_rows": lambda experts=4: Model(Pairs(experts, "rows")),
    "pairs_of_all": lambda experts=4: Model(Pairs(experts, "all")),
    "pairs_of_one": lambda experts=4: Model(Pairs(experts, "one")),
    "parametrized": lambda experts=4: Model(parametrized(Sliced(experts), "w1", "w2")),
    "own_deltas": lambda experts=4: Model(Loop(experts, make=own_deltas)),
    "twice": lambda experts=4: Model(Twice(Loop(experts))),
    "tied": tied,
    "counts": lambda: Model(Loop(4), Loop(6), Loop(3)),
    "some_frozen": lambda experts=4: some_frozen(experts),
}


def some_frozen(experts=4):
    """Every second expert is not trained."""
    mixture = Loop(experts)
    for expert in list(mixture.experts)[1::2]:
        expert.requires_grad_(False)
    return Model(mixture)
