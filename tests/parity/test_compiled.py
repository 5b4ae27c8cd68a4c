"""compile=True: the same numbers, and a count of compilations.

Routing never recompiles; a first change of batch size, or of length, compiles once more and then no further.
What counts is dynamo's part, so that test leaves inductor (minutes of C++) out; a slow one runs it once.
A compilation takes ten seconds a rank, so that of slots is `slow` as well.
"""

import pytest
import torch

from tedfx.verification.batches import make_batch, split_batch
from tedfx.verification.errors import errors, relative
from tests.parity.cases import case, on_ranks, on_single, verified

ONE_LAYER = dict(overrides={"num_hidden_layers": 1}, outputs=("loss",))
# (rows, sequence, seed): other tokens and so other counts; then other sizes, and others again
BATCHES = [(8, 12, 0), (8, 12, 5), (8, 12, 9), (4, 9, 2), (8, 17, 3), (12, 5, 4)]


class Vocabulary(torch.nn.Module):
    def forward(self, input_ids, labels=None): ...

    def get_input_embeddings(self):
        return torch.nn.Embedding(64, 1)


def batches():
    return [make_batch(Vocabulary(), *sizes) for sizes in BATCHES]


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def single(model, batch):
    found = []
    for each in batches():
        model.zero_grad()
        loss = model(**each).loss
        loss.backward()
        found.append((float(loss), gradients(model)))
    return found


def compiled(pm, batch, rank):
    from torch._dynamo.utils import counters

    found = []
    for each in batches():
        pm.zero_grad()
        loss = pm(**split_batch(each, *pm.batch_coordinate)).loss
        loss.backward()
        found.append((float(loss.detach()), pm.gather_gradients(), counters["stats"]["unique_graphs"]))
    return found, sum(counters["graph_break"].values())


@pytest.mark.slow
def test_compilations_are_counted():
    this = case("mixtral", "ep=2", compile="aot_eager", **ONE_LAYER)
    expected = on_single(this, single)
    for results, breaks in on_ranks(this, compiled):
        for sizes, (loss, grads), (got_loss, got_grads, _) in zip(BATCHES, expected, results):
            assert relative(got_loss, loss) < 1e-6, sizes
            found = errors(got_grads, grads)
            assert max(found.values()) < 1e-5, (sizes, max(found, key=found.get))
        counts = [count for *_, count in results]
        assert breaks == 0
        assert counts[:3] == [1, 1, 1], f"changing routing counts recompiles: {counts}"
        assert counts[3] <= 2, f"a first change of sizes compiles more than once: {counts}"
        assert counts[4:] == [counts[3]] * 2, f"sizes never seen compile again: {counts}"


@pytest.mark.slow
def test_inductor_computes_the_same():
    result = verified(case("mixtral", "ep=2", dtype="float32", steps=1, compile=True, **ONE_LAYER))
    assert result.ok, f"\n{result}"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gshard", "grouped"])
def test_capacities_compile(model):
    """Rows with a tail; slots."""
    this = case(f"capacity_{model}", "ep=2", compile="aot_eager", outputs=("loss",), overrides={"layers": 1})
    expected = on_single(this, single)
    for results, breaks in on_ranks(this, compiled):
        assert breaks == 0
        for (loss, grads), (got, got_grads, _) in zip(expected, results):
            assert relative(got, loss) < 1e-6 and max(errors(got_grads, grads).values()) < 1e-5
