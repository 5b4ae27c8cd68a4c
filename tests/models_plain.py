"""Tiny mixture-of-experts language models in plain PyTorch, the way people write them by hand. No library
behind them.

`PLAIN[name](**config)` is a model with random weights from a fixed seed; the names say how the mixture is
written. `forward(input_ids, labels=None)` gives an `Output` with loss and logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    hidden_size: int = 32
    heads: int = 4
    layers: int = 2
    vocab_size: int = 64
    inner_size: int = 48
    experts: int = 4
    top_k: int = 2
    expert: str = "swiglu"
    moe: str = "index_add"
    norm: str = "rms"
    positions: bool = False
    aux: float = 0.01
    dropout: float = 0.0
    shared: bool = False
    balanced: bool = False
    sliced: bool = False  # the loss of all tokens but the last: no single token then, and a second export
    draws: str = ""  # what is random in the router: see `MoE.route`


@dataclass
class Output:
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


torch.utils._pytree.register_dataclass(Output, serialized_type_name="tests.models_plain.Output")


class SwiGLU(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.w1 = nn.Linear(c.hidden_size, c.inner_size, bias=False)
        self.w2 = nn.Linear(c.inner_size, c.hidden_size, bias=False)
        self.w3 = nn.Linear(c.hidden_size, c.inner_size, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class GELU(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.up = nn.Linear(c.hidden_size, c.inner_size)
        self.down = nn.Linear(c.inner_size, c.hidden_size)
        self.dropout, self.noisy = nn.Dropout(c.dropout), c.draws == "expert"

    def forward(self, x):
        h = F.gelu(self.up(x))
        if self.noisy:
            h = h * (1 + torch.randn_like(h))
        return self.dropout(self.down(h))


class NormedGLU(nn.Module):
    """Norms and a scale of its own in every expert, gate and up in one matrix."""

    def __init__(self, c: Config):
        super().__init__()
        self.norm = nn.LayerNorm(c.hidden_size)
        self.gate_up = nn.Linear(c.hidden_size, 2 * c.inner_size)
        self.inner_norm = nn.RMSNorm(c.inner_size)
        self.down = nn.Linear(c.inner_size, c.hidden_size)
        self.scale = nn.Parameter(torch.ones(c.hidden_size))
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        return self.down(self.inner_norm(torch.tanh(gate / self.temperature) * up)) * self.scale


EXPERTS = {"swiglu": SwiGLU, "gelu": GELU, "normed": NormedGLU}


class MoE(nn.Module):
    """Router, top-k weights that sum to one, Switch's balance loss; `mixture` is what the subclasses write
    differently."""

    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.router = nn.Linear(c.hidden_size, c.experts)
        self.make_experts()
        if c.shared:
            self.shared = SwiGLU(c)
        if c.balanced:
            self.register_buffer("load", torch.zeros(c.experts))
        if c.draws == "noisy":
            self.noise = nn.Linear(c.hidden_size, c.experts, bias=False)

    def make_experts(self):
        self.experts = nn.ModuleList(EXPERTS[self.c.expert](self.c) for _ in range(self.c.experts))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        probs, chances = self.route(flat)
        if chances is not None:
            ids = torch.multinomial(chances, self.c.top_k)
            w = probs.gather(1, ids)
        elif (
            self.c.balanced
        ):  # experts that were chosen often are chosen less; the count is advanced by every forward
            ids = (probs - 0.001 * self.load).topk(self.c.top_k, dim=-1).indices
            w = probs.gather(1, ids)
            self.load.add_(F.one_hot(ids, self.c.experts).sum((0, 1)).to(self.load.dtype))
        else:
            w, ids = probs.topk(self.c.top_k, dim=-1)
        if self.c.draws == "second":  # GShard: the second expert as often as its weight says
            taken = torch.rand_like(w[:, 1:]) < 2 * w[:, 1:]
            w = torch.cat([w[:, :1], w[:, 1:] * taken], 1)
        if self.c.top_k > 1:
            w = w / w.sum(-1, keepdim=True)
        share = F.one_hot(ids, self.c.experts).sum(1).to(probs.dtype).mean(0)
        aux = self.c.experts * (share * probs.mean(0)).sum() / self.c.top_k
        out = self.mixture(flat, probs, w, ids)
        if self.c.shared:
            out = out + self.shared(flat)
        return out.view_as(x), aux

    def route(self, x):
        """Probabilities, and those that experts are drawn from, if they are."""
        if self.c.draws == "jitter":
            x = x * torch.empty_like(x).uniform_(0.8, 1.2)
        logits = self.router(x)
        if self.c.draws == "noisy":
            logits = logits + torch.randn_like(logits) * F.softplus(self.noise(x))
        if self.c.draws == "gumbel":
            logits = logits - torch.empty_like(logits).exponential_().log()
        probs = logits.softmax(-1)
        return probs, probs.detach() if self.c.draws == "multinomial" else None

    def mixture(self, x, probs, w, ids):
        raise NotImplementedError


class IndexAdd(MoE):
    def mixture(self, x, probs, w, ids):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return out


class IndexAddTest(MoE):
    def mixture(self, x, probs, w, ids):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() == 0:
                continue
            out.index_add_(0, token, expert(x[token]) * w[token, slot].unsqueeze(-1))
        return out


class Nonzero(MoE):
    def mixture(self, x, probs, w, ids):
        out = x.new_zeros(x.shape)
        for e, expert in enumerate(self.experts):
            found = (ids == e).nonzero()
            if len(found) > 0:
                token, slot = found[:, 0], found[:, 1]
                out = out.index_add(0, token, w[token, slot].view(-1, 1) * expert(x[token]))
        return out


class SetItem(MoE):
    def mixture(self, x, probs, w, ids):
        out = torch.zeros_like(x)
        masks = (ids.unsqueeze(-1) == torch.arange(self.c.experts, device=ids.device)).permute(2, 0, 1)
        for mask, expert in zip(masks, self.experts):
            token, slot = torch.where(mask)
            out[token] += w[token, slot, None] * expert(x[token])
        return out


class OneHot(MoE):
    def mixture(self, x, probs, w, ids):
        out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        mask = F.one_hot(ids, self.c.experts).permute(2, 1, 0)
        for e in range(self.c.experts):
            slot, token = torch.where(mask[e])
            if token.shape[0] == 0:
                continue
            rows = x[None, token].reshape(-1, x.shape[-1])
            out.index_add_(0, token, (self.experts[e](rows) * w[token, slot, None]).to(x.dtype))
        return out


class BooleanMask(MoE):
    """Boolean indices, weights from the full matrix of scores."""

    def mixture(self, x, probs, w, ids):
        gates = torch.zeros_like(probs).scatter(1, ids, w)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(dim=-1)
            if mask.any():
                out[mask] += expert(x[mask]) * gates[mask, e].unsqueeze(1)
        return out


class ScoreColumn(MoE):
    """Weights are the router's own scores, `probs[token, e]`."""

    def mixture(self, x, probs, w, ids):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, _ = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * probs[token, e, None])
        return out


