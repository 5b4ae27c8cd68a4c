"""Mixtures with a capacity that write tokens into slots at addresses and read them back there.

`SCATTER[name](**config)` is a small causal language model as those of `tests/models_plain.py`, its mixtures
replaced. Capacities are small: tokens are dropped, but for "roomy".
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from tests.models_capacity import Stacks
from tests.models_plain import Config, with_mixtures


class Scatter(Stacks):
    """Top-k, its weights, and experts that are stacked, with biases: an empty slot is not zero."""

    def __init__(self, c: Config, capacity_factor: float = 0.6):
        super().__init__(c, capacity_factor)

    def capacity(self, tokens, k):
        return int(self.capacity_factor * k * tokens / self.c.experts) + 1

    def run(self, rows):
        return torch.bmm(F.silu(torch.bmm(rows, self.up) + self.up_bias[:, None]), self.down) + self.down_bias

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        probs = self.router(flat).softmax(-1)
        w, ids = probs.topk(self.c.top_k, dim=-1)
        y = self.mixture(flat, w, ids, self.capacity(flat.shape[0], self.c.top_k))
        return y.view_as(x), probs.square().mean()

    def mixture(self, x, w, ids, capacity):
        raise NotImplementedError


class Kept(Scatter):
    """What is kept is written at [expert, place], and what was written is read, weighed and added."""

    def mixture(self, x, w, ids, capacity):
        experts, k = self.c.experts, ids.shape[1]
        ids, token = ids.flatten(), torch.arange(x.shape[0], device=x.device).repeat_interleave(k)
        place = (F.one_hot(ids, experts).cumsum(0) - 1).gather(1, ids[:, None]).squeeze(1)
        keep = place < capacity
        rows = x.new_zeros(experts, capacity, x.shape[1])
        rows[ids[keep], place[keep]] = x[token[keep]]
        done = self.run(rows)[ids[keep], place[keep]] * w.flatten()[keep].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, token[keep], done)


class Trash(Scatter):
    """First choices before all second ones; who is dropped stands in a row behind the last, which is zero
    when it is read."""

    def mixture(self, x, w, ids, capacity):
        experts, (tokens, k) = self.c.experts, ids.shape
        ids = ids.t().reshape(-1)
        mask = F.one_hot(ids, experts)
        place = ((mask.cumsum(0) - 1) * mask).sum(-1)
        address = torch.where(place < capacity, ids * capacity + place, experts * capacity)
        rows = x.new_zeros(experts * capacity + 1, x.shape[1]).index_copy(0, address, x.repeat(k, 1))
        done = self.run(rows[:-1].view(experts, capacity, -1)).flatten(0, 1)
        done = torch.cat([done, done.new_zeros(1, x.shape[1])])[address]
        return (done.view(k, tokens, -1) * w.t().unsqueeze(-1)).sum(0)


class Added(Scatter):
    """Tutel's: one choice after the other is added to the same slots, zeros where it was dropped."""

    def mixture(self, x, w, ids, capacity):
        experts, before, rows = self.c.experts, 0, x.new_zeros(self.c.experts * capacity, x.shape[1])
        found = []
        for choice in range(ids.shape[1]):
            mask = F.one_hot(ids[:, choice], experts)
            place = ((mask.cumsum(0) - 1 + before) * mask).sum(-1)
            before = before + mask.sum(0, keepdim=True)
            keep = place < capacity
            address = (ids[:, choice] * capacity + place) * keep
            rows = rows.index_add(0, address, x * keep.unsqueeze(-1).to(x.dtype))
            found.append((address, w[:, choice] * keep.to(w.dtype)))
        done = self.run(rows.view(experts, capacity, -1)).view(-1, x.shape[1])
        return sum(done[address] * weight.unsqueeze(-1) for address, weight in found)


class Overflow(Scatter):
    """One slot more than there are, for those that are dropped; it is cut off."""

    def mixture(self, x, w, ids, capacity):
        mask = F.one_hot(ids, self.c.experts)
        flat = mask.flatten(0, 1)
        place = ((flat.cumsum(0) - flat) * flat).sum(-1).view(ids.shape)
        rows = x.new_zeros(self.c.experts, capacity + 1, x.shape[1])
        rows[ids, place.clamp(max=capacity)] = x.unsqueeze(1).expand(-1, ids.shape[1], -1)
        done = self.run(rows[:, :capacity])[ids, place.clamp(max=capacity - 1)]
        return torch.einsum("nk,nkh->nh", w * (place < capacity), done)


class LastSlot(Scatter):
    """The same, and the experts compute on it, too."""

    def mixture(self, x, w, ids, capacity):
        mask = F.one_hot(ids, self.c.experts)
        flat = mask.flatten(0, 1)
        place = ((flat.cumsum(0) - flat) * flat).sum(-1).view(ids.shape).clamp(max=capacity)
        rows = x.new_zeros(self.c.experts, capacity + 1, x.shape[1])
        rows[ids, place] = x.unsqueeze(1).expand(-1, ids.shape[1], -1)
        done = self.run(rows)[ids, place]
        return torch.where((place < capacity).unsqueeze(-1), done * w.unsqueeze(-1), 0).sum(1)


