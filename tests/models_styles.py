"""Mixtures as people write them, one per style that is not in models_plain.py or models_capacity.py.

`STYLES[name]()` is a language model of one layer; `forward(input_ids, labels)` gives the loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HIDDEN, VOCABULARY = 32, 24, 64


class Model(nn.Module):
    def __init__(self, *mixtures):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in mixtures)
        self.mixtures = nn.ModuleList(mixtures)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        for norm, mixture in zip(self.norms, self.mixtures):
            x = x + mixture(norm(x).flatten(0, 1)).view_as(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), ignore_index=-100)


class Mixture(nn.Module):
    def __init__(self, experts=4, k=2):
        super().__init__()
        self.experts, self.k, self.gate = experts, k, nn.Linear(WIDTH, experts, bias=False)
        self.w1 = nn.Parameter(0.3 * torch.randn(experts, WIDTH, HIDDEN))
        self.w2 = nn.Parameter(0.3 * torch.randn(experts, HIDDEN, WIDTH))

    def route(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(self.k, -1)
        return weights / weights.sum(-1, keepdim=True), ids

    def expert(self, e, rows):
        return F.gelu(rows @ self.w1[e]) @ self.w2[e]


class HitLoop(Mixture):
    """Only the experts that were chosen, as data."""

    def forward(self, x):
        weights, ids = self.route(x)
        mask = F.one_hot(ids, self.experts).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for hit in (mask.sum((1, 2)) > 0).nonzero():
            e = hit[0]
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, self.expert(e, x[token]) * weights[token, slot, None])
        return out


class HostCounts(Mixture):
    """Sorted rows, cut into runs by numbers on the host."""

    def forward(self, x):
        weights, ids = self.route(x)
        order = ids.flatten().argsort(stable=True)
        rows = x[order // self.k].split(ids.flatten().bincount(minlength=self.experts).tolist())
        done = torch.cat([self.expert(e, r) for e, r in enumerate(rows)])
        done = torch.zeros_like(done).index_copy(0, order, done).view(-1, self.k, WIDTH)
        return done.mul(weights.unsqueeze(-1)).sum(1)


class ScoresFirst(Mixture):
    """Sorted rows that are scaled before the experts, and added at their tokens."""

    def forward(self, x):
        weights, ids = self.route(x)
        order = ids.flatten().argsort(stable=True)
        rows = x[order // self.k] * weights.flatten()[order].unsqueeze(-1)
        ends = F.one_hot(ids, self.experts).sum((0, 1)).cumsum(0).tolist()
        done = [self.expert(e, rows[(ends[e - 1] if e else 0) : ends[e]]) for e in range(self.experts)]
        return torch.zeros_like(x).index_add(0, order // self.k, torch.cat(done))


class KeptHits(Mixture):
    """A loop over a mask in which a capacity left out some hits, in the order of all tokens."""

    capacity = 5

    def forward(self, x):
        probs = self.gate(x).softmax(-1)
        hits = F.one_hot(probs.argmax(-1), self.experts)
        mask = (hits * (hits.cumsum(0) <= self.capacity)).unsqueeze(1).permute(2, 1, 0)
        weights, out = probs.amax(-1, keepdim=True), torch.zeros_like(x)
        for hit in (mask.sum((1, 2)) > 0).nonzero():
            slot, token = torch.where(mask[hit].squeeze(0))
            done = self.expert(hit[0], x[token])
            out.index_add_(0, token, done * weights[token, slot, None])
        return out


class MaskNumbers(KeptHits):
    """Expert 1 for what a capacity left, expert 0 for all other entries of the matrix: transformers' NLLB."""

    def forward(self, x):
        probs = self.gate(x).softmax(-1)
        hits = F.one_hot(probs.argmax(-1), self.experts)
        mask = F.one_hot(hits * (hits.cumsum(0) <= self.capacity), self.experts).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for hit in (mask.sum((1, 2)) > 0).nonzero():
            slot, token = torch.where(mask[hit].squeeze(0))
            out.index_add_(0, token, self.expert(hit[0], x[token]) * probs[token, slot, None])
        return out


class TwoClasses(Mixture):
    """Experts that compute nothing behind the others: LongCat's of transformers."""

    def __init__(self, plain=3):
        super().__init__()
        self.plain, self.gate = plain, nn.Linear(WIDTH, self.experts + plain, bias=False)

    def forward(self, x):
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(self.experts + self.plain):
            token, slot = torch.where(ids == e)
            done = self.expert(e, x[token]) if e < self.experts else x[token]
            out = out.index_add(0, token, done * weights[token, slot, None])
        return out


class FirstOfEach(Mixture):
    """Every expert takes no more than so many of its tokens."""

    def forward(self, x):
        weights, ids = self.route(x)
        capacity, out = int(0.7 * x.shape[0] * self.k / self.experts), torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(ids == e)
            token, slot = token[:capacity], slot[:capacity]
            out.index_add_(0, token, self.expert(e, x[token]) * weights[token, slot, None])
        return out


STYLES = {
    "hit_loop": lambda: Model(HitLoop()),
    "host_counts": lambda: Model(HostCounts()),
    "scores_first": lambda: Model(ScoresFirst()),
    "kept_hits": lambda: Model(KeptHits()),
    "mask_numbers": lambda: Model(MaskNumbers()),
    "two_classes": lambda: Model(TwoClasses()),
    "first_of_each": lambda: Model(FirstOfEach()),
}
