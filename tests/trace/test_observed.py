"""What a traced forward does beside its operators: kept, or refused by its name; and the model is as it
was."""

import functools
import itertools
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from tedfx.errors import TraceError
from tedfx.passes.base import run_pipeline
from tedfx.passes.functionalize import Functionalize
from tedfx.stages.graphs import GlobalGraph
from tedfx.trace.export import trace
from tests.marks import slow_but

CALLS = 0
SCALE = 2.0


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)
        self.register_buffer("b", torch.zeros(8))
        self.register_buffer("c", torch.ones(8))
        self.register_buffer("n", torch.zeros((), dtype=torch.long))
        self.table, self.items, self.step, self.aux, self.ema = {}, [], 0, 0.0, torch.zeros(8)
        self.functions = [_another()]
        self.config, self.numpy, self.python = Config(), np.random.default_rng(0), random.Random(0)

    @functools.cached_property
    def cached(self):
        return 3


class Config:
    def __init__(self):
        self.k = 0.5


KINDS = {}


def kind(function):
    KINDS[function.__name__] = type(function.__name__, (Base,), {"forward": function})
    return function


def inputs(seed=0):
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(seed))


# ---- buffers that are assigned -----------------------------------------------------------------------------


@kind
def assigned(self, x):
    y = self.linear(x) * self.b.cos()
    self.b = self.b + 0.1 * x.mean((0, 1)).detach()
    self.b = 0.9 * self.b
    self.n = self.n + 1
    return y


@kind
def assigned_under_no_grad(self, x):
    with torch.no_grad():
        self.b = self.b.lerp(self.linear(x).mean((0, 1)), 0.1)
    self._buffers["n"] = self.n + 1
    return self.linear(x) * self.b


@kind
def assigned_each_other(self, x):
    self.b, self.c = self.c, self.b + 1
    return self.linear(x) * self.b


@pytest.mark.parametrize("name", ["assigned", "assigned_under_no_grad", "assigned_each_other"])
def test_an_assigned_buffer_is_written(name):
    model = KINDS[name]()
    before = dict(model.named_buffers())
    traced = trace(model, kwargs={"x": inputs()})
    traced = run_pipeline(GlobalGraph.of(traced), [Functionalize()]).trace
    assert all(b is before[n] for n, b in model.named_buffers())
    other = KINDS[name]()
    for step in range(3):
        outputs = traced.graph_module(
            *(t.clone() for t in traced.state(model)), *traced.flatten((inputs(step),))
        )
        assert torch.equal(traced.unflatten(outputs), other(inputs(step)))
        for buffer, value in zip(traced.mutated_buffers, outputs):
            model.get_buffer(buffer).copy_(value)
        assert all(torch.equal(b, dict(other.named_buffers())[n]) for n, b in model.named_buffers())


# ---- refused -----------------------------------------------------------------------------------------------


@kind
def with_gradient(self, x):
    self.b = self.b + self.linear(x).mean((0, 1))
    return self.linear(x)


@kind
def another_shape(self, x):
    self.b = torch.zeros(4)
    return self.linear(x)


@kind
def another_dtype(self, x):
    self.n = self.n + 0.5
    return self.linear(x)


@kind
def new_buffer(self, x):
    self.register_buffer("q", torch.zeros(4))
    return self.linear(x)


@kind
def new_parameter(self, x):
    self.linear.weight = nn.Parameter(self.linear.weight * 2)
    return self.linear(x)


@kind
def counter(self, x):
    self.step += 1
    return self.linear(x) / self.step


@kind
def in_a_dict(self, x):
    self.table["s"] = self.table.get("s", 0) + 1
    return self.linear(x) / self.table["s"]


@kind
def in_a_list(self, x):
    self.items.append(1)
    return self.linear(x) / len(self.items)


@kind
def in_a_config(self, x):
    self.config.k *= 0.9
    return self.linear(x) * self.config.k


@kind
def in_a_global(self, x):
    global CALLS
    CALLS += 1
    return self.linear(x) / CALLS


