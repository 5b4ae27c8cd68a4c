"""Experts computed for a tensor of assignments: loss and every gradient of the captured graph are the
model's; what is not proven is left as it is."""

import pytest
import torch
import torch.nn.functional as F
from torch import einsum, nn

from tedfx.errors import CaptureError
from tedfx.passes.base import run_pipeline
from tedfx.passes.capture_dense import CaptureDense
from tedfx.passes.capture_loops import CaptureLoops, find_uncaptured
from tedfx.passes.functionalize import Functionalize
from tedfx.stages.graphs import GlobalGraph
from tedfx.trace.export import trace
from tests.capture.test_models import BIASES, check, operators, routers, tokens
from tests.marks import slow_but
from tests.models_dense import LAYERS, Stacks, llama4
from tests.models_plain import Config
from tests.passes.helpers import upto

E, H, I = 4, 32, 48
CHOICES = {"choice_by_choice": 2}  # mixtures of a layer, where it has more than one


class Layer(nn.Module):
    """One mixture by itself."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.moe = make(Config())

    def forward(self, x):
        y, aux = self.moe(x)
        return {"y": y, "loss": y.square().sum() + aux}


def capture(model):
    traced = trace(model, kwargs={"x": torch.zeros(3, 6, H, dtype=next(model.parameters()).dtype)})
    done = run_pipeline(GlobalGraph.of(traced), [Functionalize(), CaptureLoops(), CaptureDense()])
    return done.trace, done.history[-1].result


@pytest.mark.parametrize(
    "name", slow_but(["interleaved", "kept_one", "all_biases", "llama4", "indexed"], LAYERS)
)
def test_every_way_to_write_it(name):
    model = Layer(LAYERS[name]).double()
    traced, result = capture(model)
    assert result.matches == CHOICES.get(name, 1), result.notes
    assert find_uncaptured(traced.graph_module.graph) == []
    found = operators(traced)
    count = CHOICES.get(name, 1)
    assert found.count("tedfx.dispatch.default") == found.count("tedfx.combine.default") == count
    assert not any(word in o for o in found for word in ("bmm", "einsum", "baddbmm"))
    for values in BIASES.values():
        routers(model, values)
        check(model, traced, x=tokens())
    check(model, traced, x=tokens(1, 7))


# --- near misses ---


def soft(m, x, w, ids):
    """Every expert counts."""
    return einsum("ne,enh->nh", m.router(x).softmax(-1), F.gelu(x @ m.w1) @ m.w2)


def thresholded(m, x, w, ids):
    """Ties may choose more than two."""
    probs = m.router(x).softmax(-1)
    gates = probs * (probs >= w[:, -1:])
    return einsum("ne,enh->nh", gates, F.gelu(x @ m.w1) @ m.w2)


def floored(m, x, w, ids):
    """A gate that is not zero for others."""
    gates = torch.full((x.shape[0], E), 1e-3, dtype=x.dtype).scatter(1, ids, w)
    return einsum("ne,enh->nh", gates, F.gelu(x @ m.w1) @ m.w2)


def smoothed(m, x, w, ids):
    """Zero for others in value only before the shift."""
    gates = m.scattered(x, w, ids) + 0.01
    return einsum("ne,enh->nh", gates, F.gelu(x @ m.w1) @ m.w2)


def doubled(m, x, w, ids):
    """A gate that has the sum of both choices, if they are one expert."""
    ids = ids.gather(1, torch.zeros_like(ids))
    gates = (F.one_hot(ids, E) * w.unsqueeze(-1)).sum(1)
    gates = gates / gates.sum(-1, keepdim=True)
    return einsum("ne,enh->nh", gates, F.gelu(x @ m.w1) @ m.w2)


def biased_llama4(m, x, w, ids):
    """An expert gives something for a token of zeros."""
    rows = x.unsqueeze(0) * m.scattered(x, w, ids).t().unsqueeze(-1)
    return torch.bmm(F.gelu(torch.bmm(rows, m.w1) + m.b1[:, None]), m.w2).sum(0)


def normed_llama4(m, x, w, ids):
    rows = x.unsqueeze(0) * m.scattered(x, w, ids).t().unsqueeze(-1)
    return torch.bmm(m.norm(torch.bmm(rows, m.w1)), m.w2).sum(0)


def sigmoid_llama4(m, x, w, ids):
    """sigmoid(0) is not 0."""
    rows = x.unsqueeze(0) * m.scattered(x, w, ids).sigmoid().t().unsqueeze(-1)
    return torch.bmm(F.gelu(torch.bmm(rows, m.w1)), m.w2).sum(0)


def mixed_experts(m, x, w, ids):
    """Experts that see each other."""
    y = einsum("nei,eih->neh", F.gelu(einsum("nh,ehi->nei", x, m.w1)).softmax(1), m.w2)
    return (y * m.scattered(x, w, ids).unsqueeze(-1)).sum(1)


def mixed_tokens(m, x, w, ids):
    y = (F.gelu(x @ m.w1) @ m.w2).cumsum(1)
    return einsum("ne,enh->nh", m.scattered(x, w, ids), y)


def other_tokens(m, x, w, ids):
    """A token is weighed by another's gate."""
    return einsum("ne,enh->nh", m.scattered(x, w, ids).flip(0), F.gelu(x @ m.w1) @ m.w2)


