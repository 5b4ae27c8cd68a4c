"""Functions of the user's own on ranks: trained for some steps, compiled, with regions that are recomputed,
and micro-batch by micro-batch.
"""

import pytest
import torch

from tedfx.verification import processes as verify_ranks
from tedfx.verification.verify import verify
from tests.marks import slow
from tests.models_functions import Block, Clip, Model
from tests.parity.cases import case, on_ranks, verified
from tests.parity.test_layered import three_ways

VERIFIED = [
    slow(case("everything", "ep=2,tp=2")),
    case("everything", "dp=2,tp=2", checkpoint="full"),
    slow(case("everything", "ep=2", compile="aot_eager", checkpoint="comm", steps=1)),
]


@pytest.mark.parametrize("this", VERIFIED, ids=str)
def test_trains_as_on_one_device(this):
    result = verified(this)
    assert result.ok, f"\n{result}"


@pytest.mark.slow
def test_layer_by_layer_is_one_after_the_other():
    for to_apart, *_, sums, layered_sums, overlapped in on_ranks(
        case("everything", "dp=2,tp=2", checkpoint="comm", zero=3), three_ways
    ):
        assert to_apart < 1e-11 and sums == layered_sums and overlapped


def clipped():
    return Model(Block(lambda b, x: Clip.apply(x)))


def test_ranks_are_spawned_where_the_trace_ended_forking(monkeypatch):
    """Tracing a Function runs its backward, after which autograd does not run in forks where torch has a
    device."""
    answers, forked = iter([True, False]), []

    def run(work, fork, timeout):
        forked.append(fork)
        assert all(job.arguments[-1][0] is clipped for job in work)  # made anew in each process
        raise verify_ranks.RankFailure("stop")

    monkeypatch.setattr(verify_ranks, "can_fork", lambda: next(answers))
    monkeypatch.setattr(verify_ranks, "run", run)
    ids = torch.arange(24).view(4, 6)
    with pytest.raises(verify_ranks.RankFailure, match="^stop$"):
        verify(clipped, "dp=2", batch={"input_ids": ids, "labels": ids}, device="cpu", steps=1)
    assert forked == [False]
