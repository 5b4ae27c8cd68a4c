"""The capture check by itself, on a trace made directly: what it refuses, what it passes, and that the model
is as it was."""

import contextlib
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedfx.checking import full as check_full
from tedfx.checking import sample as check_sample
from tedfx.checking import steps as check_steps
from tedfx.checking.full import check_program, check_trace
from tedfx.checking.sample import sample
from tedfx.compiler import default_passes
from tedfx.errors import CaptureError, ConfigError
from tedfx.options import Options
from tedfx.placement.roles import MeshShape, Roles
from tedfx.stages.graphs import GlobalGraph
from tedfx.trace.export import trace
from tests.capture.silent import SILENT, Assigned, Net, parameter_hook
from tests.marks import slow

X = {"x": torch.zeros(2, 5, 8)}


class Blind:
    """An `Observation` that sees nothing."""

    def __init__(self, model):
        pass

    def watching(self):
        return contextlib.nullcontext()

    def remember(self, names):
        pass

    def settle(self, first, again):
        pass

    def observed(self):
        return {}


@pytest.fixture(autouse=True)
def without_finders(monkeypatch):
    """What looks while a model is traced is off: the check is the net below it."""
    nothing = lambda *args: contextlib.nullcontext()
    for name, stand_in in {
        "Observation": Blind,
        "refuse_hooks": nothing,
        "refuse_side_gradients": nothing,
        "kept_calls": nothing,
    }.items():
        monkeypatch.setattr(f"tedfx.trace.export.{name}", stand_in)


def told(model, **inputs):
    return check_trace(model, trace(model, kwargs=inputs or X))


def error_of(line):
    return float(line.split("largest relative difference ")[1].split()[0])


@pytest.mark.parametrize("name", SILENT)
def test_what_trains_otherwise_is_refused(name):
    make, what = SILENT[name]
    model = make()
    with pytest.raises(
        CaptureError,
        match=rf"does not train as the model does: {what} differs by .* \(allowed 1e-0.\), in float64 \| ",
    ) as error:
        told(model)
    assert "\n" not in str(error.value)


def test_what_trains_alike_passes_and_is_as_it_was():
    class Counts(Net):
        def __init__(self):
            super().__init__()
            self.calls, self.seen, self.half = (
                0,
                {"sizes": []},
                torch.full((8,), 0.5),
            )  # of its own, read by nothing
            self.register_buffer("total", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            self.calls += 1
            self.seen["sizes"].append(len(x.shape))
            self.total.add_(1)
            return super().forward(x * self.half)

    model = Counts()
    model.first.bias.requires_grad_(False)
    model.inner.eval()
    traced = trace(model, kwargs=X)
    (model(torch.randn(2, 5, 8))["loss"] * 1).backward()
    grads = {n: (p.grad, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()}
    tensors = {
        n: (t, t.data_ptr(), t.dtype, t.detach().clone())
        for n, t in [*model.named_parameters(), *model.named_buffers()]
    }
    before, seen, state = copy.deepcopy((model.calls, model.seen)), model.seen["sizes"], torch.get_rng_state()
    line = check_trace(model, traced)
    assert "in float64" in line and "gradients of two steps" in line and error_of(line) < 1e-14
    assert (
        (model.calls, model.seen) == before
        and model.seen["sizes"] is seen
        and torch.equal(torch.get_rng_state(), state)
    )
    assert [m.training for m in model.modules()] == [True, True, False, True]
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        was, place, dtype, value = tensors[name]
        assert t is was and (t.data_ptr(), t.dtype) == (place, dtype) and torch.equal(t, value)
    for name, p in model.named_parameters():
        assert (
            p.grad is grads[name][0]
            and (p.grad is None or torch.equal(p.grad, grads[name][1]))
            and p.requires_grad == (name != "first.bias")
        )
    with pytest.raises(CaptureError):  # and so it is after a refusal
        told(silent := SILENT["checkpoint_reentrant"][0]())
    assert (
        silent.inner.weight.grad is None
        and silent.inner.weight.dtype == torch.float32
        and all(p.requires_grad for p in silent.parameters())
    )


class Mixed(Net):
    """Written for 16 bits: softmax and the norm in float32, an eps of the dtype, a table in float32,
    dropout."""

    def __init__(self):
        super().__init__(nn.Linear(8, 8))
        self.register_buffer("table", torch.rand(8, 8))
        self.p = 0.3

    def forward(self, x):
        x = F.dropout(self.first(x), self.p, self.training)
        x = x / (x.norm(dim=-1, keepdim=True) + torch.finfo(x.dtype).eps)
        scores = torch.softmax(self.inner(x), -1, dtype=torch.float32)
        scores = scores.to(x.dtype) @ self.table.to(x.dtype)
        attended = F.scaled_dot_product_attention(x, scores, x, dropout_p=self.p if self.training else 0.0)
        return {"loss": self.last(attended).float().square().mean()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float32), slow(torch.float64)])
