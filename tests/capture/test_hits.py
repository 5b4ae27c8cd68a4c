"""Loops over those experts that any token chose."""

import pytest
import torch
import torch.nn.functional as F

from tedfx.checking.full import check_trace
from tedfx.errors import CaptureError, TraceError
from tests.capture.test_models import capture, check, tokens
from tests.marks import slow_but
from tests.passes.test_capture_loops import Block, E


def mask_of(ids):
    return F.one_hot(ids, E).permute(2, 1, 0)


def add(m, out, x, w, e, slot, token):
    return out.index_add(0, token, m.experts[e](x[token]) * w[token, slot, None])


def counted(m, x, probs, w, ids):
    out, mask = torch.zeros_like(x), mask_of(ids)
    for e in mask.sum((-1, -2)).nonzero():
        out = add(m, out, x, w, e[0], *torch.where(mask[e[0]]))
    return out


def of_a_library(m, x, probs, w, ids):
    """As transformers has it, without gradients and with a number that no expert has."""
    out = torch.zeros_like(x)
    with torch.no_grad():
        mask = F.one_hot(ids, E + 1).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
    for e in hit:
        e = e[0]
        if e == E:
            continue
        out = add(m, out, x, w, e, *torch.where(mask[e]))
    return out


def one_in_a_dim(m, x, probs, w, ids):
    out, mask = torch.zeros_like(x), mask_of(ids)
    for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        out = add(m, out, x, w, e, *torch.where(mask[e].squeeze(0)))
    return out


def gathered_with_a_dim(m, x, probs, w, ids):
    """NLLB's: an index behind None."""
    out, mask = torch.zeros_like(x), mask_of(ids)
    for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        slot, token = torch.where(mask[e].squeeze(0))
        rows = m.experts[int(e[0])](x[None, token].reshape(-1, x.shape[-1])) * w[token, slot, None]
        out = out.index_add(0, token, rows)
    return out


def unique(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, slot = torch.where(ids == e)
        out = add(m, out, x, w, e, slot, token)
    return out


def unique_flat(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e in torch.unique(ids.view(-1)):
        mask = ids == e
        token, slot = mask.nonzero(as_tuple=True)
        out = add(m, out, x, w, int(e), slot, token)
    return out


def of_counts(m, x, probs, w, ids):
    out, load = torch.zeros_like(x), torch.bincount(ids.flatten(), minlength=E)
    for e in torch.where(load > 0)[0].cpu().numpy():
        token, slot = torch.where(ids == int(e))
        out = add(m, out, x, w, int(e), slot, token)
    return out


def of_a_histogram(m, x, probs, w, ids):
    out, load = torch.zeros_like(x), torch.histc(ids.float(), bins=E, min=0, max=E - 1)
    for e in torch.nonzero(load).flatten().tolist():
        token, slot = torch.where(ids == e)
        out = add(m, out, x, w, e, slot, token)
    return out


def scattered(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    load = ids.new_zeros(ids.shape[0], E).scatter_(1, ids, 1).sum(0)
    for e in load.nonzero().squeeze(-1):
        token, slot = torch.where(ids == e.item())
        out = add(m, out, x, w, e.item(), slot, token)
    return out


def by_name(m, x, probs, w, ids):
    out, mask = torch.zeros_like(x), mask_of(ids)
    for e in mask.any(-1).any(-1).nonzero():
        slot, token = torch.where(mask[e[0]])
        out = out.index_add(0, token, getattr(m.experts, f"{e[0]}")(x[token]) * w[token, slot, None])
    return out


WAYS = [
    counted,
    of_a_library,
    one_in_a_dim,
    gathered_with_a_dim,
    unique,
    unique_flat,
    of_counts,
    of_a_histogram,
    scattered,
    by_name,
]


@pytest.mark.parametrize(
    "mixture", slow_but([of_a_library, unique, of_counts, by_name], WAYS), ids=lambda way: way.__name__
)
def test_is_a_loop_over_all(mixture):
    model = Block(mixture).double()
    traced, result = capture(model)
    assert result.matches == 1
    assert not [n for n in traced.graph_module.graph.nodes if "hit_experts" in str(n.target)]
    check(model, traced, x=tokens())
    check(model, traced, x=tokens(1, 1))  # experts without tokens
    check(model, traced, x=tokens()[:1, :1].expand(3, 4, 32))


# ---- what is not that loop ---------------------------------------------------------------------------------


def busy(m, x, probs, w, ids):
    """Only experts with several tokens."""
    out, load = torch.zeros_like(x), torch.bincount(ids.flatten(), minlength=E)
    for e in (load > 2).nonzero().flatten().tolist():
        token, slot = torch.where(ids == e)
        out = add(m, out, x, w, e, slot, token)
    return out


def of_first_choices(m, x, probs, w, ids):
    """Only experts that are the first choice of a token, for all choices."""
    out = torch.zeros_like(x)
    for e in ids[:, 0].unique().tolist():
        token, slot = torch.where(ids == e)
        out = add(m, out, x, w, e, slot, token)
    return out


def of_some_tokens(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e in (F.one_hot(ids, E)[1:].sum((0, 1)) > 0).nonzero().flatten().tolist():
        token, slot = torch.where(ids == e)
        out = add(m, out, x, w, e, slot, token)
    return out


def unhit(m, x, probs, w, ids):
    out, load = torch.zeros_like(x), torch.bincount(ids.flatten(), minlength=E)
    for e in (load == 0).nonzero().flatten().tolist():
        token, slot = torch.where(ids == e)
        out = add(m, out, x, w, e, slot, token)
    return out


@pytest.mark.parametrize(
    "mixture",
    slow_but([of_some_tokens, unhit], [busy, of_first_choices, of_some_tokens, unhit]),
    ids=lambda m: m.__name__,
)
def test_some_of_the_experts_are_refused(mixture):
    with pytest.raises(CaptureError, match="nothing proves that the others have no tokens") as error:
        capture(Block(mixture))
    assert "test_hits.py:" in str(error.value)


def test_numbers_that_are_not_of_experts_are_data():
    def positions(m, x, probs, w, ids):
        for n in (x[0] > 0).nonzero().flatten().tolist():
            x = x + n
        return x

    with pytest.raises((CaptureError, TraceError), match="test_hits.py:"):
        capture(Block(positions))


def how_many(m, x, probs, w, ids):
    out, mask, n = torch.zeros_like(x), mask_of(ids), 0
    for e in mask.sum((-1, -2)).nonzero():
        out, n = add(m, out, x, w, e[0], *torch.where(mask[e[0]])), n + 1
    return out / n


def test_what_a_loop_does_besides_shows_in_the_check():
    """On random tokens all experts are hit; on tokens that are alike they are not."""
    model = Block(how_many).double()
    traced, _ = capture(model)
    with pytest.raises(CaptureError, match="does not train as the model does"):
        check_trace(model, traced)
    good = Block(counted).double()
    assert "checked against the model" in check_trace(good, capture(good)[0])
