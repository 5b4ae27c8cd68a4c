"""What Python asked of sizes while it was traced is a condition of the graph: it went one way then."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedfx.errors import CallError
from tedfx.trace.export import trace


def _if(n):
    c = n // 6
    if c < 3:
        c = 3
    return c


def _bucket(n):
    return next(c for c in (2, 16, 64) if c >= n // 6)


def _root(n):
    return 4 + math.isqrt(n) // 12


def _clip(n):
    return int(np.clip(n * 0.6 / 4, 2, 10))


def _rounded(n):
    return -(-n // 8) * 8


def _at_least(n):
    return max(n // 6, 3)


def _of_its_type(n):
    factor = 24 if n else 1.5
    return factor if type(factor) == int else int(factor * n / 4)  # noqa: E721


def _one_of_the_types(n):
    factor = 1.5 if n else 24
    return int(factor * n / 4) if type(factor) in (float, complex) else factor + float(n)


class Net(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number, self.e, self.l = number, nn.Embedding(64, 8), nn.Linear(8, 64)

    def forward(self, input_ids, labels):
        x = self.e(input_ids).flatten(0, 1)
        return F.cross_entropy(self.l(x / self.number(x.shape[0])), labels.flatten())


@functools.cache
def _traced(number):
    ids = torch.zeros(3, 7, dtype=torch.int64)
    return trace(Net(number), (), dict(input_ids=ids, labels=ids))


@pytest.mark.parametrize("number", [_if, _bucket, _root, _clip])
@pytest.mark.parametrize("shape", [(2, 2), (3, 7), (8, 12), (8, 40)])
def test_another_answer_is_refused(number, shape):
    """A call of other sizes is right, or it is refused."""
    t = _traced(number)
    ids = torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(1))
    model, call = Net(number), dict(input_ids=ids, labels=ids)
    assert t.conditions and len(t.static) >= len(t.conditions)
    with torch.no_grad():
        try:
            found = t(model, **call)
        except CallError as error:
            assert "the model only accepts sizes with" in str(error) and shape != (3, 7)
        else:
            assert torch.equal(found, model(**call))


@pytest.mark.parametrize("number", [_rounded, _at_least, _of_its_type, _one_of_the_types])
def test_what_is_computed_of_sizes_bounds_nothing(number):
    t, model = _traced(number), Net(number)
    assert t.conditions == []
    for shape in ((2, 2), (8, 12)):
        ids = torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(1))
        call = dict(input_ids=ids, labels=ids)
        with torch.no_grad():
            assert torch.equal(t(model, **call), model(**call))


class Wide(Net):
    """The number of classes of a one-hot, as wide as the data ask for, is read by a division too."""

    def forward(self, input_ids, labels):
        classes = max(input_ids.max() + 1, self.number)
        first = F.one_hot(input_ids, classes)[..., : self.number].sum(-1, keepdim=True)
        return F.cross_entropy(self.l(self.e(input_ids) * first / classes).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("largest", [5, 60])  # below the least number of classes, and above
def test_a_number_of_the_data_is_the_larger_one(largest):
    torch.manual_seed(0)
    model, ids = Wide(30), torch.zeros(3, 7, dtype=torch.int64)
    t = trace(model, (), dict(input_ids=ids, labels=ids))
    ids = torch.full((4, 5), largest)
    with torch.no_grad():
        torch.testing.assert_close(t(model, input_ids=ids, labels=ids), model(ids, ids))
