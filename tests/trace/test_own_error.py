"""A trace that fails because the model does says so, with the model's own error; one that fails for the
trace's sake says what to change."""

import pytest
import torch
from torch import nn

from tedfx.errors import TraceError
from tedfx.trace.export import trace


class Counting(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.linear, self.calls, self.own = nn.Linear(8, 12), 0, forward
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.total += 1
        return self.own(self.linear(x))


def wrong_size(x):
    return x.view(x.shape[0], 5, -1)


def refuses(x):
    raise ValueError("hidden_size must be divisible\nby num_heads")


def asks(x):
    return x * 2 if x.sum() > 1 else x


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "forward, says",
    [
        (
            wrong_size,
            r"the model itself fails on this input.*: RuntimeError: shape '\[2, 5, -1\]' is invalid .* "
            r"\| at .*test_own_error.py:LINE \| make model\(\*\*inputs\) run",
        ),
        (
            refuses,
            r"the model itself fails on this input.*: ValueError: hidden_size must be divisible by "
            r"num_heads \| at .*test_own_error.py:LINE \|",
        ),
        (asks, r"cannot trace: the model's Python asks for a value .* \| at .*test_own_error.py:LINE \|"),
    ],
    ids=["wrong_size", "refuses", "asks"],
)
def test_whose_fault_it_is(forward, says, device):
    model = Counting(forward).to(device)
    before = {
        n: (t, t.requires_grad, None if t.is_meta else t.detach().clone())
        for n, t in [*model.named_parameters(), *model.named_buffers()]
    }
    with pytest.raises(
        TraceError, match="^" + says.replace("LINE", str(forward.__code__.co_firstlineno + 1))
    ) as error:
        trace(model, kwargs={"x": torch.ones(2, 3, 8)})
    assert "\n" not in str(error.value) and ("on tensors without values" in str(error.value)) == (
        device == "meta" and forward is not asks
    )
    assert model.calls == 0
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        was, grad, value = before[name]
        assert t is was and t.requires_grad == grad and (value is None or torch.equal(t, value))
