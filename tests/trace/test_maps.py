"""torch.vmap in forward: recorded as the operators that it comes to."""

import pytest
import torch
from torch import nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.autograd import Function

from tedfx.checking.full import check_trace
from tedfx.errors import TraceError
from tedfx.trace.export import trace
from tests.passes.helpers import parity

H = 8


class Mapped(nn.Module):
    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.w = nn.Linear(H, H), nn.Parameter(torch.randn(3, H, H))
        self.body = body

    def forward(self, x, mask):
        return self.body(self, self.linear(x), mask)


def weights(m, x, mask):
    """An ensemble: a function of each matrix, which reads the tokens of the function around it."""
    return torch.vmap(lambda w: torch.tanh(x @ w) * x.sum())(m.w).mean(0)


def rows(m, x, mask):
    return torch.vmap(torch.vmap(lambda row: row * row.sum() + m.w[0, 0]), in_dims=1, out_dims=1)(x)


def attention_mask(m, x, mask):
    """As transformers makes masks from a function of indices, two of them here."""
    b, q = (torch.arange(x.shape[d], device=x.device) for d in (0, 1))
    allowed = lambda b, q, k: (q >= k) & mask[b, k]
    for dims in ((None, None, 0), (None, 0, None), (0, None, None)):
        allowed = torch.vmap(allowed, in_dims=dims)
    with TransformGetItemToIndex():
        allowed = allowed(b, q, q)
    return (x @ x.mT).masked_fill(~allowed, 0.0) @ x


def partly(m, x, mask):
    """What the mapped function computes without gradients has none."""

    def body(row):
        with torch.no_grad():
            scale = row.square().sum()
        return row * scale

    return torch.vmap(body)(x)


def call(rows=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 6, H, dtype=torch.float64, generator=generator)
    return {"x": x, "mask": torch.rand(rows, 6, generator=generator) > 0.3}


@pytest.mark.parametrize("body", [weights, rows, attention_mask, partly], ids=lambda body: body.__name__)
def test_as_the_model(body):
    model = Mapped(body).double()
    traced = trace(model, kwargs=call())
    assert traced.static == [] and traced.sizes.keys() >= {"batch", "sequence"}
    assert "of two steps" in check_trace(model, traced)
    assert torch.equal(traced(model, **call(5)), model(**call(5)))
    parity(model, "dp=2", call())


class Twice(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3


def test_a_function_under_a_map_has_nothing_to_learn():
    """Its operators are recorded, so its own backward would be lost."""
    learns = lambda m, x, mask: torch.vmap(Twice.apply)(x)
    with pytest.raises(TraceError, match=r"Twice.apply under a transform .* \| at .*test_maps.py"):
        trace(Mapped(learns), kwargs=call())
    model = Mapped(lambda m, x, mask: x * torch.vmap(Twice.apply)(mask.double())[..., None]).double()
    assert "of two steps" in check_trace(model, trace(model, kwargs=call()))
