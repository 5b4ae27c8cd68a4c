"""`capacity="local"` on one device: the rewritten graph is the model run chunk by chunk, but for what is not
about places; what cannot be rewritten is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import einsum

from tedfx import ops
from tedfx.compiler import default_passes
from tedfx.errors import CaptureError, ConfigError
from tedfx.passes.base import run_pipeline
from tedfx.passes.capture_capacity import CaptureCapacity
from tedfx.passes.functionalize import Functionalize
from tedfx.passes.local_capacity import LocalCapacity
from tedfx.stages.graphs import GlobalGraph
from tedfx.trace.export import trace
from tedfx.verification.run import in_groups
from tests.capture.test_models import BIASES, routers, tokens
from tests.marks import slow_but
from tests.models_capacity import CAPACITY
from tests.parity.cases import by_chunk
from tests.passes.test_capture_capacity import Layer, Mixture, experts

E, H, GROUPS = 4, 32, 3


def rewritten(model, groups=GROUPS):
    traced = trace(model, kwargs={"x": torch.zeros(3, 6, H, dtype=torch.float64)})
    done = run_pipeline(GlobalGraph.of(traced), [Functionalize(), CaptureCapacity(), LocalCapacity(groups)])
    traced, history = done.trace, done.history
    return traced, history[-1].result


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def check(model, traced, x, expected):
    """Loss and gradients; `expected`: the loss by hand."""
    got = traced(model, x=x)["loss"]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(model, got), gradients(model, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", slow_but(["gshard"], ["switch", "gshard", "ranked", "grouped"]))
def test_each_chunk_by_itself(name):
    model = Layer(name).double()
    model.forward = lambda x: {"loss": model.moe(x)[0].square().sum()}
    traced, result = rewritten(model)
    assert bool(result.changes) == (name != "grouped")  # counted per sequence already
    for values in BIASES.values():
        routers(model, values)
        x = tokens(6, 7)
        check(model, traced, x, sum(model.moe(chunk)[0].square().sum() for chunk in x.chunk(GROUPS)))


class Shares(Mixture):
    """The total of the first choices is both: what second choices queue behind, and an expert's share in the
    auxiliary loss. The capacity is printed too."""

    def forward(self, x, pieces=1):
        x, loss, total = x.reshape(-1, H), 0.0, 0
        for part in x.chunk(pieces):
            tokens = part.shape[0]
            capacity = int(0.7 * tokens / E) + 1
            probs = self.router(part).softmax(-1)
            gate1, index1 = probs.max(-1)
            mask1 = F.one_hot(index1, E)
            gate2, index2 = probs.masked_fill(mask1.bool(), 0.0).max(-1)
            mask2 = F.one_hot(index2, E)
            first = mask1.sum(0)
            combine = 0
            for gate, mask, place in (
                (gate1, mask1, mask1.cumsum(0) - mask1),
                (gate2, mask2, mask2.cumsum(0) - mask2 + first),
            ):
                kept = mask * (place < capacity)
                combine = combine + einsum(
                    "n,ne,nc->nec",
                    gate,
                    kept.to(gate.dtype),
                    F.one_hot((place * kept).sum(-1), capacity).to(gate.dtype),
                )
            rows = experts(self, einsum("nec,nh->ech", combine.bool().to(x.dtype), part))
            loss = loss + einsum("nec,ech->nh", combine, rows).square().sum()
            total = total + first
        probs = self.router(x).softmax(-1)
        share = total.to(x.dtype) / x.shape[0]
        slots = int(0.7 * x.shape[0] / E) + 1
        return {"loss": loss + (share * share * probs.mean(0)).sum() * 100 * slots}


def test_a_total_that_is_also_a_share():
    model = Shares(2).double()
    traced, result = rewritten(model)
    assert result.changes
    x = tokens(6, 7)
    check(model, traced, x, model(x, pieces=GROUPS)["loss"])
    assert not torch.allclose(model(x)["loss"], model(x, pieces=GROUPS)["loss"])


class Read(Mixture):
    """`limit`: of the places; `read`: what else is made of them."""

    def __init__(self, limit, read):
        super().__init__()
        self.limit, self.read = limit, read

    def forward(self, x):
        x = x.reshape(-1, H)
        gate, index = self.router(x).softmax(-1).max(-1)
        mask = F.one_hot(index, E)
        place = mask.cumsum(0) - mask
        kept = mask * (place < self.limit(x.shape[0]))
        combine = einsum(
            "n,ne,nc->nec", gate, kept.to(gate.dtype), F.one_hot((place * kept).sum(-1), 6).to(gate.dtype)
        )
        y = einsum(
            "nec,ech->nh", combine, experts(self, einsum("nec,nh->ech", combine.bool().to(x.dtype), x))
        )
        return {"loss": y.sum() + self.read(place)}


@pytest.mark.parametrize(
    "limit, read, why",
    [
        (lambda n: torch.tensor(4), lambda place: 0.0, "the capacity is a tensor"),
        (lambda n: 4, lambda place: place.max().double(), "mixes tokens"),
        (lambda n: 4, lambda place: place[-1].sum().double(), "mixes tokens"),
    ],
    ids=["tensor", "max", "last"],
)
def test_refused_by_name(limit, read, why):
    with pytest.raises(CaptureError, match=f"capacity='local': .*{why}") as error:
        rewritten(Read(limit, read).double())
    assert "test_local_capacity.py:" in str(error.value)


def test_a_capacity_that_is_a_constant_stays():
    model = Read(lambda n: 4, lambda place: (place * 2).sum(-1)[0] * 0.0).double()
    traced, result = rewritten(model)
    assert result.changes == 1
    x = tokens(6, 7)
    check(model, traced, x, sum(model(chunk)["loss"] for chunk in x.chunk(GROUPS)))


def test_groups_of_a_dim_with_choices_before_tokens():
    x = torch.randint(0, 3, (2, 6, 5))
    chunks = x.view(2, 3, 2, 5)  # outer, groups, rest
    by_hand = torch.stack([chunks[:, g].reshape(4, 5).cumsum(0).view(2, 2, 5) for g in range(3)], 1).reshape(
        12, 5
    )
    assert torch.equal(ops.group_cumsum(x.view(12, 5), 0, 3, 2), by_hand)
    totals = torch.stack([chunks[:, g].sum((0, 1)).expand(2, 2, 5) for g in range(3)], 1).reshape(12, 5)
    assert torch.equal(ops.group_total(x.view(12, 5), [0], 0, 3, 2), totals)
    assert torch.equal(
        ops.group_total(x, [0, 1], 1, 3),
        chunks.sum((0, 2)).view(1, 3, 1, 5).expand(2, 3, 2, 5).reshape(2, 6, 5),
    )


def test_the_option():
    with pytest.raises(ConfigError, match="capacity='rank': one of global, local"):
        default_passes(capacity="rank")
    plain = [p.name for p in default_passes()]
    assert plain == [p.name for p in default_passes(capacity="global")] and "local_capacity" not in plain
    traced = trace(torch.nn.Linear(H, H).double(), kwargs={"input": torch.zeros(3, H, dtype=torch.float64)})
    (record,) = run_pipeline(
        GlobalGraph.of(traced), [LocalCapacity(GROUPS)], have=("capacities captured",)
    ).history
    assert "no mixture with a capacity" in record.result.notes[0]


@pytest.mark.slow
def test_what_verify_compares_with():
    """`verify(capacity="local")`: the model's own graph in groups is the oracle that the parity tests make by
    hand; a model without a capacity is left as it is."""
    model = CAPACITY["capacity_gshard"](layers=1, heads=2).double()
    ids = torch.arange(6 * 8).view(6, 8) * 7 % 61
    batch = {"input_ids": ids, "labels": ids}
    got, expected = in_groups(model, batch, GROUPS)(**batch).loss, by_chunk(model, GROUPS)(**batch).loss
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert not torch.allclose(got, model(**batch).loss)
    dense = torch.nn.Linear(H, H).double()
    assert in_groups(dense, {"input": torch.zeros(3, H, dtype=torch.float64)}, GROUPS) is dense
