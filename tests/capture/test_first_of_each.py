"""Loops in which an expert takes the first of its tokens, `token[:capacity]`: dropped is who is dropped by
the model; whatever takes others is refused."""

import pytest
import torch
import torch.nn.functional as F

from tedfx.errors import TedfxError
from tests.capture.test_models import BIASES, capture, check, operators, routers, tokens
from tests.marks import slow
from tests.passes.test_capture_loops import Block

E = 4


def searched(search, cut):
    """`search(ids, e)` gives (token, slot) of expert e, of which `cut(.., capacity, e)` takes some."""

    def mixture(m, x, probs, w, ids):
        capacity, out = x.shape[0] * 3 // 10, torch.zeros_like(x)
        for e in range(E):
            token, slot = cut(*search(ids, e), capacity, e)
            out.index_add_(0, token, m.experts[e](x[token]) * w[token, slot, None])
        return out

    return mixture


def by_token(ids, e):
    return torch.where(ids == e)


def by_choice(ids, e):
    """First choices first."""
    slot, token = torch.where(F.one_hot(ids, E).permute(2, 1, 0)[e])
    return token, slot


def first(token, slot, capacity, e):
    return token[:capacity], slot[:capacity]


def residual(m, x, probs, w, ids):
    """An expert that does not map zero to zero: what is dropped must not be added."""
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = first(*by_token(ids, e), x.shape[0] * 3 // 10, e)
        out.index_add_(0, token, (x[token] + m.experts[e](x[token])).sigmoid() * w[token, slot, None])
    return out


def switch(start):
    """One expert per token, whose row is written over."""

    def mixture(m, x, probs, w, ids):
        weight, choice = probs.max(-1)
        capacity, out = x.shape[0] // 4, start(x)
        for e in range(E):
            token = (choice == e).nonzero().squeeze(-1)[:capacity]
            out[token] = m.experts[e](x[token]) * weight[token, None]
        return out

    return mixture


@pytest.mark.parametrize(
    "mixture",
    [
        searched(by_token, first),
        slow(searched(by_choice, first)),
        slow(switch(torch.zeros_like)),
        residual,
    ],
)
def test_the_first_tokens_of_each_expert(mixture):
    model = Block(mixture).double()
    traced, result = capture(model)
    assert result.matches == 1
    found = operators(traced)
    assert found.count("tedfx.dispatch.default") == found.count("aten.cumsum.default") == 1
    assert not any("nonzero" in o or "index_add" in o or "index_put" in o for o in found)
    for values in BIASES.values():
        routers(model, values)
        check(model, traced, x=tokens())
        check(model, traced, x=tokens(1, 7))
    with torch.no_grad():  # ties
        model.router.weight.zero_()
        model.router.bias.zero_()
    check(model, traced, x=tokens())
    assert (model(tokens())["y"].abs().sum(-1) == 0).any(), "the test shall drop tokens"


def in_runs(m, x, probs, w, ids):
    """The order within an expert's run is the sort's, which need not be that of the tokens."""
    order, out = ids.flatten().argsort(), torch.zeros_like(x)
    for e, run in enumerate(order.split(ids.flatten().bincount(minlength=E).tolist())):
        run = run[:6]
        out.index_add_(0, run // 2, m.experts[e](x[run // 2]) * w.flatten()[run, None])
    return out


@pytest.mark.parametrize(
    "mixture, why",
    [
        slow(searched(by_token, lambda token, slot, c, e: (token[:c], slot[: c + e])), "different ways|size"),
        (searched(by_token, lambda token, slot, c, e: (token[: c + e], slot[: c + e])), "in different ways"),
        (searched(by_token, lambda token, slot, c, e: (token[-c:], slot[-c:])), "which tokens are"),
        slow(searched(by_token, lambda token, slot, c, e: (token[2:c], slot[2:c])), "which tokens are"),
        slow(searched(by_token, lambda token, slot, c, e: (token[:c:2], slot[:c:2])), "which tokens are"),
        slow(
            searched(by_token, lambda token, slot, c, e: (token.flip(0)[:c], slot.flip(0)[:c])),
            "which tokens",
        ),
        slow(
            searched(
                by_token,
                lambda token, slot, c, e: [
                    v[p] for p in [torch.randperm(token.shape[0])[:c]] for v in (token, slot)
                ],
            ),
            "how many tokens it has",
        ),
        slow(
            searched(by_token, lambda token, slot, c, e: (token[:c], slot[:c]) if e else (token, slot)),
            "differ",
        ),
        slow(
            searched(by_token, lambda token, slot, c, e: (token[: 30 - c], slot[: 30 - c])),
            "which tokens are",
        ),
        (in_runs, "which tokens are|not understood|cut"),
        slow(switch(lambda x: x.clone()), "keep what was there"),
        (switch(torch.empty_like), "keep what was there"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_others_are_refused(mixture, why):
    with pytest.raises(TedfxError, match=why) as error:
        capture(Block(mixture), x=torch.zeros(3, 6, 32))
    assert "test_first_of_each.py:" in str(error.value) and "\n" not in str(error.value)


class ByChoiceInASequence(Block):
    """The tokens of a sequence by choice, and one sequence after the other."""

    def forward(self, x):
        w, ids = self.router(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for e in range(E):
            b, k, p = (found[:6] for found in torch.where(ids.transpose(1, 2) == e))
            rows = self.experts[e](x[b, p]) * w[b, p, k, None]
            out = out.index_put((b, p), rows, accumulate=True)
        return {"y": out, "loss": out.square().sum()}


def test_another_order_is_refused():
    with pytest.raises(TedfxError, match="searched in another order than theirs"):
        capture(ByChoiceInASequence(None), x=torch.zeros(3, 6, 32))
