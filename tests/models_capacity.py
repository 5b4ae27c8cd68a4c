"""Mixtures with a capacity, written as the papers and the libraries of their time write them: masks,
positions by cumsum, einsums with one-hot tensors.

`CAPACITY[name](**config)` is a small causal language model as those of `tests/models_plain.py`, its mixtures
replaced. Capacities are small: tokens are dropped. `capacity_factor` scales them.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import einsum, nn

from tests import models_plain
from tests.models_plain import EXPERTS, Config


class Stacks(nn.Module):
    """Router and stacked experts with biases."""

    def __init__(self, c: Config, capacity_factor: float):
        super().__init__()
        self.c, self.capacity_factor = c, capacity_factor
        self.router = nn.Linear(c.hidden_size, c.experts)
        self.make_experts()

    def make_experts(self):
        c = self.c
        self.up = nn.Parameter(torch.randn(c.experts, c.hidden_size, c.inner_size) * 0.2)
        self.up_bias = nn.Parameter(torch.randn(c.experts, c.inner_size) * 0.2)
        self.down = nn.Parameter(torch.randn(c.experts, c.inner_size, c.hidden_size) * 0.2)
        self.down_bias = nn.Parameter(torch.randn(c.experts, 1, c.hidden_size) * 0.2)


class Switch(Stacks):
    """Top-1, the pseudo code in the appendix of the Switch paper."""

    def forward(self, x):
        batch, length, hidden = x.shape
        tokens = batch * length
        capacity = int(self.capacity_factor * tokens / self.c.experts)
        x = x.reshape(tokens, hidden)
        probs = self.router(x).softmax(-1)
        expert_gate, expert_index = probs.max(dim=-1)
        expert_mask = F.one_hot(expert_index, self.c.experts)
        aux = (expert_mask.to(probs.dtype).mean(0) * probs.mean(0)).mean() * self.c.experts**2
        position = torch.cumsum(expert_mask, dim=0) * expert_mask - expert_mask
        expert_mask = expert_mask * torch.lt(position, capacity)
        expert_mask_flat = expert_mask.sum(-1)
        expert_gate = expert_gate * expert_mask_flat
        in_expert = F.one_hot((position * expert_mask).sum(-1), capacity)
        combine = (
            expert_gate[:, None, None]
            * expert_mask_flat[:, None, None]
            * F.one_hot(expert_index, self.c.experts)[:, :, None]
            * in_expert[:, None, :]
        )
        dispatch = combine.bool().to(x.dtype)
        inputs = einsum("nec,nh->ech", dispatch, x)
        inner = F.relu(torch.bmm(inputs, self.up) + self.up_bias[:, None])
        outputs = torch.baddbmm(self.down_bias, inner, self.down)
        return einsum("nec,ech->nh", combine, outputs).view(batch, length, hidden), aux


def top2gating(logits, capacity: int):
    """Of DeepSpeed, whose lines follow GShard's algorithm 1: (aux loss, combine weights [s,e,c], dispatch
    mask)."""
    gates = F.softmax(logits, dim=1)
    num_experts = gates.shape[1]
    indices1_s = torch.argmax(gates, dim=1)
    mask1 = F.one_hot(indices1_s, num_classes=num_experts)
    logits_except1 = logits.masked_fill(mask1.bool(), float("-inf"))
    indices2_s = torch.argmax(logits_except1, dim=1)
    mask2 = F.one_hot(indices2_s, num_classes=num_experts)
    locations1 = torch.cumsum(mask1, dim=0) - 1
    locations2 = torch.cumsum(mask2, dim=0) - 1
    locations2 += torch.sum(mask1, dim=0, keepdim=True)  # second choices queue after all first choices
    me = torch.mean(gates, dim=0)
    ce = torch.mean(mask1.to(gates.dtype), dim=0)
    l_aux = torch.mean(me * ce) * num_experts * num_experts
    mask1 *= torch.lt(locations1, capacity)
    mask2 *= torch.lt(locations2, capacity)
    locations1_s = torch.sum(locations1 * mask1, dim=1)
    locations2_s = torch.sum(locations2 * mask2, dim=1)
    mask1_float = mask1.to(gates.dtype)
    mask2_float = mask2.to(gates.dtype)
    gates1_s = einsum("se,se->s", gates, mask1_float)
    gates2_s = einsum("se,se->s", gates, mask2_float)
    denom_s = gates1_s + gates2_s
    denom_s = torch.clamp(denom_s, min=torch.finfo(denom_s.dtype).eps)
    gates1_s /= denom_s
    gates2_s /= denom_s
    gates1 = einsum("s,se->se", gates1_s, mask1_float)
    gates2 = einsum("s,se->se", gates2_s, mask2_float)
    locations1_sc = F.one_hot(locations1_s, num_classes=capacity).to(gates.dtype)
    locations2_sc = F.one_hot(locations2_s, num_classes=capacity).to(gates.dtype)
    combine1_sec = einsum("se,sc->sec", gates1, locations1_sc)
    combine2_sec = einsum("se,sc->sec", gates2, locations2_sc)
    combine_weights = combine1_sec + combine2_sec
    return l_aux, combine_weights, combine_weights.bool()


class GShard(Stacks):
    """Top-2 over all tokens of the batch."""

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        capacity = math.ceil(flat.shape[0] / self.c.experts * 2 * self.capacity_factor)
        aux, combine_weights, dispatch_mask = top2gating(self.router(flat), capacity)
        inputs = einsum("sec,sm->ecm", dispatch_mask.type_as(flat), flat)
        hidden = F.gelu(einsum("ecm,emf->ecf", inputs, self.up) + self.up_bias.unsqueeze(1))
        outputs = einsum("ecf,efm->ecm", hidden, self.down) + self.down_bias
        return einsum("sec,ecm->sm", combine_weights.type_as(flat), outputs).reshape(x.shape), aux


class Grouped(Stacks):
    """A sequence is a group with a capacity of its own; masks by comparison; positions beyond it have no slot
    at all."""

    def forward(self, x):
        capacity = max(int(self.capacity_factor * x.shape[1] // self.c.experts), 1)
        probs = self.router(x).softmax(-1)  # g s e
        experts = torch.arange(self.c.experts, device=x.device)
        gate1, index1 = probs.max(-1)
        mask1 = index1.unsqueeze(-1) == experts
        gate2, index2 = probs.masked_fill(mask1, 0.0).max(-1)
        mask2 = index2.unsqueeze(-1) == experts
        place1 = mask1.cumsum(1) - mask1.long()
        place2 = mask2.cumsum(1) - mask2.long() + mask1.sum(1, keepdim=True)
        slots = torch.arange(capacity, device=x.device)
        weights = 0
        for gate, mask, place in ((gate1, mask1, place1), (gate2, mask2, place2)):
            slot = (place * mask).sum(-1, keepdim=True) == slots  # g s c
            weights = weights + einsum(
                "gs,gse,gsc->gsec", gate / (gate1 + gate2), mask.to(gate.dtype), slot.to(gate.dtype)
            )
        inputs = einsum("gsec,gsm->egcm", (weights > 0).to(x.dtype), x)
        hidden = F.silu(einsum("egcm,emf->egcf", inputs, self.up) + self.up_bias[:, None, None])
        outputs = einsum("egcf,efm->egcm", hidden, self.down) + self.down_bias.unsqueeze(1)
        return einsum("gsec,egcm->gsm", weights, outputs), (
            mask1.to(probs.dtype).mean((0, 1)) * probs.mean((0, 1))
        ).sum()


class Modules(Stacks):
    """As GShard; the experts are modules, each on its chunk, put together again."""

    def make_experts(self):
        self.experts = nn.ModuleList(EXPERTS[self.c.expert](self.c) for _ in range(self.c.experts))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        capacity = math.ceil(flat.shape[0] / self.c.experts * 2 * self.capacity_factor)
        aux, combine_weights, dispatch_mask = top2gating(self.router(flat), capacity)
        inputs = einsum("sec,sm->ecm", dispatch_mask.type_as(flat), flat)
        outputs = [expert(chunk) for expert, chunk in zip(self.experts, inputs.chunk(self.c.experts, dim=0))]
        return einsum("sec,ecm->sm", combine_weights.type_as(flat), torch.cat(outputs, dim=0)).reshape(
            x.shape
        ), aux


class Ranked(Stacks):
    """Top-k; one running sum over (choice, token); matrix products in place of einsums; experts in a loop
    over slices."""

    def forward(self, x):
        batch, length, hidden = x.shape
        tokens, k, experts = batch * length, self.c.top_k, self.c.experts
        capacity = math.floor(k * self.capacity_factor * tokens / experts)
        capacity += capacity % 2
        logits = self.router(x)
        top, ids = logits.topk(k, dim=-1)
        probs = (
            torch.full_like(logits, float("-inf")).scatter_(-1, ids, top).softmax(-1).view(tokens, experts)
        )
        mask = F.one_hot(ids, experts).view(tokens, k, experts).permute(1, 0, 2)
        rank = (mask.reshape(k * tokens, experts).cumsum(dim=0) - 1).reshape(k, tokens, experts)
        mask = mask * torch.lt(rank, capacity)
        used = mask.sum(dim=(0, 1))
        rank = torch.sum(mask * rank, dim=-1)
        weights = (mask * probs[None]).unsqueeze(3) * F.one_hot(rank, num_classes=capacity).unsqueeze(2)
        weights = weights.sum(dim=0)
        inputs = weights.bool().permute(1, 2, 0).type_as(x) @ x.view(tokens, hidden)
        outputs = []
        for e in range(experts):
            inner = F.gelu(inputs[e] @ self.up[e] + self.up_bias[e])
            outputs.append(inner @ self.down[e] + self.down_bias[e])
        outputs = torch.stack(outputs)
        y = weights.view(tokens, -1).type_as(x) @ outputs.view(-1, hidden)
        return y.view(batch, length, hidden), (probs.mean(0) * used.to(probs.dtype)).sum() / tokens


class Top1(Stacks):
    """Top-1 in three ways to say who is kept: below, `dispatch` makes [n,e,c] of the mask and the chosen
    expert's score."""

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        capacity = int(self.capacity_factor * flat.shape[0] / self.c.experts)
        probs = self.router(flat).softmax(-1)
        gate, index = self.choose(probs)
        mask = F.one_hot(index, self.c.experts)
        dispatch = self.dispatch(mask, capacity).to(x.dtype)
        inputs = einsum("nh,nec->ech", flat, dispatch)
        outputs = (
            torch.bmm(F.relu(torch.bmm(inputs, self.up) + self.up_bias[:, None]), self.down) + self.down_bias
        )
        y = einsum("ech,nec->nh", outputs, dispatch * gate[:, None, None])
        return y.reshape(x.shape), self.c.experts * (mask.to(probs.dtype).mean(0) * probs.mean(0)).sum()

    def choose(self, probs):
        return probs.max(-1)