class Roomy(Scatter):
    """Top-1, and as many slots as tokens: nothing is dropped. Experts one by one."""

    def capacity(self, tokens, k):
        return tokens

    def mixture(self, x, w, ids, capacity):
        ids, w = ids[:, 0], w[:, :1]
        mask = F.one_hot(ids, self.c.experts)
        address = ids * capacity + mask.cumsum(0).gather(1, ids.unsqueeze(-1)).squeeze(-1) - 1
        at = address.unsqueeze(-1).expand(-1, x.shape[1])
        rows = x.new_zeros(self.c.experts * capacity, x.shape[1]).scatter(0, at, x)
        rows = rows.view(self.c.experts, capacity, -1)
        done = torch.empty_like(rows)
        for e in range(self.c.experts):
            done[e] = F.relu(rows[e] @ self.up[e]) @ self.down[e]
        return done.view(-1, x.shape[1]).gather(0, at) * w


class Columns(Scatter):
    """Places of all choices at once, and then one choice after the other."""

    def mixture(self, x, w, ids, capacity):
        mask, done = F.one_hot(ids, self.c.experts), 0
        place = (mask.view(-1, self.c.experts).cumsum(0).view_as(mask) * mask).sum(-1) - 1
        keep = place < capacity
        w = w * keep
        w = w / w.sum(-1, keepdim=True).clamp(min=1e-9)
        rows = x.new_zeros(self.c.experts, capacity, x.shape[1])
        for k in range(ids.shape[1]):
            kept = keep[:, k]
            rows[ids[kept, k], place[kept, k]] = x[kept]
        rows = self.run(rows)
        for k in range(ids.shape[1]):
            done = done + w[:, k, None] * rows[ids[:, k], place[:, k].clamp(max=capacity - 1)]
        return done


class Searched(Scatter):
    """As Kept, of what a search found."""

    def mixture(self, x, w, ids, capacity):
        mask = F.one_hot(ids, self.c.experts)
        flat = mask.view(-1, self.c.experts)
        place = ((flat.cumsum(0) - 1) * flat).sum(-1).view_as(ids)
        token, choice = torch.where(place < capacity)
        address = ids[token, choice] * capacity + place[token, choice]
        rows = x.new_zeros(self.c.experts * capacity, x.shape[1]).index_add(0, address, x[token])
        done = self.run(rows.view(self.c.experts, capacity, -1)).view(-1, x.shape[1])
        done = done.index_select(0, address) * w[token, choice].unsqueeze(1)
        return torch.zeros_like(x).index_add(0, token, done)


class Sorted(Scatter):
    """Places are those in the runs of a stable sort, and all is computed in its order."""

    stable = True

    def mixture(self, x, w, ids, capacity):
        experts, k = self.c.experts, ids.shape[1]
        counts = torch.bincount(ids.flatten(), minlength=experts)
        ids, order = ids.flatten().sort(stable=self.stable)
        place = torch.arange(ids.shape[0], device=x.device) - (counts.cumsum(0) - counts)[ids]
        keep = place < capacity
        address, token = (ids * capacity + place)[keep], (order // k)[keep]
        rows = x.new_zeros(experts * capacity, x.shape[1]).index_copy(0, address, x[token])
        done = self.run(rows.view(experts, capacity, -1)).view(-1, x.shape[1])
        return torch.zeros_like(x).index_add(0, token, done[address] * w.flatten()[order[keep]].unsqueeze(-1))


class SortedTrash(Scatter):
    """The same, of all assignments; what is dropped is written behind the last row and read as zero."""

    def mixture(self, x, w, ids, capacity):
        experts, k = self.c.experts, ids.shape[1]
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        ids, ends = flat[order], F.one_hot(flat, experts).sum(0).cumsum(0)
        place = torch.arange(ids.shape[0], device=x.device) - F.pad(ends[:-1], (1, 0))[ids]
        address = torch.where(place < capacity, ids * capacity + place, experts * capacity)
        rows = x.new_zeros(experts * capacity + 1, x.shape[1])
        rows[address] = x[order // k]
        done = self.run(rows[: experts * capacity].view(experts, capacity, -1)).flatten(0, 1)
        done = F.pad(done, (0, 0, 0, 1))[address]
        back = torch.zeros_like(done).index_copy(0, order, done)
        return (back.view(-1, k, x.shape[1]) * w.unsqueeze(-1)).sum(1)


LAYERS = {
    "kept": Kept,
    "trash": Trash,
    "added": Added,
    "overflow": Overflow,
    "last_slot": LastSlot,
    "roomy": Roomy,
    "columns": Columns,
    "searched": Searched,
    "sorted": Sorted,
    "sorted_trash": SortedTrash,
}
SCATTER = {f"scatter_{name}": partial(with_mixtures, layer) for name, layer in LAYERS.items()}
