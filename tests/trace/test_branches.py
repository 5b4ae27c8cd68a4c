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


@pytest.mark.parametrize("number", [_rounded, _at_least])
def test_what_is_computed_of_sizes_bounds_nothing(number):
    assert _traced(number).conditions == []