class Signed(Top1):
    """A place is -1 at the experts that were not chosen, and who has a place from 0 to the capacity is
    kept."""

    def dispatch(self, mask, capacity):
        place = mask.cumsum(0) * mask - 1
        keep = (place < capacity) & (place >= 0)
        slot = F.one_hot((place * keep).sum(-1), capacity)
        return keep.unsqueeze(-1) * slot.unsqueeze(1)


class Compared(Top1):
    """The same place, compared with all slots: -1 is none."""

    def choose(self, probs):
        index = probs.argmax(-1)
        return probs.gather(1, index[:, None])[:, 0], index

    def dispatch(self, mask, capacity):
        place = mask.cumsum(0) * mask
        return (place[..., None] - 1) == torch.arange(capacity, device=mask.device)


class Selected(Top1):
    """DeepSpeed's top1gating; a top-k of one, of which the first is taken."""

    def choose(self, probs):
        gate, index = probs.topk(1, -1)
        return gate[:, 0], index[:, 0]

    def dispatch(self, mask, capacity):
        locations = torch.cumsum(mask, 0) - 1
        mask = mask * torch.lt(locations, capacity)
        slot = F.one_hot(torch.sum(locations * mask, dim=1), capacity)
        return einsum("se,sc->sec", mask, slot)


