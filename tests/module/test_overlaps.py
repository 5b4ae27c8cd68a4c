"""Which tensors of a model may share memory."""

import pytest
import torch
from torch import nn

from tedfx.errors import ConfigError
from tedfx.trace.overlaps import refuse_overlaps


class Shares(nn.Module):
    def __init__(self, second, first=None):
        super().__init__()
        memory = torch.zeros(12)
        self.one = nn.Parameter(memory[:8]) if first is None else first(memory)
        self.two = second(memory, self.one)


PIECES = {
    "one object": (lambda memory, one: one, None),
    "apart": (lambda memory, one: nn.Parameter(memory[8:]), None),
    "copy": (lambda memory, one: nn.Parameter(one.detach().clone()), None),
    "buffers that nothing writes": (
        lambda memory, one: nn.Buffer(memory[4:]),
        lambda memory: nn.Buffer(memory[:8]),
    ),
}
OVERLAPS = {
    "another parameter": (lambda memory, one: nn.Parameter(one.detach()), None, ()),
    "a part": (lambda memory, one: nn.Parameter(memory[7:]), None, ()),
    "transposed": (lambda memory, one: nn.Parameter(memory[:6].view(2, 3).t()), None, ()),
    "a buffer": (lambda memory, one: nn.Buffer(one.detach()[:2]), None, ()),
    "a buffer that is written": (
        lambda memory, one: nn.Buffer(memory[4:]),
        lambda memory: nn.Buffer(memory[:8]),
        ("two",),
    ),
}


@pytest.mark.parametrize("name", PIECES)
def test_memory_apart(name):
    second, first = PIECES[name]
    refuse_overlaps(Shares(second, first))


@pytest.mark.parametrize("name", OVERLAPS)
def test_memory_shared(name):
    second, first, written = OVERLAPS[name]
    with pytest.raises(ConfigError, match="(one and two|two and one) share memory but are two tensors"):
        refuse_overlaps(Shares(second, first), written)
