"""Loops over experts that search a mask in which a capacity left out some assignments; and loops over the
numbers of `one_hot` of a mask (Switch's and NLLB's in transformers)."""

import pytest
import torch
import torch.nn.functional as F

from tedfx.errors import CaptureError
from tests.capture.test_models import capture, check, operators, tokens
from tests.marks import slow, slow_but
from tests.passes.test_capture_loops import Block, E

CAPACITY = 6


def left(hits):
    return hits.cumsum(0) <= CAPACITY


def first(probs):
    return F.one_hot(probs.argmax(-1), E)


def loop(m, x, mask, w, numbers=range(E)):
    """`mask` [N, E]."""
    out = torch.zeros_like(x)
    for e in numbers:
        (token,) = torch.where(mask[:, e])
        out = out.index_add(0, token, m.experts[e](x[token]) * w[token])
    return out


def times(m, x, probs, w, ids):
    hits = first(probs)
    return loop(m, x, hits * left(hits), probs.amax(-1, keepdim=True))


def both(m, x, probs, w, ids):
    hits = first(probs).bool()
    return loop(m, x, hits & left(hits), probs.amax(-1, keepdim=True))


def of_two(m, x, probs, w, ids):
    """Two choices in one mask of distinct experts, weighed by a matrix that is zero where the mask is."""
    hits = F.one_hot(ids, E).sum(1)
    mask, out = left(hits) * hits, torch.zeros_like(x)
    gates = probs * mask
    for e in range(E):
        (token,) = torch.where(mask[:, e])
        out = out.index_add(0, token, m.experts[e](x[token]) * gates[token, e, None])
    return out


def hit(m, x, probs, w, ids):
    """As transformers has Switch."""
    hits, out = first(probs), torch.zeros_like(x)
    mask = (hits * left(hits)).view(-1, 1, E).permute(2, 1, 0)
    for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        slot, token = torch.where(mask[e].squeeze(0))
        done = m.experts[int(e[0])](x[None, token].reshape(-1, 32)) * probs.amax(-1, True)[token, slot, None]
        out.index_add_(0, token, done)
    return out


def hit_by_any(m, x, probs, w, ids):
    """Also experts of whose tokens none is left are run, on no tokens."""
    hits = first(probs)
    return loop(m, x, hits * left(hits), probs.amax(-1, True), [int(e) for e in hits.sum(0).nonzero()])


def by_truth(m, x, probs, w, ids):
    hits, out = first(probs), torch.zeros_like(x)
    mask = hits.bool() & left(hits)
    for e in range(E):
        at = mask[:, e]
        out[at] = out[at] + m.experts[e](x[at]) * probs.amax(-1, True)[at]
    return out


def twice(m, x, probs, w, ids):
    hits = first(probs)
    mask = hits * left(hits)
    return loop(m, x, mask * (x.sum(-1, keepdim=True) > 0), probs.amax(-1, True))


@pytest.mark.parametrize(
    "mixture",
    slow_but([times, hit, by_truth], [times, both, of_two, hit, hit_by_any, by_truth, twice]),
    ids=lambda way: way.__name__,
)
def test_what_is_left_is_sent(mixture):
    model = Block(mixture).double()
    traced, result = capture(model)
    assert result.matches == 1
    (dispatch,) = [n for n in traced.graph_module.graph.nodes if "dispatch" in str(n.target)]
    assert dispatch.args[-1] is True, "the tokens that are left out stand in the tail"
    for x in (tokens(), tokens(1, 1), tokens()[:1, :1].expand(3, 6, 32)):  # the last drop most tokens
        check(model, traced, x=x)


# ---- what says more ----------------------------------------------------------------------------------------


def hit_by_those_left(m, x, probs, w, ids):
    """Experts whose tokens are all left out are not run, and here they have tokens."""
    hits, out = first(probs), torch.zeros_like(x)
    for e in (hits * (x.sum(-1, keepdim=True) > 0)).sum(0).nonzero():
        (token,) = torch.where(hits[:, e[0]])
        out = out.index_add(0, token, m.experts[int(e[0])](x[token]))
    return out


def hit_by_others(m, x, probs, w, ids):
    hits = first(probs)
    few = hits * (hits.cumsum(0) <= 1)
    few = few * (x.sum(-1, keepdim=True) > 0)
    return loop(m, x, hits * left(hits), probs.amax(-1, True), [int(e) for e in few.sum(0).nonzero()])


def two_masks(m, x, probs, w, ids):
    """What is added elsewhere than it was computed from."""
    hits, out = first(probs), torch.zeros_like(x)
    one, other = hits * left(hits), hits * (x.sum(-1, keepdim=True) > 0)
    for e in range(E):
        (here,), (there,) = torch.where(one[:, e]), torch.where(other[:, e])
        out = out.index_add(0, there, m.experts[e](x[there]) + m.experts[e](x[here]).sum())
    return out


def not_bits(m, x, probs, w, ids):
    """A mask times numbers: it is 0 in other places than its search finds."""
    hits = first(probs)
    return loop(m, x, hits * hits.cumsum(0).sub(2), probs.amax(-1, True))


@pytest.mark.parametrize(
    "mixture, match",
    [
        slow(hit_by_those_left, "nothing proves that the others have no tokens"),
        (hit_by_others, "nothing proves that the others have no tokens"),
        (two_masks, "twice, in different"),
        (not_bits, "cannot capture"),
    ],
    ids=lambda way: getattr(way, "__name__", ""),
)
def test_other_masks_are_refused(mixture, match):
    with pytest.raises(CaptureError, match=match) as error:
        capture(Block(mixture))
    assert "test_masks_of_capacity.py:" in str(error.value)


# ---- numbers that are a mask -------------------------------------------------------------------------------


def of_a_mask(m, x, probs, w, ids):
    """Expert 1 where a choice is left, expert 0 everywhere else, weighed by the matrix: NLLB's."""
    hits = first(probs)
    mask = F.one_hot(hits * left(hits), E).permute(2, 1, 0)
    out = torch.zeros_like(x)
    for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        slot, token = torch.where(mask[e].squeeze(0))
        done = m.experts[int(e[0])](x[None, token].reshape(-1, 32)) * probs[token, slot, None]
        out.index_add_(0, token, done)
    return out


def test_numbers_that_are_a_mask_name_experts():
    model = Block(of_a_mask).double()
    traced, result = capture(model)
    assert result.matches == 1 and "aten.nonzero.default" not in operators(traced)
    check(model, traced, x=tokens())
    check(model, traced, x=tokens(1, 1))


def test_numbers_of_any_size_do_not():
    def of_counts(m, x, probs, w, ids):
        return loop(m, x, F.one_hot(first(probs).cumsum(0).sum(-1), E), probs.amax(-1, True))

    traced, result = capture(Block(of_counts))
    assert not result.matches and "aten.where.default" in operators(traced)