class Marked(Top1):
    """-1 is the place of who has none, and the class before the first slot is left out."""

    def dispatch(self, mask, capacity):
        place = mask.cumsum(0) - 1
        place = torch.where((mask > 0) & (place < capacity), place, -1)
        return F.one_hot(place + 1, capacity + 1)[..., 1:]


class FromOne(Top1):
    """Slots are counted from 1, and 0 is none; whoever is too late stands in a slot behind the last."""

    def dispatch(self, mask, capacity):
        place = (mask.cumsum(0) * mask).amax(-1).clamp(max=capacity + 1)
        return mask.unsqueeze(-1) * F.one_hot(place, capacity + 2)[:, None, 1:-1]


def first_classes(numbers, count):
    """One-hot of numbers of which some are beyond the classes that are wanted."""
    classes = max(numbers.max() + 1, count)
    return F.one_hot(numbers, classes)[..., :count]


def places_before(mask):
    """How many tokens of its sequence came before a token, by expert."""
    return F.pad(mask, (0, 0, 1, 0)).cumsum(-2)[:, :-1]


class Padded(Stacks):
    """Top-2, a fixed capacity per sequence; masks of floats, a second expert only for tokens that want it."""

    wants = staticmethod(lambda share: share > 0.3)

    def forward(self, x):
        experts, capacity = self.c.experts, int(self.capacity_factor)
        probs = self.router(x).softmax(-1)
        gates, masks = [], []
        left = probs
        for _ in range(2):
            gate, index = (found[..., 0] for found in left.topk(1, -1))
            gates.append(gate)
            masks.append(F.one_hot(index, experts).to(x.dtype))
            left = left * (1.0 - masks[-1])
        share = gates[1] / (gates[0] + gates[1])
        aux = (masks[0].mean(1) * probs.mean(1)).mean() * experts
        hits = list(masks)
        masks[1] = masks[1] * self.wants(share).to(x.dtype).unsqueeze(-1)
        before, each = 0.0, []
        for n, mask in enumerate(masks):
            place = (places_before(mask) + before) * mask
            mask = mask * (place < float(capacity)).to(x.dtype)
            before = before + mask.sum(1, keepdim=True)
            gate = (1 - share, share)[n] * mask.sum(-1)
            slot = first_classes(place.sum(-1).long(), capacity)
            kept = gate[..., None, None] * mask.sum(-1)[..., None, None]
            each.append(kept * hits[n][..., None] * slot[..., None, :])
        weights = each[0] + each[1]
        rows = einsum("bnd,bnec->ebcd", x, weights.bool().to(x.dtype))
        shape = rows.shape
        rows = rows.reshape(experts, -1, shape[-1])
        inner = F.relu(einsum("...nd,...dh->...nh", rows, self.up) + self.up_bias[:, None])
        rows = (einsum("...nh,...hd->...nd", inner, self.down) + self.down_bias).reshape(shape)
        return einsum("ebcd,bnec->bnd", rows, weights), aux


