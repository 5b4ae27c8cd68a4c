"""Masks made from sizes: what is proven, what is left alone, and that attention computes the same."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attend

from tedfx.passes.base import run_pipeline
from tedfx.passes.functionalize import Functionalize
from tedfx.passes.simplify_masks import SimplifyMasks
from tedfx.stages.graphs import GlobalGraph
from tedfx.trace.export import trace
from tests.marks import slow_but

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


class Attention(nn.Module):
    """x is (batch, sequence, 2 heads of 4)."""

    def __init__(self, mask, use=attend):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8))
        self.mask, self.use = mask, use

    def forward(self, x):
        q = (x * self.w).unflatten(-1, (2, 4)).transpose(1, 2)
        return self.use(q, q, q, attn_mask=self.mask(x))


def simplified(mask, use=attend):
    torch.manual_seed(0)
    model = Attention(mask, use)
    t = trace(model, kwargs={"x": torch.randn(6, 10, 8)})
    done = run_pipeline(GlobalGraph.of(t), [Functionalize(), SimplifyMasks()])
    t, history = done.trace, done.history
    for shape in ((3, 7, 8), (2, 19, 8), (1, 1, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(t(model, x=x), model(x=x), rtol=1e-5, atol=1e-6)
    return t, history[1].result


def nodes(t, target):
    return t.graph_module.graph.find_nodes(op="call_function", target=target)


def ranges(x):
    s = torch.arange(x.shape[1], device=x.device)
    return s[:, None], s[None, :]


def compare(x):
    q, k = ranges(x)
    return (k <= q)[None, None].expand(x.shape[0], 1, -1, -1)


def tril(x):
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()


def minus_infinity(x):
    return torch.full((x.shape[1], x.shape[1]), float("-inf"), device=x.device).triu(1)


def smallest_float(x):
    q, k = ranges(x)
    return torch.where(k <= q, 0.0, torch.finfo(x.dtype).min).expand(x.shape[0], 1, -1, -1)


def packed(x):
    """What transformers writes: documents counted from position ids, looked up by index."""
    position = torch.arange(x.shape[1], device=x.device).unsqueeze(0).expand(x.shape[0], -1)
    document = (torch.diff(position, prepend=position[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    batch = torch.arange(x.shape[0], device=x.device)[:, None, None, None]
    q = torch.arange(x.shape[1], device=x.device)[None, None, :, None]
    k = torch.arange(x.shape[1], device=x.device)[None, None, None, :]
    return (document[batch, q] == document[batch, k]) & (position[batch, k] <= position[batch, q])


@pytest.mark.parametrize(
    "mask",
    slow_but([compare, minus_infinity, packed], [compare, tril, minus_infinity, smallest_float, packed]),
    ids=lambda m: m.__name__,
)
def test_causal(mask):
    t, result = simplified(mask)
    (node,) = nodes(t, SDPA)
    assert node.args[3:] == (None, 0.0, True) and "attn_mask" not in node.kwargs
    assert result.matches == 1 and "causal" in result.notes[0]
    assert not nodes(t, aten.arange.default) and not nodes(t, aten.index.Tensor), (
        "the mask is not computed any more"
    )


def window(width):
    def mask(x):
        q, k = ranges(x)
        return ((k <= q) & (k > q - width))[None, None].expand(x.shape[0], 1, -1, -1)

    return mask


@pytest.mark.parametrize("width", slow_but([3, 5000], [3, 100, 5000, 131072]))
def test_window_loses_its_batch_dim(width):
    t, result = simplified(window(width))
    (node,) = nodes(t, SDPA)
    mask = node.kwargs.get("attn_mask") or node.args[3]
    assert f"a window of {width}" in result.notes[0]
    assert mask.meta["val"].shape[:2] == (1, 1) and mask.meta["val"].shape[2] == mask.meta["val"].shape[3]
    assert not any(
        n.meta["val"].shape[0] == t.sizes["batch"]
        for n in t.graph_module.graph.nodes
        if n in mask.all_input_nodes
    )


def test_additive_masks_outside_attention_lose_their_batch_dim():
    def by_hand(q, k, v, attn_mask):
        return torch.softmax(q @ k.transpose(-1, -2) + attn_mask, -1) @ v

    t, result = simplified(smallest_float, by_hand)
    (where,) = [
        n for n in nodes(t, aten.where.ScalarOther) + nodes(t, aten.where.Scalar) + nodes(t, aten.where.self)
    ]
    assert where.meta["val"].shape[:2] == (1, 1)
    assert result.changes >= 1


def chunks(x):
    q, k = ranges(x)
    return (k <= q) & (k // 4 == q // 4)


def nearly_causal(x):
    """Causal but for sequences above 40."""
    q, k = ranges(x)
    return (k <= q) | (q == 40)


def given(x):
    """Depends on an input's values."""
    q, k = ranges(x)
    return (k <= q) & (x[:, None, None, :, 0] > -9)


@pytest.mark.parametrize("mask", [chunks, nearly_causal, given], ids=lambda m: m.__name__)
def test_others_stay(mask):
    t, result = simplified(mask)
    (node,) = nodes(t, SDPA)
    assert (node.kwargs.get("attn_mask") or node.args[3]) is not None
    assert not any("simplified" in note for note in result.notes)


def test_queries_after_a_prefix_are_not_causal():
    """With more keys than queries `is_causal` means something else."""

    def longer_keys(q, k, v, attn_mask):
        return attend(q[:, :, 1:], k, v, attn_mask=attn_mask[..., 1:, :])

    model = Attention(tril, longer_keys)
    t = trace(model, kwargs={"x": torch.randn(6, 10, 8)})
    t = run_pipeline(GlobalGraph.of(t), [Functionalize(), SimplifyMasks()]).trace
    x = torch.randn(2, 12, 8)
    torch.testing.assert_close(t(model, x=x), model(x=x))


def test_a_window_wider_than_every_allowed_sequence_is_causal():
    model = Attention(window(64))

    class Bounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model
            self.table = nn.Parameter(torch.randn(32, 8))

        def forward(self, x):
            torch._check(x.shape[1] <= 32)
            return self.inner(x + self.table[: x.shape[1]])

    t = trace(Bounded(), kwargs={"x": torch.randn(6, 10, 8)})
    done = run_pipeline(GlobalGraph.of(t), [Functionalize(), SimplifyMasks()])
    t, history = done.trace, done.history
    assert any("at most 32" in s or "32" in s for s in t.static)
    assert "causal" in history[1].result.notes[0]
