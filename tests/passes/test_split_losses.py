"""`split_losses`: sum over count, whatever the options; checked by running the graph, and on shards with
unequal counts."""

import pytest
import torch
import torch.nn.functional as F

from tedfx.errors import TraceError
from tests.marks import slow, slow_but
from tests.passes import models as m
from tests.passes.helpers import calls, parity, upto

WEIGHT = torch.rand(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "ignore": {"ignore_index": 3},
    "smoothing": {"label_smoothing": 0.2},
    "smoothing ignore sum": {"label_smoothing": 0.2, "ignore_index": 3, "reduction": "sum"},
    "weights": {"weight": WEIGHT},
    "weights ignore": {"weight": WEIGHT, "ignore_index": 5},
    "weights sum": {"weight": WEIGHT, "reduction": "sum"},
    "weights none": {"weight": WEIGHT, "reduction": "none"},
}


class Loss(torch.nn.Module):
    def __init__(self, rank=2, **options):
        super().__init__()
        weight = options.pop("weight", None)
        self.register_buffer("weight", weight)
        self.table = torch.nn.Embedding(16, 16, dtype=torch.float64)
        self.options, self.rank = options, rank

    def forward(self, ids, labels):
        logits = self.table(ids)
        labels = labels.masked_fill(labels < 0, self.options.get("ignore_index", -100))
        if self.rank == 2:
            logits, labels = logits.flatten(0, 1), labels.flatten()
        else:
            logits = logits.transpose(1, 2)
        return F.cross_entropy(logits, labels, self.weight, **self.options)


@pytest.mark.parametrize("rank", [slow(2), 3])
@pytest.mark.parametrize("name", slow_but(["mean", "none", "smoothing", "weights ignore"], OPTIONS))
def test_the_value_stays(name, rank):
    options = OPTIONS[name]
    model, call = Loss(rank, **options), m.tokens()
    program, result = upto(model, "dp=1", call, "split_losses")
    untouched = options.get("reduction") == "none" and rank == 2
    assert (result.matches, result.changes) == (1, not untouched)
    names = calls(program)
    assert names.count("cross_entropy_loss") == 1 and ("div" in names) == ("reduction" not in options)
    expected = model(**call)
    assert torch.allclose(program.trace(model, **call), expected, rtol=1e-12)


@pytest.mark.parametrize("name", slow_but(["mean", "smoothing", "weights ignore"], OPTIONS))
@pytest.mark.parametrize("mesh", [slow("dp=2"), "dp=2,tp=2"])
def test_shards_with_unequal_counts_give_the_global_mean(name, mesh):
    parity(m.make(Loss, 3, **OPTIONS[name]), mesh, m.tokens())


def test_one_row_without_a_batch():
    model = m.Fn(lambda s, x: F.cross_entropy((x * s.w).sum((0, 1)), x.abs().sum((0, 1)).argmax()), w=(8,))
    program, result = upto(model, "dp=1", m.inputs(), "split_losses")
    assert result.changes == 1
    assert torch.allclose(program.trace(model, **m.inputs()), model(**m.inputs()), rtol=1e-12)


def test_what_is_refused_names_the_line():
    probabilities = m.Fn(
        lambda s, x: F.cross_entropy((x * s.w).flatten(0, 1), x.flatten(0, 1).softmax(-1)), w=(8,)
    )
    with pytest.raises(TraceError, match="class probabilities"):
        upto(probabilities, "dp=1", m.inputs(), "split_losses")
    with pytest.raises(TraceError, match="class weights and label smoothing"):
        upto(Loss(weight=WEIGHT, label_smoothing=0.1), "dp=1", m.tokens(), "split_losses")