class AtRandom(Padded):
    """The second expert at random, the more often the larger its share."""

    wants = staticmethod(lambda share: torch.zeros_like(share).uniform_(0.0, 1.0) < share / 0.6)


class Straight(Stacks):
    """Choices side by side in one tensor, handled one by one in it; what dispatches passes a gradient to what
    combines."""

    passed = staticmethod(lambda weights: weights)

    @staticmethod
    def wants(shares):
        return shares > 0.25

    def make_experts(self):
        self.experts = nn.ModuleList(EXPERTS[self.c.expert](self.c) for _ in range(self.c.experts))

    def forward(self, x):
        length, experts, choices = x.shape[1], self.c.experts, 3
        capacity = max(min(length, int(length * self.capacity_factor / experts)), 2)
        probs = self.router(x).softmax(-1)
        gates, ids = probs.topk(choices, -1)
        gates, ids = gates.permute(2, 0, 1), ids.permute(2, 0, 1)
        hits = F.one_hot(ids, experts)
        mask = hits.to(x.dtype)
        gates = gates / gates.sum(0, keepdim=True)
        wanted = self.wants(gates)
        wanted[0] = True
        mask *= wanted.to(x.dtype).unsqueeze(-1)
        aux = (mask[0].mean(1) * probs.mean(1)).mean() * experts
        before = F.pad(mask, (0, 0, 1, -1)).cumsum(-2)
        places, earlier = [], 0.0
        for n in range(choices):
            place = (before[n] + earlier) * mask[n]
            mask[n] *= (place < float(capacity)).to(x.dtype)
            earlier = mask[n].sum(-2, keepdim=True) + earlier
            places.append(place.sum(-1))
        kept = mask.sum(-1)
        weights = (gates * kept)[..., None, None] * hits[..., None]
        weights = (weights * first_classes(torch.stack(places).long(), capacity)[..., None, :]).sum(0)
        through = self.passed(weights)
        dispatch = weights.bool().to(x.dtype) + through - through.detach()
        rows = einsum("bnd,bnec->becd", x, dispatch).permute(1, 0, 2, 3)
        done = torch.stack([expert(part) for expert, part in zip(self.experts, rows)])
        return einsum("ebcd,bnec->bnd", done, weights), aux


