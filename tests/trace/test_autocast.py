"""Autocast as casts in the graph: bit by bit what eager mode computes under it, outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedfx.errors import TraceError
from tedfx.trace.export import trace
from tests.marks import slow
from tests.module.mixed import Dense

aten = torch.ops.aten


class Regions(nn.Module):
    """Nested and disabled regions, a promoting op, losses in float32, a composite whose parts are cast, an
    in-place op."""

    def __init__(self):
        super().__init__()
        self.l, self.r, self.n = nn.Linear(8, 8), nn.Linear(8, 4), nn.LayerNorm(8)

    def forward(self, x, labels):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            k = self.l(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = self.n(self.l(x))
            with torch.autocast("cpu", enabled=False):
                g = self.r(x).softmax(-1)
                with torch.autocast("cpu", torch.bfloat16):
                    g = g + self.r(x)
            z = torch.cat([y, x], -1)
            q = F.scaled_dot_product_attention(y[None], y[None], x[None])[0]
            e = torch.einsum("bsi,oi->bso", x, self.l.weight)
            y = (self.l(y) * g.sum()).to(y.dtype).add_(q) + e + k
            return y, z, F.cross_entropy(y.flatten(0, -2), labels.flatten()), F.mse_loss(y, x)


def results(model, call, x):
    """Outputs, and the gradients of their sum."""
    model.zero_grad()
    x.grad = None
    outputs = call(x)
    sum(out.float().square().sum() for out in outputs).backward()
    return [*outputs, *(p.grad.clone() for p in model.parameters()), x.grad]


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and torch.equal(a, e)


def test_regions_of_the_model():
    torch.manual_seed(0)
    model, x, labels = Regions(), torch.randn(5, 7, 8, requires_grad=True), torch.randint(8, (5, 7))
    t = trace(model, kwargs={"x": x, "labels": labels})
    assert t.autocast is None and t.lowered == {torch.bfloat16}
    assert_same(
        results(model, lambda x: t(model, x=x, labels=labels), x),
        results(model, lambda x: model(x, labels), x),
    )
    assert not any(isinstance(n.target, torch._ops.HigherOrderOperator) for n in t.graph_module.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)])
def test_around_the_call(dtype):
    """A weight is cast once however often it is used, an activation at each use; no_grad inside is kept."""
    torch.manual_seed(0)
    model, x = Dense(), torch.randn(3, 5, 16, requires_grad=True)
    with torch.autocast("cpu", dtype):
        t = trace(model, kwargs={"x": x})
    assert (t.autocast.dtype, t.lowered) == (dtype, {dtype})

    def under(x):
        with torch.autocast("cpu", dtype):
            return [model(x)]

    expected = results(model, under, x)
    assert_same(results(model, lambda x: [t(model, x=x)], x), expected)
    with torch.autocast("cpu", dtype):
        inside = trace(model, kwargs={"x": x})
    assert str(inside.graph_module.code) == str(t.graph_module.code)
    plain = results(model, lambda x: [model(x)], x)
    assert not any(torch.equal(a, e) for a, e in zip(plain, expected))
    weights = [
        n
        for n in t.graph_module.graph.nodes
        if n.target is aten.to.dtype and n.args[0].op == "placeholder" and n.args[0].name in t.parameters
    ]
    assert len([n for n in weights if n.args[1] == dtype]) == 3


def test_a_disabled_region_is_plain_code():
    model, x = Dense(), torch.randn(3, 5, 16)
    with torch.autocast("cpu", enabled=False):
        t = trace(model, kwargs={"x": x})
    assert t.autocast is None and not t.lowered and torch.equal(t(model, x=x), model(x))


class Inside(nn.Module):
    def __init__(self, enabled, what):
        super().__init__()
        self.l, self.enabled, self.what = nn.Linear(8, 8), enabled, what

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            if self.what == "no_grad":
                with torch.no_grad():
                    x = x + self.l(x)
            else:
                x = torch.einsum("ijk,jl->il", x, self.l.weight.sum(0, keepdim=True).expand(x.shape[1], 8))
            return self.l(x)


@pytest.mark.parametrize("enabled", [True, False])
def test_no_grad_inside_a_region_is_refused(enabled):
    """torch.export drops it: gradients would be wrong."""
    with pytest.raises(
        TraceError, match=r"no_grad .* inside an autocast region.*test_autocast.py:\d+ \| put"
    ):
        trace(Inside(enabled, "no_grad"), kwargs={"x": torch.randn(6, 10, 8)})


def test_what_is_no_cast_of_operands_is_refused():
    """This einsum sums in float32 first and multiplies in bfloat16 then."""
    with pytest.raises(
        TraceError, match=r"einsum.* under autocast bfloat16: .*test_autocast.py:\d+ \| take it out"
    ):
        trace(Inside(True, "einsum"), kwargs={"x": torch.randn(6, 10, 8)})
    trace(Inside(False, "einsum"), kwargs={"x": torch.randn(6, 10, 8)})


@pytest.mark.slow
def test_experts_of_a_library_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**sizes, attn_implementation="sdpa", experts_implementation="eager")
    )
    ids = torch.randint(64, (3, 7))
    with torch.autocast("cpu", torch.bfloat16):
        t, expected = trace(model), model(input_ids=ids, labels=ids)
    found = t(model, input_ids=ids, labels=ids)
    assert found.logits.dtype == expected.logits.dtype == torch.bfloat16 and torch.equal(
        found.logits, expected.logits
    )
    linears = t.graph_module.graph.find_nodes(
        op="call_function", target=torch.ops.tedfx.grouped_linear.default
    )
    assert len(linears) == 2 and all(
        operand.meta["val"].dtype == torch.bfloat16 for n in linears for operand in n.args[:2]
    )