@kind
def on_the_class(self, x):
    type(self).calls = getattr(type(self), "calls", 0) + 1
    return self.linear(x) / type(self).calls


def _helper(x, seen=[]):  # noqa: B006
    seen.append(1)
    return x / len(seen)


@kind
def in_a_default(self, x):
    return _helper(self.linear(x))


def _closure():
    count = 0

    def in_a_closure(self, x):
        nonlocal count
        count += 1
        return self.linear(x) / count

    return in_a_closure


kind(_closure())


def _another():
    calls = 0

    def count(x):
        nonlocal calls
        calls += 1
        return x / calls

    return count


@kind
def in_a_function_that_it_holds(self, x):
    return self.linear(x) + sum(f(x) for f in self.functions)


@kind
def running_mean(self, x):
    self.ema = 0.9 * self.ema + x.mean((0, 1)).detach()
    return self.linear(x) * self.ema


@kind
def running_mean_in_place(self, x):
    self.ema.mul_(0.9).add_(x.mean((0, 1)).detach())
    return self.linear(x) * self.ema


@kind
def first_call_only(self, x):
    if self.step == 0:
        self.step = 1
        return self.linear(x)
    return self.linear(x) * 2


@kind
def left_for_others(self, x):
    self.aux = self.linear(x).sum()
    return self.linear(x)


@kind
def python_draw(self, x):
    return x if random.uniform(0, 1) < 0.5 else self.linear(x)  # the draw


@kind
def python_object_draw(self, x):
    return self.linear(x) * self.python.random()  # the draw


@kind
def numpy_draw(self, x):
    return self.linear(x) * float(np.random.rand())  # the draw


@kind
def numpy_object_draw(self, x):
    return self.linear(x) * float(self.numpy.random())  # the draw


@kind
def torch_seed(self, x):
    torch.manual_seed(3)  # the draw
    return self.linear(x)


REFUSED = {
    "with_gradient": "buffer b",
    "another_shape": "buffer b",
    "another_dtype": "buffer n",
    "new_buffer": "buffer q",
    "new_parameter": "parameter linear.weight",
    "counter": "attribute step",
    "in_a_dict": "attribute table['s']",
    "in_a_list": "attribute items",
    "in_a_config": "attribute config.k",
    "in_a_global": "CALLS",
    "on_the_class": "on_the_class.calls",
    "in_a_default": "seen of _helper",
    "in_a_closure": "count of",
    "in_a_function_that_it_holds": "calls of",
    "running_mean": "attribute ema",
    "running_mean_in_place": "attribute ema",
    "first_call_only": "attribute step",
    "left_for_others": "attribute aux",
    "python_draw": "Python's random",
    "python_object_draw": "python",
    "numpy_draw": "numpy.random",
    "numpy_object_draw": "numpy",
    "torch_seed": "torch's default generator",
}


FAST = ("with_gradient", "new_buffer", "counter", "in_a_dict", "in_a_global", "in_a_closure")
FAST += ("running_mean", "left_for_others", "python_draw", "torch_seed")


@pytest.mark.parametrize("name", slow_but(FAST, REFUSED))
def test_refused_by_name_and_put_back(name):
    model = KINDS[name]()

    def state():
        held = (
            {k: repr(v) for k, v in vars(model).items()},
            repr(model.config.k),
            CALLS,
            len(_helper.__defaults__[0]),
            KINDS[name].__dict__.get("calls"),
        )
        return (
            held,
            random.getstate(),
            model.python.getstate(),
            model.numpy.bit_generator.state,
            np.random.get_state()[2],
            torch.get_rng_state().tolist(),
        )

    before = state()
    with pytest.raises(TraceError) as error:
        trace(model, kwargs={"x": inputs()})
    assert REFUSED[name] in str(error.value) and "\n" not in str(error.value)
    if "draws from" in str(error.value):
        number = int(str(error.value).partition("test_observed.py:")[2].partition(" ")[0])
        assert open(__file__).read().splitlines()[number - 1].endswith("# the draw")
    assert state() == before


# ---- of no consequence -------------------------------------------------------------------------------------


