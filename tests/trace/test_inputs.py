"""Which dims are the batch, and which calls fit a trace."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedfx.errors import CallError, TraceError
from tedfx.trace.call_check import CallRules
from tedfx.trace.export import trace
from tedfx.trace.input_sizes import is_batch, with_room
from tests.marks import slow


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.place, self.head = nn.Embedding(64, 16), nn.Embedding(40, 16), nn.Linear(16, 64)

    def forward(
        self, scale=None, mask=None, input_ids=None, labels=None, position_ids=None, target=None, weight=None
    ):
        x = self.embed(input_ids)
        x = x if position_ids is None else x + self.place(position_ids)
        x = x if scale is None else x * scale
        x = x if mask is None else mask @ x
        y = self.head(x)
        if weight is not None:
            return (y.sum((1, 2)) * weight).sum()
        if target is not None:
            return F.cross_entropy(y.mean(1), target)
        return F.cross_entropy(y.flatten(0, 1), labels.flatten())


def ids(*shape):
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(0))


MORE = {
    "positions": {"position_ids": torch.arange(10)},
    "row of positions": {"position_ids": torch.arange(10)[None]},
    "mask": {"mask": torch.ones(10, 10)},
    "scalar first": {"scale": torch.tensor(2.0)},
}


@pytest.mark.parametrize(
    "name, batch",
    [
        *(slow(name, 6) if name == "positions" else (name, 6) for name in MORE),
        *((name, 10) if name == "positions" else slow(name, 10) for name in MORE),
    ],
)
def test_what_has_no_batch_dim(name, batch):
    sequence, more = 10, MORE[name]
    if "mask" in more and batch == sequence:  # the first input, and square as all others are
        with pytest.raises(
            TraceError,
            match="batch and sequence are both 10, so whether mask, input_ids goes with the batch cannot be "
            "told",
        ):
            trace(Model(), kwargs={**more, "input_ids": ids(batch, sequence), "labels": ids(batch, sequence)})
        return
    t = trace(Model(), kwargs={**more, "input_ids": ids(batch, sequence), "labels": ids(batch, sequence)})
    assert t.sizes.keys() == {"batch", "sequence"}
    assert CallRules(t, 2).batch_inputs == {("input_ids",), ("labels",)}


def test_a_label_per_row_in_a_batch_of_one():
    t = with_room({"input_ids": ids(1, 10), "target": ids(1)}, lambda call: trace(Model(), kwargs=call))
    assert CallRules(t, 2).batch_inputs == {("input_ids",), ("target",)}
    assert is_batch(
        {"input_ids": ids(8, 12), "target": ids(8), "mask": torch.ones(12, 12), "n": torch.tensor(3)}
    ) == [True, True, False, False]


def test_calls_that_do_not_fit():
    class Fixed(nn.Module):
        def forward(self, x, w):
            return (x * w).sum() / x.shape[2]

    rules = CallRules(trace(Fixed(), kwargs={"x": torch.randn(4, 6, 16), "w": torch.randn(4, 6, 16)}), 2)
    rules.check_sizes({("x",): torch.zeros(2, 5, 16), ("w",): torch.zeros(2, 5, 16)})
    for x, w, line in [
        ((2, 5, 32), (2, 5, 32), "dim 2 of x is 32; expected 16, the size that was traced"),
        ((2, 5, 16), (3, 5, 16), "dim 0 of w is 3; expected 2, as dim 0 of x"),
    ]:
        with pytest.raises(CallError, match=line):
            rules.check_sizes({("x",): torch.zeros(x), ("w",): torch.zeros(w)})


def test_a_reading_that_cannot_be_told_is_refused():
    class Either(nn.Module):
        def forward(self, x, w):
            return x.sum() + w.sum()

    with pytest.raises(
        TraceError, match="batch and sequence are both 10, so whether w goes with the batch cannot be told"
    ):
        trace(Either(), kwargs={"x": torch.randn(10, 10), "w": torch.randn(10)})