class MaskedAdd(MoE):
    """Every expert on every token, weighed by zero where it was not chosen."""

    def mixture(self, x, probs, w, ids):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * (w * (ids == e)).sum(-1, keepdim=True)
        return out


class GateColumn(MoE):
    """As MaskedAdd, with a matrix of gates, starting from something else than zero."""

    def mixture(self, x, probs, w, ids):
        mask = torch.zeros_like(probs, dtype=torch.bool).scatter(1, ids, True)
        gates = (probs * mask) / (probs * mask).sum(-1, keepdim=True)
        out = 0.5 * x
        for e, expert in enumerate(self.experts):
            out = out + gates[:, e : e + 1] * expert(x)
        return out


class Sum(MoE):
    """A sum over a generator; masked_fill."""

    def mixture(self, x, probs, w, ids):
        return sum(
            expert(x) * w.masked_fill(ids != e, 0).sum(1, keepdim=True)
            for e, expert in enumerate(self.experts)
        )


class Stacked(MoE):
    """Parameters of all experts in one tensor, indexed in the loop."""

    def make_experts(self):
        c = self.c
        self.w1 = nn.Parameter(torch.randn(c.experts, c.inner_size, c.hidden_size) * 0.1)
        self.w3 = nn.Parameter(torch.randn(c.experts, c.hidden_size, c.inner_size) * 0.1)
        self.w2 = nn.Parameter(torch.randn(c.experts, c.inner_size, c.hidden_size) * 0.1)
        self.bias = nn.Parameter(torch.randn(c.experts, c.hidden_size) * 0.1)

    def mixture(self, x, probs, w, ids):
        out = torch.zeros_like(x)
        for e in range(self.c.experts):
            token, slot = torch.where(ids == e)
            rows = x[token]
            rows = F.silu(F.linear(rows, self.w1[e])) * (rows @ self.w3[e])
            rows = F.linear(rows, self.w2[e].t(), self.bias[e])
            out.index_add_(0, token, rows * w[token, slot, None])
        return out


class Unflattened(MoE):
    """(batch, sequence, hidden) throughout; gates from masked logits."""

    def forward(self, x):
        logits = self.router(x)
        top, ids = logits.topk(self.c.top_k, dim=-1)
        gates = torch.full_like(logits, float("-inf")).scatter(-1, ids, top).softmax(-1)
        out, flat, flat_gates = torch.zeros_like(x), x.view(-1, x.shape[-1]), gates.view(-1, self.c.experts)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(dim=-1)
            flat_mask = mask.view(-1)
            if flat_mask.any():
                y = expert(flat[flat_mask]) * flat_gates[flat_mask, e].unsqueeze(1)
                out[mask] += y.squeeze(1)
        return out, gates.mean((0, 1)).square().sum()