@kind
def passed_on(self, x):
    self.aux = self.linear(x).sum()
    return self.linear(x) * self.aux


@kind
def remembered(self, x):
    return self.linear(x) * self.cached * self.config.k * SCALE * getattr(self, "gain", 1.0)


@pytest.mark.parametrize("name", ["passed_on", "remembered"])
def test_what_no_other_call_sees_is_kept(name):
    model = KINDS[name]()
    before = {k: repr(v) for k, v in vars(model).items()}
    traced = trace(model, kwargs={"x": inputs()})
    assert {k: repr(v) for k, v in vars(model).items()} == before
    assert torch.equal(traced(model, inputs()), KINDS[name]()(inputs()))
    assert ("", "cached") not in traced.observed  # forward sets it itself, to what it stays


def test_what_is_read_is_known():
    observed = trace(KINDS["remembered"](), kwargs={"x": inputs()}).observed
    assert observed["", "config", "k"] == 0.5 and observed["<code>", f"SCALE of {__name__}"] == 2.0
    assert ("", "gain") in observed and ("", "step") not in observed


def test_parametrizations():
    """Of torch's own, each form: traced as it is, written buffers included, or refused."""
    for wrap in (
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ):
        model = KINDS["remembered"]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrap(model.linear)
        try:
            traced = trace(model, kwargs={"x": inputs()})
            traced = run_pipeline(GlobalGraph.of(traced), [Functionalize()]).trace
        except TraceError as error:
            assert "\n" not in str(error), wrap
            continue
        out = traced.unflatten(
            traced.graph_module(*(t.clone() for t in traced.state(model)), *traced.flatten((inputs(),)))
        )
        torch.testing.assert_close(out, model(inputs()), msg=str(wrap))


# ---- hooks -------------------------------------------------------------------------------------------------

HOOKS = {
    "parameter linear.weight": lambda m: m.linear.weight.register_hook(lambda g: g / 2),
    "parameter linear.bias": lambda m: m.linear.bias.register_post_accumulate_grad_hook(lambda p: None),
    "module linear": lambda m: m.linear.register_full_backward_hook(lambda *a: None),
    "module remembered": lambda m: m.register_full_backward_pre_hook(lambda *a: None),
    "backward of all modules": lambda m: nn.modules.module.register_module_full_backward_hook(
        lambda *a: None
    ),
}


@pytest.mark.parametrize("name", HOOKS)
def test_backward_hooks_are_refused(name):
    model = KINDS["remembered"]()
    handle = HOOKS[name](model)
    try:
        with pytest.raises(TraceError, match=name):
            trace(model, kwargs={"x": inputs()})
    finally:
        handle.remove()


def test_forward_hooks_are_kept():
    def model():
        made = KINDS["remembered"]()
        made.linear.register_forward_pre_hook(lambda m, a: (a[0] * 2,))
        made.linear.register_forward_hook(lambda m, a, k, out: out + 1, with_kwargs=True)
        made.register_forward_hook(lambda m, a, out: out * 3, always_call=True)
        made.register_forward_pre_hook(
            lambda m, a, k: (a, {"x": k["x"] + 1}) if k else ((a[0] + 1,), k), with_kwargs=True
        )
        return made

    traced = trace(model(), kwargs={"x": inputs()})
    assert torch.equal(traced(model(), inputs()), model()(x=inputs()))


def test_a_hook_on_the_model_that_counts_is_refused():
    model, seen = KINDS["remembered"](), itertools.count(1)
    model.seen = seen
    model.register_forward_hook(lambda m, a, out: out * next(m.seen))
    with pytest.raises(TraceError, match="seen"):
        trace(model, kwargs={"x": inputs()})


def test_a_table_that_makes_its_items_is_compared_by_what_it_holds():
    """transformers' tables of classes load every model when they are asked for their items."""
    from collections import OrderedDict

    from tedfx.trace.reads import freeze

    class Lazy(OrderedDict):
        def items(self):
            raise ValueError("could not load")

    assert freeze(Lazy(a=1)) == (Lazy, (("a", 1),)) and freeze(Lazy()) == (Lazy, ())