def read_twice(m, x, w, ids):
    """What experts give to all tokens counts elsewhere."""
    y = F.gelu(x @ m.w1) @ m.w2
    return einsum("ne,enh->nh", m.scattered(x, w, ids), y) + y.mean(0)


def gathered_read_twice(m, x, w, ids):
    y = einsum("nkf,nkfh->nkh", F.gelu(einsum("nh,nkhf->nkf", x, m.w1[ids])), m.w2[ids])
    return (y * w.unsqueeze(-1)).sum(1) + y.amax(1)


def mixed_choices(m, x, w, ids):
    """A token's choices see each other."""
    hidden = einsum("nh,nkhf->nkf", x, m.w1[ids]).softmax(1)
    return (einsum("nkf,nkfh->nkh", hidden, m.w2[ids]) * w.unsqueeze(-1)).sum(1)


def crossed_choices(m, x, w, ids):
    """The first expert's rows meet the second's matrix."""
    hidden = F.gelu(einsum("nh,nkhf->nkf", x, m.w1[ids]))
    return (einsum("nkf,nkfh->nkh", hidden, m.w2[ids.flip(1)]) * w.unsqueeze(-1)).sum(1)


def other_matrix(m, x, w, ids):
    """Matrices of the token before."""
    hidden = F.gelu(einsum("nh,nkhf->nkf", x, m.w1[ids]))
    return (einsum("nkf,nkfh->nkh", hidden, m.w2[ids.roll(1, 0)]) * w.unsqueeze(-1)).sum(1)


def means(m, x, w, ids):
    """The mean of all tokens' choices."""
    y = einsum("nkf,nkfh->nkh", F.gelu(einsum("nh,nkhf->nkf", x, m.w1[ids])), m.w2[ids])
    return x + (y * w.unsqueeze(-1)).sum((0, 1))


def mean_matrix(m, x, w, ids):
    """Matrices are mixed before they meet the token."""
    return einsum("nh,nhf->nf", x, (m.w1[ids] * w[..., None, None]).sum(1)) @ m.w2[0]


def nonlinear_weight(m, x, w, ids):
    y = einsum("nh,nkhf->nkf", x, m.w1[ids]) * w.unsqueeze(-1)
    return einsum("nkf,nkfh->nkh", F.gelu(y), m.w2[ids]).sum(1)


def read_at_others(m, x, w, ids):
    """What the chosen experts made of other tokens."""
    y = (F.gelu(x @ m.w1) @ m.w2).transpose(0, 1).flip(0)
    return einsum("nkh,nk->nh", y[torch.arange(x.shape[0])[:, None], ids], w)


def read_at_other_places(m, x, w, ids):
    y = (F.gelu(x @ m.w1) @ m.w2).transpose(0, 1)
    return einsum("nkh,nk->nh", y[torch.arange(x.shape[0]).flip(0)[:, None], ids], w)


MISSES = [soft, thresholded, floored, smoothed, doubled, biased_llama4, normed_llama4, sigmoid_llama4]
MISSES += [mixed_experts, mixed_tokens, other_tokens, read_twice, gathered_read_twice, mixed_choices]
MISSES += [
    read_at_others,
    read_at_other_places,
    crossed_choices,
    other_matrix,
    means,
    mean_matrix,
    nonlinear_weight,
]


@pytest.mark.parametrize(
    "mixture",
    slow_but([soft, doubled, normed_llama4, mixed_tokens, read_at_others, other_matrix], MISSES),
    ids=lambda f: f.__name__,
)
def test_what_is_not_proven_stays(mixture):
    model = Layer(lambda c: Stacks(c, mixture)).double()
    traced, result = capture(model)
    assert result.matches == 0
    found = operators(traced)
    assert not any("tedfx" in o for o in found)
    check(model, traced, x=tokens())


def test_vectors_are_no_experts():
    """Without a matrix product nothing is routed."""

    def codebook(m, x, w, ids):
        return x + (m.b2[ids] * w.unsqueeze(-1)).sum(1)

    traced, result = capture(Layer(lambda c: Stacks(c, codebook)).double())
    assert result.matches == 0 and result.notes == []


def test_a_gate_has_no_gradient_where_it_is_zero():
    """The router's gradient is that of the experts that were chosen: with a sigmoid of -inf as with zeros."""
    model = Layer(lambda c: Stacks(c, llama4, 1)).double()
    traced, result = capture(model)
    assert result.matches == 1
    routers(model, BIASES["all to one"])
    check(model, traced, x=tokens())
    out = traced(model, x=tokens())
    (grad,) = torch.autograd.grad(out["loss"], [model.moe.router.bias])
    assert torch.equal(grad[1:], torch.zeros(3, dtype=grad.dtype))


def test_a_refusal_says_why():
    """Where ranks are to share experts: the style, its line, and what was not proven."""
    model = Layer(lambda c: Stacks(c, gathered_read_twice))
    with pytest.raises(
        CaptureError, match="UnsupportedMoE: gathered weights at .*also used elsewhere"
    ) as error:
        upto(model, "ep=2", {"x": torch.zeros(4, 6, H)}, "shard_experts")
    assert "\n" not in str(error.value)
