"""Small programs whose backward, or whose next step, is no function of the operators that a trace records.
`inner` is what a `Net` runs between two linears."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Net(nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.last = nn.Linear(8, 8), inner or nn.Tanh(), nn.Linear(8, 4)

    def forward(self, x):
        return {"loss": self.last(self.inner(self.first(x))).square().mean()}


class AddLoss(torch.autograd.Function):
    """DeepSeek's auxiliary loss: the identity, which gives `loss` a gradient of one."""

    @staticmethod
    def forward(ctx, x, loss):
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.new_ones(())


class Balanced(nn.Linear):
    def forward(self, x):
        return AddLoss.apply(super().forward(x), self.weight.square().sum() * 1e-3)


class Round(torch.autograd.Function):
    """Straight through: rounds forward, the identity backward."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Quantised(nn.Module):
    def forward(self, x):
        return Round.apply(x * 8) / 8


class Assigned(nn.Module):
    """A buffer that forward assigns."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.zeros(8))

    def forward(self, x):
        out = x + self.bias
        self.bias = self.bias + 0.05 * x.detach().mean((0, 1)).sign()
        return out


class Anneal(nn.Module):
    """A python number that counts steps."""

    def __init__(self):
        super().__init__()
        self.step = 0

    def forward(self, x):
        self.step += 1
        return x / self.step


class History(nn.Module):
    """A python list that forward appends to and reads."""

    def __init__(self):
        super().__init__()
        self.seen = [1.0]

    def forward(self, x):
        self.seen.append(self.seen[-1] + 1)
        return x * self.seen[-1]


class Cached(nn.Linear):
    """Keeps what it made of its weight in the first call: right until the weight is updated."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.doubled = None

    def forward(self, x):
        if self.doubled is None:
            self.doubled = self.weight.detach() * 2
        return super().forward(x) + x @ self.doubled


class Reentrant(nn.Linear):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=True)


def parameter_hook():
    net = Net()
    net.last.weight.register_hook(lambda grad: grad * 0.5)
    return net


def module_hook():
    net = Net(nn.Linear(8, 8))
    net.inner.register_full_backward_hook(lambda module, given, out: (given[0] * 0.5,))
    return net


# name -> (a model, what is named first)
SILENT = {
    "add_auxiliary_loss": (lambda: Net(Balanced(8, 8)), "gradient of inner.weight of step 1"),
    "straight_through_function": (lambda: Net(Quantised()), "gradient of first.(weight|bias) of step 1"),
    "buffer_assigned": (lambda: Net(Assigned()), "buffer inner.bias of step 1"),
    "step_counter": (lambda: Net(Anneal()), "loss of step 2"),
    "list_of_python": (lambda: Net(History()), "loss of step [12]"),
    "cached_weight": (lambda: Net(Cached(8, 8)), "loss of step 2"),
    "checkpoint_reentrant": (lambda: Net(Reentrant(8, 8)), "gradient of last.(weight|bias) of step 1"),
    "parameter_hook": (parameter_hook, "gradient of last.weight of step 1"),
    "module_backward_hook": (module_hook, "gradient of first.(weight|bias) of step 1"),
}
