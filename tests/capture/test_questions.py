"""What a model asks about the number of an expert's tokens while it is traced: which questions are answered,
and which are refused with their line."""

import pytest
import torch

from tedfx.errors import CaptureError, TraceError
from tests.capture.test_models import capture, check, tokens
from tests.passes.test_capture_loops import Block, E, loop


def over_rows(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids):
        for n in token:
            out[n] += m.experts[e](x[n])
    return out


def length_of_rows(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids):
        out.index_add_(0, token, m.experts[e](x[token]) * w[token, slot, None] / len(token))
    return out


def something_for_nothing(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids):
        if token.numel() == 0:
            out = out + 0.1
            continue
        out = out.index_add(0, token, m.experts[e](x[token]) * w[token, slot, None])
    return out


def otherwise(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids):
        if (ids == e).any():
            out = out.index_add(0, token, m.experts[e](x[token]) * w[token, slot, None])
        else:
            out = out - 1
    return out


def mixed_test(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids):
        if token.numel() == 0 or e == 2:
            continue
        out = out.index_add(0, token, m.experts[e](x[token]) * w[token, slot, None])
    return out


def token_by_token(m, x, probs, w, ids):
    """No loop over experts, and the number of tokens is free."""
    tokens, out = x.shape[0], []
    for t in range(tokens):
        likely = torch.nonzero(probs[t] > 0.3).flatten()
        number = likely.shape[0] // 2
        if number > 0:
            mean = x[t] * number
        else:
            mean = torch.zeros_like(x[t])
        out.append(mean)
    return torch.stack(out)


@pytest.mark.parametrize(
    "mixture, message",
    [
        (token_by_token, "a Python loop over the batch or the sequence \\(for t in range\\(tokens\\)\\)"),
        (over_rows, "a python loop \\(or list\\) over rows whose number is data"),
        (length_of_rows, "len\\(\\) of rows whose number is data"),
        (something_for_nothing, "an expert without tokens does something of its own \\(out = out \\+ 0.1\\)"),
        (otherwise, "an expert without tokens does something of its own \\(out = out - 1\\)"),
        (mixed_test, "a test for tokens mixed with others"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_refused_while_tracing(mixture, message):
    with pytest.raises(TraceError, match=message) as error:
        capture(Block(mixture), x=torch.zeros(3, 6, 32))
    assert "test_questions.py:" in str(error.value)


def test_an_answer_that_belongs_to_no_loop():
    def first_only(m, x, probs, w, ids):
        token, slot = torch.where(ids == 0)
        if token.numel() == 0:
            pass
        return x.index_add(0, token, m.experts[0](x[token]) * w[token, slot, None])

    with pytest.raises(CaptureError, match="no loop over experts was captured there"):
        capture(Block(first_only), x=torch.zeros(3, 6, 32))


def named(m, x, probs, w, ids):
    """Tests that are understood: by a name, by item(), by counts, negated."""
    out = torch.zeros_like(x)
    load = torch.bincount(ids.flatten(), minlength=E)
    for e, token, slot in loop(ids):
        n = token.shape[0]
        if not n > 0:
            continue
        hits = ids == e
        if hits.sum().item() == 0 or False:
            continue
        out = out.index_add(0, token, m.experts[e](x[token]) * w[token, slot, None])
    return out + 0 * load.sum()


def counted(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    load = torch.bincount(ids.flatten(), minlength=E)
    for e, token, slot in loop(ids):
        count = (ids == e).sum().item()
        if count == 0:
            continue
        if load[e] > 0:
            if not torch.any(ids == e):
                continue
            if (ids == e).sum() < 1:
                pass
            out = out.index_add(0, token, m.experts[e](x[token]) * w[token, slot, None])
    return out


def test_tests_that_are_understood():
    with pytest.raises(TraceError, match="mixed with others"):
        capture(Block(named), x=torch.zeros(3, 6, 32))
    model = Block(counted).double()
    traced, result = capture(model)
    assert result.matches == 1
    check(model, traced, x=tokens())


def by_keyword(m, x, probs, w, ids):
    out = torch.zeros_like(x)
    for e, token, slot in loop(ids):
        if torch.sum(input=ids == e) == 0:
            continue
        out = out.index_add(0, token, m.experts[e](x[token]) * w[token, slot, None])
    return out * torch.sum(input=torch.ones_like(x), dim=-1, keepdim=True) / x.shape[-1]


def test_counts_of_what_is_given_by_keyword():
    model = Block(by_keyword).double()
    traced, result = capture(model)
    assert result.matches == 1
    check(model, traced, x=tokens())
