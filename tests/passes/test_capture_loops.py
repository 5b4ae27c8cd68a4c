"""What looks like a loop over experts and is not one is refused, in one line that names the cause and the
model's line."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedfx.errors import CaptureError
from tests.capture.test_models import capture, check, tokens
from tests.marks import slow_but

E = 4


class Block(nn.Module):
    """`mixture(self, x, probs, w, ids)` makes it a mixture of four linears."""

    def __init__(self, mixture, **modules):
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(32, E)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(E))
        self.mixture = mixture
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        x = x.reshape(-1, 32)
        probs = self.router(x).softmax(-1)
        w, ids = probs.topk(2, dim=-1)
        y = self.mixture(self, x, probs, w, ids)
        return {"y": y, "loss": y.square().sum()}


def loop(ids, numbers=range(E)):
    for e in numbers:
        yield e, *torch.where(ids == e)


def missing(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids, range(E - 1)):
        out.index_add_(0, token, m.experts[e](x[token]) * w[token, slot, None])
    return out


def missing_masked(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e in (0, 1, 3):
        out = out + m.experts[e](x) * (w * (ids == e)).sum(-1, keepdim=True)
    return out


def repeated(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids, (0, 1, 1, 2, 3)):
        out.index_add_(0, token, m.experts[e](x[token]) * w[token, slot, None])
    return out


def repeated_last(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids, (0, 1, 2, 3, 3)):
        out.index_add_(0, token, m.experts[e](x[token]) * w[token, slot, None])
    return out


def other_expert(m, x, probs, w, ids):
    """One expert runs on the tokens of another."""
    out = torch.zeros_like(x)
    found = [torch.where(ids == e) for e in range(E)]
    for e in range(E):
        token, slot = found[e]
        rows = x[found[3 - e if e in (1, 2) else e][0]]
        out.index_add_(0, token, m.experts[e](x[token]) * w[token, slot, None] + rows.sum() * 0)
    return out


def crossed(m, x, probs, w, ids):
    sums = [torch.zeros_like(x), torch.zeros_like(x)]
    for e, token, slot in loop(ids):
        sums[e % 2] = sums[e % 2].index_add(0, token, m.experts[e](x[token]) * w[token, slot, None])
    return sums[0] + sums[1]


def structure(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids):
        y = m.experts[e](x[token])
        y = y.relu() if e == 2 else y.sigmoid()
        out.index_add_(0, token, y * w[token, slot, None])
    return out


def constants(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids):
        out.index_add_(0, token, m.experts[e](x[token]) * w[token, slot, None] * (2.0 if e == 1 else 1.0))
    return out


def number(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids):
        out.index_add_(0, token, m.experts[e](x[token] + e) * w[token, slot, None])
    return out


def sequential(m, x, probs, w, ids):
    """Each expert reads what the ones before it added."""
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids):
        out = out.index_add(0, token, m.experts[e](x[token] + out[token]) * w[token, slot, None])
    return out


def read_between(m, x, probs, w, ids):
    out, trail = torch.zeros_like(x), 0.0
    for e, token, slot in loop(ids):
        out = out.index_add(0, token, m.experts[e](x[token]) * w[token, slot, None])
        trail = trail + out.mean()
    return out + trail


def mixes_rows(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids):
        y = m.experts[e](x[token])
        out.index_add_(0, token, (y - y.mean(0)) * w[token, slot, None])
    return out


def softmax_of_rows(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids):
        out.index_add_(0, token, m.experts[e](x[token]).softmax(0) * w[token, slot, None])
    return out


def attention(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids):
        y = m.experts[e](x[token])
        out.index_add_(0, token, (y @ y.t()) @ y * w[token, slot, None])
    return out


def counts(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids):
        out.index_add_(0, token, m.experts[e](x[token]) * w[token, slot, None] / token.shape[0])
    return out


def overwrites(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids):
        out[token] = m.experts[e](x[token]) * w[token, slot, None]
    return out


def unmasked(m, x, probs, w, ids):
    """The weights are not zero where the expert was not chosen."""
    out = torch.zeros_like(x)
    for e in range(E):
        out = out + m.experts[e](x) * (probs[:, e, None] + 0 * (ids == e).sum(-1, keepdim=True))
    return out


def nonlinear_weight(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids):
        out.index_add_(0, token, torch.tanh(m.experts[e](x[token]) * w[token, slot, None]))
    return out


def unproven(m, x, probs, w, ids):
    ids = (probs * 7).long()[:, :2]
    return missing(m, x, probs, w, ids)


def wider_router(m, x, probs, w, ids):
    """The router can choose a fifth expert, which does not exist."""
    w, ids = F.pad(probs, (0, 1)).topk(2, dim=-1)
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids):
        out.index_add_(0, token, m.experts[e](x[token]) * w[token, slot, None])
    return out


def mixtures_inside(m, x, probs, w, ids):
    """Two mixtures of two experts each are the experts of another."""
    out, outer = torch.zeros_like(x), probs[:, :2].argmax(-1)
    for o in range(2):
        (token,) = torch.where(outer == o)
        rows = x[token]
        done, inner = torch.zeros_like(rows), rows[:, :2].argmax(-1)
        for e in range(2):
            (at,) = torch.where(inner == e)
            done.index_add_(0, at, m.experts[2 * o + e](rows[at]))
        out.index_add_(0, token, done * probs[token, o, None])
    return out


def twice_the_same(m, x, probs, w, ids):
    """Drawn with replacement, a token may name an expert twice, and is found once."""
    ids = torch.multinomial(probs, 2, replacement=True)
    out = torch.zeros_like(x)
    for e in range(E):
        mask = (ids == e).any(-1)
        out[mask] += m.experts[e](x[mask]) * probs[mask, e, None]
    return out


def outside(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids):
        out.index_add_(0, token, m.experts[e](x[token]) * w[token, slot, None])
    return out + m.experts[1].weight.mean()


def two_inputs(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids):
        out.index_add_(
            0,
            token,
            (m.experts[e](x[token]) + probs.sum(-1, keepdim=True).expand(-1, 32)[token])
            * w[token, slot, None],
        )
    return out


def half_weighted(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids):
        out.index_add_(0, token, m.experts[e](x[token]) * w[token, slot, None] + x[token])
    return out


def doubled_gate(m, x, probs, w, ids):
    """A gate has the sum of both choices where they are one expert, and more is computed of that sum."""
    ids = ids.gather(1, torch.zeros_like(ids))
    gates = (F.one_hot(ids, E) * w.unsqueeze(-1)).sum(1)
    gates = gates / (1 + gates)
    out = torch.zeros_like(x)
    for e in range(E):
        out = out + m.experts[e](x) * gates[:, e, None]
    return out


def detached_weight(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids):
        out.index_add_(0, token, m.experts[e](x[token]) * w[token, slot, None].detach())
    return out


def detached_gate(m, x, probs, w, ids):
    gate = torch.zeros_like(probs).scatter(1, ids, w).detach()
    out = torch.zeros_like(x)
    for e in range(E):
        out = out + m.experts[e](x) * gate[:, e, None]
    return out


MESSAGES = {
    detached_weight: "a routing weight in aten.detach",
    doubled_gate: "weighed by the sum of both",
    missing: r"\[3\] are never added",
    missing_masked: r"\[2\] are never added",
    repeated: "expert 1 is added 2 times",
    repeated_last: "also used outside the loop",
    other_expert: r"depends on experts \[1, 2\]",
    crossed: "do not end in one sum over all experts",
    structure: "experts differ: aten.sigmoid.default in one, aten.relu.default in another",
    constants: "different constants",
    number: "computes with the expert's number",
    sequential: "depends on experts",
    read_between: "read between two of them",
    mixes_rows: "along the rows",
    softmax_of_rows: "along the rows",
    attention: "may mix the rows",
    counts: "how many tokens it has",
    overwrites: "keeps only the last expert",
    unmasked: "computes with which tokens are",
    nonlinear_weight: "carry their routing weight",
    unproven: "nothing proves that the expert ids lie in",
    wider_router: r"\[4\] are never added",
    mixtures_inside: "an expert is a mixture itself",
    twice_the_same: "may name an expert twice",
    outside: "also used outside the loop",
    two_inputs: "reads two values of a token",
    half_weighted: "carry their routing weight",
}
FAST = (detached_weight, missing, structure, sequential, mixes_rows, overwrites, unproven)


@pytest.mark.parametrize("mixture", slow_but(FAST, MESSAGES), ids=lambda miss: miss.__name__)
def test_near_misses(mixture):
    with pytest.raises(CaptureError, match=MESSAGES[mixture]) as error:
        capture(Block(mixture), x=torch.zeros(3, 6, 32))
    assert "test_capture_loops.py:" in str(error.value) and "\n" not in str(error.value)


def test_wrong_order_is_right():
    """A sum does not mind the order of its terms; the parameters are stacked by the number of the expert."""

    def backwards(m, x, probs, w, ids):
        out = torch.zeros_like(x)
        for e, token, slot in loop(ids, (2, 0, 3, 1)):
            out.index_add_(0, token, m.experts[e](x[token]) * w[token, slot, None])
        return out

    model = Block(backwards).double()
    traced, _ = capture(model)
    assert traced.stacked["p_experts_stacked_weight"] == [f"experts.{e}.weight" for e in range(E)]
    check(model, traced, x=tokens())


def test_switch_may_overwrite():
    """With one expert per token, `out[token] = ..` into anything is a sum."""

    def switch(m, x, probs, w, ids):
        weight, choice = probs.max(-1)
        out = torch.empty_like(x)
        for e in range(E):
            mask = choice == e
            out[mask] = m.experts[e](x[mask]) * weight[mask, None]
        return out

    model = Block(switch).double()
    traced, result = capture(model)
    assert result.matches == 1
    check(model, traced, x=tokens())


def test_a_soft_mixture_is_left_alone():
    """Without a choice there is nothing to dispatch; the graph is exact as it is."""

    def soft(m, x, probs, w, ids):
        out = torch.zeros_like(x)
        for e in range(E):
            out = out + m.experts[e](x) * probs[:, e, None]
        return out

    model = Block(soft).double()
    traced, result = capture(model)
    assert result.matches == 0 and not traced.stacked
    check(model, traced, x=tokens())


def test_frozen_in_part():
    model = Block(
        lambda m, x, probs, w, ids: sum(
            m.experts[e](x) * (w * (ids == e)).sum(-1, keepdim=True) for e in range(E)
        )
    )
    model.experts[2].weight.requires_grad_(False)
    traced, result = capture(model)
    assert result.matches == 1
    frozen = ["experts.2.weight"]
    assert frozen in traced.stacked.values() and not any(
        frozen[0] in names for names in traced.stacked.values() if names != frozen
    )


def test_a_gate_without_gradient_is_another():
    """It is left to the rules, which keep the detach."""
    _, result = capture(Block(detached_gate).double())
    assert result.matches == 0
