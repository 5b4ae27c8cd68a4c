"""What a forward does to autograd on the side is refused at its line, before anything runs; what changes
nothing is let be.
"""

import pytest
import torch
from torch import nn
from torch.autograd.graph import register_multi_grad_hook, save_on_cpu, saved_tensors_hooks

from tedfx.errors import TraceError
from tedfx.trace.export import trace
from tests.passes.helpers import parity


class Net(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.linear, self.body = nn.Linear(8, 8), body
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x):
        return self.body(self, self.linear(x)).sum()


def traced(body):
    torch.manual_seed(0)
    return trace(Net(body).double(), kwargs={"x": torch.randn(4, 6, 8, dtype=torch.float64)})


def hook(m, x):
    x.register_hook(lambda g: 2 * g)
    return x


def parameter_hook(m, x):
    m.linear.weight.register_hook(lambda g: 2 * g)
    return x


def retained(m, x):
    x.retain_grad()
    return x


def several(m, x):
    register_multi_grad_hook((x, x * 2), lambda g: None)
    return x


def node(m, x):
    x.grad_fn.register_hook(lambda a, b: None)
    return x


def packed(m, x):
    with saved_tensors_hooks(lambda t: t * 2, lambda t: t):
        return x * x


def inner(m, x):
    (g,) = torch.autograd.grad(x.pow(2).sum(), x, create_graph=True)
    return x + g


def backward(m, x):
    x.sum().backward()
    return x


def functional(m, x):
    return torch.func.grad(lambda y: (y**2).sum())(x)


def tangent(m, x):
    return torch.func.jvp(torch.sin, (x,), (x,))[1]


def assigned(m, x):
    y = x * 1
    y.data = x * 2
    return y


def parameter_data(m, x):
    m.linear.weight.data.mul_(0.5)
    return x


def read_later(m, x):
    y = x * 1
    y.data.mul_(2)
    return y


REFUSED = [
    (hook, "register_hook on a tensor in forward"),
    (parameter_hook, "register_hook on a tensor in forward"),
    (retained, "retain_grad on a tensor in forward"),
    (several, "in forward"),
    (node, "grad_fn is read in forward"),
    (packed, "saved_tensors_hooks in forward"),
    (inner, "torch.autograd.grad inside of forward"),
    (backward, "backward.* inside of forward"),
    (functional, "a gradient by torch.func inside of forward"),
    (tangent, "a gradient by torch.func inside of forward"),
    (assigned, "x.data = .. in forward"),
]


@pytest.mark.parametrize("body, cause", REFUSED, ids=[b.__name__ for b, _ in REFUSED])
def test_refused_at_its_line(body, cause):
    with pytest.raises(TraceError, match=cause) as error:
        traced(body)
    lines = range(body.__code__.co_firstlineno, body.__code__.co_firstlineno + 4)
    assert any(f"at {__file__}:{line} |" in str(error.value) for line in lines), error.value


def test_a_write_through_data_is_one_through_detach():
    with pytest.raises(TraceError, match=r"the model writes into parameter [a-z.]+ \| at "):
        parity_of(parameter_data)
    with pytest.raises(TraceError, match="writes through detach"):
        parity_of(read_later)


def read(m, x):
    return x - x.data.mean(-1, keepdim=True)


def buffer(m, x):
    with torch.no_grad():
        m.seen.data.copy_(x.data.abs().sum((0, 1)))
    return x * m.seen


def offloaded(m, x):
    with save_on_cpu():
        return x * x


def parity_of(body):
    torch.manual_seed(0)
    return parity(Net(body).double(), "dp=2,tp=2", {"x": torch.randn(4, 6, 8, dtype=torch.float64)})


@pytest.mark.parametrize("body", [read, offloaded], ids=lambda b: b.__name__)
def test_kept(body):
    parity_of(body)
