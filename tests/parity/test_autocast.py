"""torch.autocast around the call, with what else runs the graph: compilation, shares of parameters,
recompute, micro-batches layer by layer. The oracle is the model under the same autocast."""

import pytest
import torch

from tedfx.verification.batches import split_batch
from tests.parity.cases import case, on_ranks, on_single

ONE = {"num_hidden_layers": 1}
CASES = [
    pytest.param(
        case("llama", "dp=2", zero=3, compile="aot_eager", dtype="float32", overrides=ONE),
        marks=pytest.mark.slow,
    ),
    case("llama", "dp=2", zero=3, checkpoint="full", dtype="float32", overrides=ONE),
]


def on_a_rank(pm, batch, rank):
    mine, found = split_batch(batch, *pm.batch_coordinate), []
    for layered in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = pm.layered([mine, mine]) if layered else [pm(**mine)]
        loss = sum(out.loss for out in outputs) / len(outputs)
        loss.backward()
        found.append((float(loss.detach()), pm.gather_gradients()))
        pm.zero_grad()
    return found


def alone(model, batch, enabled):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        loss = model(**batch).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


def apart(found, wanted):
    return max(float((found[name] - grad).norm() / grad.norm()) for name, grad in wanted.items())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_autocast_around_the_call(case):
    loss, wanted = on_single(case, alone, True)
    _, full = on_single(case, alone, False)
    for (found, gradients), (layered_loss, layered) in on_ranks(case, on_a_rank):
        assert (
            abs(found - loss) < 1e-4 and apart(gradients, wanted) < apart(full, wanted) / 2
        )  # nearer to autocast than float32 is
        assert layered_loss == found and apart(layered, gradients) < 1e-6
