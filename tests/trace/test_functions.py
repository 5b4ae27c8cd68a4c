"""Functions with a gradient of the user's own: what a rank computes with them, and what cannot be one."""

import pytest
import torch
from torch import nn
from torch.autograd import Function

from tedfx.errors import CaptureError, TraceError
from tedfx.ops.function import kept_of
from tedfx.trace.export import trace
from tests.marks import slow, slow_but
from tests.models_functions import FUNCTIONS, AddLoss, Block, Clip, Half, Mixture, Model, Norm, Reverse
from tests.passes.helpers import parity, typed

CALL = {
    "input_ids": torch.randint(0, 64, (4, 6), generator=torch.Generator().manual_seed(3)),
    "labels": torch.randint(0, 64, (4, 6), generator=torch.Generator().manual_seed(4)),
}
CUT = {"dedup": True, "sequence_parallel": True}


def made(build):
    torch.manual_seed(0)
    return build().double()


# Of the call (the first, where there are several) on dp=2,tp=2: its type. Row-wise ones gather nothing,
# and let partial sums through where they are linear.
TYPES = {
    "round": "dp:S(0)",
    "round_weight": "dp:R tp:S(1)",
    "reverse": "dp:S(0) tp:P",
    "twice": "dp:S(0) tp:P",
    "two": "dp:S(0) tp:S(2)",
    "norm": "dp:S(0)",
    "clip": "dp:S(0) tp:P",
    "clip_norm": "tp:P",
    "clip_weight": "tp:S(1)",
    "half": "dp:S(0) tp:P",
    "no_grad": "dp:S(0)",
    "weights_with_loss": "dp:S(0)",
    "output_with_loss": "dp:S(0) tp:P",
}


@pytest.mark.parametrize(
    "name", slow_but(["twice", "half", "in_experts", "output_with_loss", "cube"], FUNCTIONS)
)
def test_same_loss_and_gradients(name):
    model = made(FUNCTIONS[name])
    program = parity(model, "dp=2,tp=2", CALL)
    calls = [n for n in program.graph_module.graph.nodes if kept_of(n.target)]
    assert len(calls) == {"twice": 3, "two": 2, "in_experts": 2}.get(
        name, int(name not in ("cube", "reentrant", "not_reentrant", "first_layer"))
    )
    if name in TYPES:
        assert typed(calls[0]) == TYPES[name]
    if name in ("mix", "swish", "norm", "clip", "in_experts", "output_with_loss"):
        parity(model, "ep=2,tp=2", CALL, **CUT)


def test_a_gradient_that_is_not_linear_sees_whole_cotangents():
    """On an axis where all is replicated the others' cotangents are summed first: the operand is I, not R."""
    model = made(lambda: Model(Block(lambda b, x: Clip.apply(torch.relu(x)) @ b.linear.weight)))
    program = parity(model, "tp=2", CALL)
    (call,) = [n for n in program.graph_module.graph.nodes if kept_of(n.target)]
    assert typed(call) in ("I", "tp:S(2)")


def test_an_auxiliary_loss_is_never_summed():
    """Its value is read by nobody: it stays a partial sum."""
    program = parity(made(FUNCTIONS["weights_with_loss"]), "dp=2", CALL)
    (call,) = [n for n in program.graph_module.graph.nodes if kept_of(n.target)]
    assert call.meta["relation"].constant == call.meta["relation"].unread == {1}


def test_runs_in_the_autocast_region_of_its_call():
    """Half casts its operands to float32 and runs with autocast off; the product in Product's forward is
    cast.
    """
    torch.manual_seed(0)
    model = Model(
        Block(lambda b, x: Half.apply(x, b.linear.weight) + Product.apply(x, b.linear.weight)), nn.Identity()
    )
    with torch.autocast("cpu", torch.bfloat16):
        traced = trace(model, kwargs=CALL)
        expected = model(**CALL)
    expected.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = traced(model, **CALL)
    loss.backward()
    assert traced.lowered == {torch.bfloat16} and torch.equal(loss, expected)
    assert all(torch.equal(p.grad, wanted[n]) for n, p in model.named_parameters() if n in wanted)