class Nested(Stacks):
    """A mixture of mixtures: an expert of the outer one routes what stands in its slots among its own."""

    outer = 2

    def make_experts(self):
        c, outer = self.c, self.outer
        self.outer_gate = nn.Linear(c.hidden_size, outer)
        self.table = nn.Parameter(torch.randn(outer, c.experts, c.hidden_size) * 0.2)
        self.up = nn.Parameter(torch.randn(outer, c.experts, c.hidden_size, c.inner_size) * 0.2)
        self.up_bias = nn.Parameter(torch.randn(outer, c.experts, 1, c.inner_size) * 0.2)
        self.down = nn.Parameter(torch.randn(outer, c.experts, c.inner_size, c.hidden_size) * 0.2)

    def slots(self, probs, share, there=1.0):
        """Weights [.., n, e, c] of a top-1 choice among those that are there."""
        length, experts = probs.shape[-2:]
        capacity = max(int(length * share * self.capacity_factor / experts), 2)
        gate, index = probs.max(-1)
        mask = F.one_hot(index, experts).to(probs.dtype) * there
        place = (mask.cumsum(-2) - mask) * mask
        mask = mask * (place < capacity).to(probs.dtype)
        slot = first_classes(place.sum(-1).long(), capacity).to(probs.dtype)
        return (gate * mask.sum(-1))[..., None, None] * mask[..., None] * slot[..., None, :]

    def forward(self, x):
        c, dtype = self.c, x.dtype
        outer_probs = self.outer_gate(x).softmax(-1)
        outer = self.slots(outer_probs, 1.0)
        rows = einsum("bnd,bnec->ebcd", x, outer.bool().to(dtype))
        there = (outer.sum(1).permute(1, 0, 2) > 0).to(dtype).unsqueeze(-1)
        scores = einsum("ebnd,efd->ebnf", rows, self.router.weight + self.table) + self.router.bias
        probs = scores.softmax(-1)
        inner = self.slots(probs, 1.5, there)
        rows = einsum("ebnd,ebnfc->efbcd", rows, inner.bool().to(dtype))
        shape = rows.shape
        rows = rows.reshape(self.outer, c.experts, -1, shape[-1])
        rows = F.gelu(einsum("...nd,...dh->...nh", rows, self.up) + self.up_bias)
        rows = einsum("...nh,...hd->...nd", rows, self.down).reshape(shape)
        rows = einsum("efbcd,ebnfc->ebnd", rows, inner)
        return einsum("ebcd,bnec->bnd", rows, outer), outer_probs.square().mean()


LAYERS = {
    "switch": Switch,
    "gshard": GShard,
    "grouped": Grouped,
    "modules": Modules,
    "ranked": Ranked,
    "signed": Signed,
    "compared": Compared,
    "selected": Selected,
    "marked": Marked,
    "from_one": FromOne,
    "padded": Padded,
    "at_random": AtRandom,
    "straight": Straight,
    "nested": Nested,
}
FACTORS = {
    "switch": 1.25,
    "gshard": 0.6,
    "grouped": 0.75,
    "modules": 0.6,
    "ranked": 0.7,
    "signed": 1.25,
    "compared": 1.25,
    "selected": 1.25,
    "marked": 1.25,
    "from_one": 1.25,
    "padded": 2,
    "at_random": 2,
    "straight": 1.5,
    "nested": 1.0,
}


def make(layer: str, capacity_factor: float | None = None, tied: bool = False, **config):
    """`tied`: all layers have one mixture."""
    model = models_plain.make(**config)
    torch.manual_seed(1)
    for block in model.blocks:
        made = LAYERS[layer](model.c, FACTORS[layer] if capacity_factor is None else capacity_factor)
        block.moe = model.blocks[0].moe if tied and block is not model.blocks[0] else made
    return model


CAPACITY = {f"capacity_{name}": partial(make, name) for name in LAYERS}
