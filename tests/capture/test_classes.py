"""Loops over experts of several structures: each class is a loop of its own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedfx.errors import CaptureError
from tests.capture.test_models import capture, check, tokens
from tests.marks import slow_but
from tests.passes.test_capture_loops import Block, E


def loop(m, x, w, ids, expert):
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(ids == e)
        out = out.index_add(0, token, expert(m, e, x[token]) * w[token, slot, None])
    return out


def of(expert):
    def mixture(m, x, probs, w, ids):
        return loop(m, x, w, ids, expert)

    mixture.__name__ = expert.__name__
    return mixture


def behind(m, e, x):
    """As LongCat's: experts that compute nothing behind the others."""
    return m.experts[e](x) if e < 2 else x


def one_of_them(m, e, x):
    return m.experts[e - 1](x) if e else x


def between(m, e, x):
    return m.experts[e](x) if e % 2 else x * 2


def two_kinds(m, e, x):
    return F.relu(m.experts[e](x)) if e < 2 else F.gelu(m.experts[e](x))


def of_no_zero(m, e, x):
    """Experts that do not map zero to zero, which the other class's tokens must not meet."""
    return x + F.relu(m.experts[e](x)) if e < 2 else F.gelu(m.experts[e](x)).sigmoid()


def of_several_sizes(m, e, x):
    return m.narrow[e - 2](x) if e > 1 else m.experts[e](x)


def stacked(m, e, x):
    """Stacks with entries for more experts than use them."""
    return F.linear(F.linear(x, m.up[e]).relu(), m.down[e]) if e < 2 else x


def modules():
    narrow = nn.ModuleList(nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 32)) for _ in range(2))
    return {"narrow": narrow}


WAYS = [behind, one_of_them, between, two_kinds, of_no_zero, of_several_sizes, stacked]


@pytest.mark.parametrize(
    "expert", slow_but([behind, of_no_zero, stacked], WAYS), ids=lambda way: way.__name__
)
def test_classes_add_up(expert):
    model = Block(of(expert), **modules())
    model.up, model.down = nn.Parameter(torch.randn(E, 16, 32) / 5), nn.Parameter(torch.randn(2, 32, 16) / 4)
    model.double()
    traced, result = capture(model)
    assert result.matches == 1
    dispatched = [n for n in traced.graph_module.graph.nodes if "dispatch" in str(n.target)]
    assert len(dispatched) == (2 if expert in (two_kinds, of_no_zero, of_several_sizes) else 1)
    check(model, traced, x=tokens())
    check(model, traced, x=tokens(1, 1))  # experts without tokens
    check(model, traced, x=tokens()[:1, :1].expand(3, 4, 32))


def test_hit_classes_add_up():
    def hit(m, x, probs, w, ids):
        out, mask = torch.zeros_like(x), F.one_hot(ids, E).permute(2, 1, 0)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            number = int(e.item())
            slot, token = torch.where(mask[number].squeeze(0))
            if token.numel() == 0:
                continue
            done = behind(m, number, x[token]) * w[token, slot, None]
            out.index_add_(0, token, done)
        return out

    model = Block(hit).double()
    traced, _ = capture(model)
    check(model, traced, x=tokens())


# ---- what says more ----------------------------------------------------------------------------------------


def one_differs(m, e, x):
    return F.relu(m.experts[e](x)) if e == 2 else m.experts[e](x)


def a_number(m, e, x):
    return m.experts[e](x) * (e + 1)


def mixes(m, e, x):
    return m.experts[e](x) if e < 2 else x - x.mean(0)


@pytest.mark.parametrize("expert", [one_differs, a_number, mixes], ids=lambda way: way.__name__)
def test_refused(expert):
    with pytest.raises(CaptureError, match="cannot capture the loop over experts") as error:
        capture(Block(of(expert)))
    assert "test_classes.py:" in str(error.value)


def test_a_draw_is_each_experts_own():
    """Two experts of a token draw twice: they are not one function of the token."""

    def dropped(m, e, x):
        return m.experts[e](x) if e < 2 else F.dropout(x)

    traced, _ = capture(Block(of(dropped)))
    assert sum("dispatch" in str(n.target) for n in traced.graph_module.graph.nodes) == 2