class Product(Function):
    """Forward of its own under autocast, like any code."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return (grad.to(weight.dtype) @ weight.t()).to(x.dtype), 2 * x.flatten(0, -2).t().to(
            weight.dtype
        ) @ grad.flatten(0, -2).to(weight.dtype)


# ---- refused -------------------------------------------------------------------------------------------
# -----------------

LINEAR = nn.Linear(32, 32).double()


class Closure(Function):
    @staticmethod
    def forward(ctx, x):
        return x @ LINEAR.weight.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


class ClosureBackward(Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad @ LINEAR.weight.detach()


class WithModule(Function):
    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        return module(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Dirty(Function):
    @staticmethod
    def forward(ctx, x):
        x.mul_(2)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class DirtyGradient(Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad.mul_(2)


class Draws(Function):
    @staticmethod
    def forward(ctx, x):
        return x + torch.rand_like(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class Values(Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad / max(1.0, grad.norm().item())


class Numbers(Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1, 3

    @staticmethod
    def backward(ctx, grad, _):
        return grad


class Numpy(Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy() * 1)

    @staticmethod
    def backward(ctx, grad):
        return grad


def once(function, *more):
    def body(block, x):
        out = function.apply(x, *(block.linear if m == "linear" else m for m in more))
        return out[0] if isinstance(out, tuple) else out

    return lambda: Model(Block(body))


REFUSED = [
    (once(Closure), "Closure.forward reads a tensor .* that is not among its arguments", Closure.forward, 1),
    (
        once(ClosureBackward),
        "ClosureBackward.backward reads a tensor .* that is not among its arguments",
        ClosureBackward.backward,
        1,
    ),
    (
        once(WithModule, "linear"),
        "WithModule.forward reads a tensor .* that is not among its arguments",
        WithModule.forward,
        2,
    ),
    (once(Dirty), "Dirty.forward writes into an argument", Dirty.forward, 1),
    (
        once(DirtyGradient),
        "DirtyGradient.backward writes into a tensor that it was given",
        DirtyGradient.backward,
        1,
    ),
    (once(Draws), "Draws.forward draws random numbers", Draws.forward, 1),
    (once(Values), "the gradient of Values cannot be traced without values", Values.backward, 1),
    (once(Numbers), "Numbers.forward returns something that is not a tensor", Numbers.forward, -1),
    (once(Numpy), "Numpy.forward cannot run on tensors without values", Numpy.forward, 1),
]


FAST = (Closure.forward, DirtyGradient.backward, Values.backward, Numbers.forward)


@pytest.mark.parametrize(
    "build, cause, code, at",
    [each if each[2] in FAST else slow(*each) for each in REFUSED],
    ids=[c.__qualname__ for *_, c, _ in REFUSED],
)
def test_refused_at_its_line(build, cause, code, at):
    with pytest.raises(TraceError, match=cause) as error:
        trace(made(build), kwargs=CALL)
    line = code.__code__.co_firstlineno + 1 + at
    assert f"at {__file__}:{line if at > 0 else code.__code__.co_firstlineno} |" in str(error.value)


def test_a_size_made_by_division_is_refused():
    with pytest.raises(TraceError, match="a number made from sizes"):
        trace(made(lambda: Model(Block(lambda b, x: Reverse.apply(x, 1 / x.shape[0])))), kwargs=CALL)


def test_what_returns_its_operand_may_not_see_it_change():
    def body(block, x):
        y = x * 1
        out = Reverse.apply(y, 1.0)
        y.add_(1)
        return out

    with pytest.raises(
        TraceError, match="is a view and its base or another view of its base has been modified inplace"
    ):
        trace(made(lambda: Model(Block(body))), kwargs=CALL)


class LossInExperts(Mixture):
    def expert(self, e, x):
        return AddLoss.apply(self.experts[e](x), self.gate.weight.sum())


class NormInExperts(Mixture):
    def expert(self, e, x):
        return Norm.apply(self.experts[e](x), self.experts[e][2].bias)


class SharedInExperts(Mixture):
    def expert(self, e, x):
        return self.experts[e](x) * Clip.apply(self.gate.weight.sum())


@pytest.mark.parametrize("mixture", [slow(LossInExperts), NormInExperts, slow(SharedInExperts)])
def test_experts_take_elementwise_functions_only(mixture):
    with pytest.raises(CaptureError, match=r"(AddLoss|Clip|Norm).apply .* \| at .*test_functions.py"):
        parity(made(lambda: Model(mixture=mixture())), "dp=2", CALL)