def test_it_is_read_in_float64_whatever_it_computes_in(dtype):
    model = Mixed().to(dtype)
    line = told(model, x=torch.zeros(2, 5, 8, dtype=dtype))
    assert line.startswith("checked against the model in float64") and error_of(line) < 1e-12
    model.last.weight.register_hook(lambda grad: grad * 1.0001)
    with pytest.raises(CaptureError, match="gradient of last.weight of step 1 differs by 1.0e-04"):
        told(model, x=torch.zeros(2, 5, 8, dtype=dtype))


class Odd(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_where_float64_cannot_be_the_models_own_dtype_is_taken():
    bits = lambda x: x * (x.view(torch.int32) >= 0)  # relu by the sign bit
    line = told(Net(Odd(bits)))
    assert (
        line.startswith("checked against the model in float32 (not in float64: it views a value's bits")
        and "gradients of two steps" in line
    )
    model = Net(Odd(bits))
    model.last.weight.register_hook(lambda grad: grad * 0.5)
    with pytest.raises(
        CaptureError, match="gradient of last.weight of step 1 differs by 1.0e.00 .* in float32"
    ):
        told(model)
    half = Net(Odd(lambda x: x * (x.view(torch.int16) >= 0))).bfloat16()
    assert "forward alone (gradients are not compared in 16 bits; not in float64" in told(
        half, x=torch.zeros(2, 5, 8, dtype=torch.bfloat16)
    )


def test_draws_that_nothing_stands_for_are_said():
    with pytest.warns(
        UserWarning, match="was not checked against the model: poisson draws at random; `tedfx verify`"
    ):
        line = told(Net(Odd(lambda x: x * torch.poisson(x.abs()))))
    assert line == "not checked against the model: poisson draws at random"


@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.bfloat16])
def test_a_typical_value_stands_for_a_draw(dtype):
    """For every distribution, in the model as in the graph, in place or not."""

    def drawn(x):
        x = x * torch.empty_like(x).uniform_(0.9, 1.1) + torch.randn_like(x) * F.softplus(x)
        x = x * torch.empty_like(x).normal_(1.0, 0.1) + torch.normal(x.detach(), 0.1)
        x = x - torch.empty_like(x).exponential_().log() + torch.empty_like(x).geometric_(0.5)
        x = x * torch.empty_like(x).bernoulli_(0.5) + torch.bernoulli(x.sigmoid()) + torch.rand_like(x)
        x = x + 0.1 * torch.empty_like(x).cauchy_() + torch.empty_like(x).log_normal_(0.0, 0.1)
        x = x * torch.randint(1, 3, (8,), device=x.device) + torch.randint_like(x.detach(), 3) + torch.rand(8)
        return x + torch.multinomial(x.softmax(-1).flatten(0, 1), 2).sum(-1).view(*x.shape[:2], 1)

    line = told(Net(Odd(drawn)).to(dtype), x=torch.zeros(2, 5, 8, dtype=dtype))
    assert line.startswith("checked against the model in float64") and error_of(line) < 1e-12


def test_every_output_and_not_those_that_were_not_asked_for():
    class Two(Net):
        def forward(self, x, weights):
            y = self.first(x) * weights["w"][0]
            return y, (self.inner(y).sum(-1), self.last(y))

    model = Two()
    inputs = dict(
        x=torch.zeros(2, 5, 8), weights={"w": [torch.zeros(2, 5, 8)], "b": None}
    )  # nested inputs are made in their containers
    traced = trace(model, kwargs=inputs)
    assert error_of(check_trace(model, traced)) < 1e-14
    model.last.weight.register_hook(lambda grad: grad * 2)
    with pytest.raises(CaptureError, match="gradient of last.weight of step 1"):
        check_trace(model, traced)
    program = GlobalGraph.of(
        traced, Roles.resolve(MeshShape.of("dp=2")), set(), options=Options(outputs=("0",))
    )
    assert "no gradient reaches" in check_program(program, Two())


