"""Random routing: whatever is drawn is the same on any mesh, and the step that follows from it."""

import pytest
import torch

from tedfx.ops import random
from tedfx.verification.batches import split_batch
from tedfx.verification.errors import relative
from tedfx.verification.models import factory
from tedfx.verification.verify import verify
from tests.marks import slow, slow_but
from tests.parity.cases import case, on_ranks, verified
from tests.parity.nursery import nursery
from tests.parity.test_training import with_dropout


def drawing(draws, mesh, **options):
    return case("plain_test", mesh, overrides={"draws": draws, "layers": 1}, steps=2, **options)


@pytest.mark.parametrize("mesh", slow_but(["ep=2,tp=2"], ["dp=2", "tp=2", "ep=2", "ep=2,tp=2"]))
@pytest.mark.parametrize(
    "draws", slow_but(["noisy"], ["noisy", "jitter", "second", "gumbel", "multinomial", "expert"])
)
def test_a_random_router_trains_the_same_on_any_mesh(draws, mesh):
    result = verified(drawing(draws, mesh))
    assert result.ok, f"\n{result}"
    assert "one rank" in str(result) and "single device" not in str(result)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["dp=2,ep=2", "ep=2,tp=2"])
def test_a_second_expert_at_random_with_a_capacity(mesh):
    result = verified(case("capacity_at_random", mesh, overrides={"layers": 1}, steps=2))
    assert result.ok and "one rank" in str(result), f"\n{result}"


@pytest.mark.parametrize(
    "options",
    [
        {"checkpoint": "full"},
        slow({"compile": "aot_eager"}),
        slow({"zero": 3}),
        slow({"dedup": False, "sequence_parallel": False}),
    ],
    ids=str,
)
def test_whatever_else_is_asked_for(options):
    result = verified(drawing("noisy", "dp=2" if "zero" in options else "ep=2,tp=2", **options))
    assert result.ok, f"\n{result}"


@pytest.mark.slow
def test_every_step_draws_anew_and_the_state_draws_again():
    for loss, grads, again, replay in on_ranks(drawing("gumbel", "ep=2"), with_dropout):
        assert relative(again, loss) > 1e-6 and replay == loss


def every_rank_from_the_start(rank):
    """Mutation: a rank's part of a draw begins where the whole begins."""
    piece = random._piece
    random._piece = lambda part: (0, piece(part)[1])


def another_site(rank):
    """Mutation: the site is not the same on all ranks."""
    hashed = random._hash
    random._hash = lambda factors, seed, site: hashed(factors, seed, site + rank)


@pytest.mark.parametrize(
    "mutation", slow_but([every_rank_from_the_start], [every_rank_from_the_start, another_site])
)
def test_a_draw_without_its_index_or_site_is_found(mutation):
    result = verified(drawing("noisy", "ep=2,tp=2"), mutation)
    assert not result["loss"].ok, f"\n{result}"


def in_eval_mode(pm, batch, rank):
    local = split_batch(batch, *pm.batch_coordinate)
    with torch.no_grad():
        return [float(pm.eval()(**local).loss) for _ in range(2)]


@pytest.mark.slow
def test_a_router_that_draws_in_eval_mode_draws_anew_in_every_call():
    mode = ((False, ("input_ids", "labels")),)
    (one, other), *_ = on_ranks(drawing("noisy", "dp=1", calls=mode), in_eval_mode)
    assert relative(other, one) > 1e-6
    for losses in on_ranks(drawing("noisy", "ep=2", calls=mode), in_eval_mode):
        assert max(map(relative, losses, (one, other))) < 1e-6


# ---- tedfx verify ------------------------------------------------------------------------------------------


class Dropping(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.drop = torch.nn.Embedding(16, 8), torch.nn.Dropout(0.1)

    def forward(self, input_ids):
        return self.drop(self.embed(input_ids)).square().mean()


def told(model, mesh, kwargs=()):
    result = verify(
        factory(model, dict(kwargs)) if isinstance(model, str) else model, mesh, steps=2, timeout=200.0
    )
    return result.ok, str(result)


def test_verify_compares_with_one_rank_where_the_model_draws():
    ok, text = nursery().call(told, Dropping, "dp=2")
    assert ok and "against one rank" in text.splitlines()[0], text
    assert "the model draws random numbers: compared with parallelize on a mesh of one rank" in text


@pytest.mark.slow
def test_phimoe():
    ok, text = nursery().call(
        told, "phimoe", "ep=2,tp=2", {"router_jitter_noise": 0.3, "num_hidden_layers": 1}
    )
    assert ok and "against one rank" in text.splitlines()[0], text