class UnflattenedMask(MoE):
    """(batch, sequence, hidden), every expert on every token."""

    def forward(self, x):
        w, ids = self.router(x).softmax(-1).topk(self.c.top_k, dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * torch.where(ids == e, w, 0.0).sum(-1, keepdim=True)
        return out, w.mean()


class TopOne(MoE):
    """Switch: one expert per token, by argmax."""

    def mixture(self, x, probs, w, ids):
        weight, choice = probs.max(dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token = torch.where(choice == e)[0]
            if token.numel():
                out[token] = out[token] + expert(x[token]) * weight[token].unsqueeze(-1)
        return out


class EarlyWeight(MoE):
    """The weight meets the rows before the last linear, which commutes; unweighted outside."""

    def make_experts(self):
        self.up = nn.ModuleList(
            nn.Linear(self.c.hidden_size, self.c.inner_size) for _ in range(self.c.experts)
        )
        self.down = nn.ModuleList(
            nn.Linear(self.c.inner_size, self.c.hidden_size, bias=False) for _ in range(self.c.experts)
        )

    def mixture(self, x, probs, w, ids):
        out = torch.zeros_like(x)
        for e in range(self.c.experts):
            token, slot = torch.where(ids == e)
            rows = F.relu(self.up[e](x[token])) * w[token, slot, None]
            out.index_add_(0, token, self.down[e](rows) * 2.0)
        return out


MOES = {
    "index_add": IndexAdd,
    "index_add_test": IndexAddTest,
    "nonzero": Nonzero,
    "setitem": SetItem,
    "one_hot": OneHot,
    "boolean": BooleanMask,
    "score_column": ScoreColumn,
    "masked_add": MaskedAdd,
    "gate_column": GateColumn,
    "sum": Sum,
    "stacked": Stacked,
    "unflattened": Unflattened,
    "unflattened_mask": UnflattenedMask,
    "top_one": TopOne,
    "early_weight": EarlyWeight,
}


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.heads = c.heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(c.hidden_size, c.hidden_size, bias=False) for _ in range(4)
        )

    def forward(self, x):
        batch, length, hidden = x.shape
        q, k, v = (
            p(x).view(batch, length, self.heads, hidden // self.heads).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, hidden))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        norm = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[c.norm]
        self.norm1, self.norm2 = norm(c.hidden_size), norm(c.hidden_size)
        self.attention = Attention(c)
        self.moe = MOES[c.moe](c)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        y, aux = self.moe(self.norm2(x))
        return x + y, aux


class PlainMoELM(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        if c.positions:
            self.positions = nn.Embedding(256, c.hidden_size)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.hidden_size)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        if self.c.positions:
            x = x + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        total = 0.0
        for block in self.blocks:
            x, aux = block(x)
            total = total + aux
        logits = self.lm_head(self.norm(x))
        loss = None
        if labels is not None:
            logits_, labels = (
                (logits[:, :-1], labels[:, 1:])
                if self.c.sliced
                else (logits, F.pad(labels, (0, 1), value=-100)[:, 1:])
            )
            loss = F.cross_entropy(logits_.reshape(-1, self.c.vocab_size), labels.reshape(-1))
            loss = loss + self.c.aux * total
        return Output(loss, logits)


def make(**config) -> PlainMoELM:
    torch.manual_seed(0)
    model = PlainMoELM(replace(Config(), **config))
    with torch.no_grad():  # biases and norms start at constants that would hide mistakes
        for p in model.parameters():
            if p.dim() <= 1:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def with_mixtures(layer, **config) -> PlainMoELM:
    """The same model with `layer(config)` as the mixture of every block."""
    model = make(**config)
    torch.manual_seed(1)
    for block in model.blocks:
        block.moe = layer(model.c)
    return model


PLAIN = {
    "plain": partial(make, moe="index_add"),
    "plain_test": partial(make, moe="index_add_test", expert="gelu"),
    "plain_top1": partial(make, moe="index_add_test", top_k=1),
    "plain_setitem": partial(make, moe="setitem", positions=True, sliced=True),
    "plain_boolean": partial(make, moe="boolean", expert="gelu", shared=True),
    "plain_masked": partial(make, moe="masked_add"),
    "plain_masked_gelu": partial(make, moe="masked_add", expert="gelu", norm="layer", positions=True),
    "plain_stacked": partial(make, moe="stacked"),
    "plain_normed": partial(make, moe="index_add", expert="normed", sliced=True),
    "plain_balanced": partial(make, moe="index_add", balanced=True),
    "plain_switch": partial(make, moe="top_one", expert="gelu", top_k=1),
}