def test_integers_that_the_model_takes_are_found():
    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 3)

        def forward(self, ids, labels):
            return F.cross_entropy(self.head(self.embed(ids).mean(1)), labels)

    ids = torch.zeros(4, 6, dtype=torch.int64)
    assert error_of(told(Classes(), ids=ids, labels=ids[:, 0])) < 1e-13

    class Never(Classes):
        def forward(self, ids, labels):
            return super().forward(ids, labels + 3)

    with pytest.warns(UserWarning, match="not checked"):
        assert "fails on random inputs (IndexError: Target" in told(Never(), ids=ids, labels=ids[:, 0])


def test_in_eval_mode_two_forwards():
    model = Net(Assigned()).eval()
    with pytest.raises(CaptureError, match="buffer inner.bias of step 1"):
        told(model)
    assert "outputs and buffers of two forwards" in told(Net().eval())
    traced, model = trace(Net().eval(), kwargs=X), Net()
    with torch.inference_mode():  # where a first call of a signature may be compiled
        check_trace(model, traced)
    assert model.training


def test_a_large_model_by_samples(monkeypatch):
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layers, self.last = (
                nn.Linear(8, 8),
                nn.ModuleList(nn.Linear(8, 8) for _ in range(5)),
                nn.Linear(8, 40),
            )

        def forward(self, x):
            x = self.embed(x)
            for layer in self.layers:
                x = layer(x).tanh()
            return self.last(x)

    model = Deep().bfloat16()
    traced = trace(model, kwargs={"x": X["x"].bfloat16()})
    assert sample(model, traced) is None
    layers = {f"layers.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert sample(model, traced, 240) == layers | {"embed.bias"}
    assert sample(model, traced, 400) == layers | {"embed.bias", "embed.weight", "last.bias"}
    monkeypatch.setattr(check_sample, "FULL", 240)
    assert (
        "7 sampled gradients of two steps" in (line := check_trace(model, traced)) and error_of(line) < 1e-12
    )
    model.layers[1].weight.register_hook(lambda grad: grad * 0)  # a constant: not seen
    check_trace(model, traced)
    model.layers[2].weight.register_hook(lambda grad: grad * 0)
    with pytest.raises(CaptureError, match="gradient of layers.2.weight"):
        check_trace(model, traced)
    assert all(p.requires_grad for p in model.parameters())


def test_one_trace_is_checked_once(monkeypatch):
    model, runs = Net(), []
    monkeypatch.setattr(
        check_full,
        "two_steps",
        lambda *args, **kwargs: runs.append(args) or check_steps.two_steps(*args, **kwargs),
    )
    traced = trace(model, kwargs=X)
    lines = {
        check_program(GlobalGraph.of(traced, Roles.resolve(MeshShape.of(mesh)), set()), model)
        for mesh in ("dp=2", "tp=2", "dp=2,tp=2")
    }
    assert len(lines) == len(runs) == 1
    check_program(GlobalGraph.of(traced, Roles.resolve(MeshShape.of("dp=2")), set()), Net())  # another model
    assert len(runs) == 2


def test_levels():
    model = parameter_hook()
    program = GlobalGraph.of(trace(model, kwargs=X), Roles.resolve(MeshShape.of("dp=2")), set())
    assert check_program(program, model, "none") == "not checked against the model: check='none'"
    assert check_program(program, model, "forward").startswith(
        "checked against the model, forward alone: largest relative difference"
    )
    with pytest.raises(CaptureError):
        check_program(program, model)
    with pytest.raises(ConfigError, match="check='all': one of none, forward, full"):
        default_passes(check="all")
    with pytest.warns(UserWarning, match="meta device; `tedfx verify` compares its architecture"):
        assert (
            check_program(program, Net().to("meta"))
            == "not checked against the model: its parameters are on the meta device"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_program(program, model, "none")
