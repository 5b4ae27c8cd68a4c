"""Calls of other kinds than the first: without labels, in eval mode, with a gradient from the logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tedfx
from tests.pool import context


class Pictures(nn.Module):
    """With labels, tokens are cut over `tp` up to the loss; without, every rank has use for all of them. So
    the two calls would like the gradients of the norms to be summed over different axes."""

    def __init__(self):
        super().__init__()
        self.pieces, self.norm = nn.Conv1d(3, 16, 2, stride=2), nn.LayerNorm(16)
        self.up, self.down, self.last = nn.Linear(16, 24), nn.Linear(24, 16), nn.LayerNorm(16)
        self.head = nn.Linear(16, 6)

    def forward(self, x, labels=None):
        x = self.pieces(x).transpose(1, 2)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        logits = self.head(self.last(x).mean(1))
        return logits if labels is None else (F.cross_entropy(logits, labels), logits)


def both_kinds(shape, names, zero=0):
    """The worst difference from the plain model, and over which axes the norm's gradient is summed."""
    torch.manual_seed(0)
    model = Pictures().double()
    x, labels = torch.randn(8, 3, 16, dtype=torch.float64), torch.randint(6, (8,))
    mesh = context(shape, names).device_mesh
    pm = tedfx.parallelize(model, mesh, example_inputs={"x": x, "labels": labels}, zero=zero)
    index, count = pm.batch_coordinate
    mine, errors = slice(8 // count * index, 8 // count * (index + 1)), []
    differ = lambda a, b: errors.append((a - b).abs().max().item())

    def gradients():
        found = pm.gather_gradients()
        for name, parameter in model.named_parameters():
            differ(found[name], parameter.grad)
        pm.zero_grad()
        model.zero_grad()

    for _ in range(2):
        loss, _ = pm(x[mine], labels[mine])
        loss.backward()
        model(x, labels)[0].backward()
        gradients()
        (pm(x[mine]) ** 2).sum().backward()  # no labels: a graph of its own
        (model(x) ** 2).sum().backward()
        gradients()
    pm.eval()
    with torch.no_grad():
        differ(pm(x[mine]), model(x)[mine])
    return max(errors), {layout.name: layout.reduce_axes for layout in pm.layouts}["last.weight"]


@pytest.mark.slow
@pytest.mark.parametrize("shape,zero", [((1, 2), 0), ((2, 2), 3)], ids=["tp=2", "zero=3"])
def test_a_call_without_labels_has_a_graph_of_its_own(ranks, shape, zero):
    for error, summed in ranks(shape[0] * shape[1]).run(both_kinds, shape, ("dp", "tp"), zero):
        assert error < 1e-12
        assert "tp" in summed  # as the first call wants it
