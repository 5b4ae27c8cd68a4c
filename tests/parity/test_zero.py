"""ZeRO's stages on ranks: what a rank holds, gathers and scatters. Their numbers: test_pairs."""

from collections import Counter

import pytest
import torch

from tedfx.ops import count_collectives
from tedfx.optim import ShardedOptimizer
from tedfx.verification.batches import split_batch
from tests.marks import slow
from tests.parity.cases import case, on_ranks

TILE = 500
ONE = {"num_hidden_layers": 1}


def tiles(pm, batch, rank):
    """How many parameters a tile cuts; the most tiles of one."""
    optimizer = ShardedOptimizer(pm, torch.optim.AdamW, tile=TILE)
    counts = [len(share.tiles) for share in optimizer._shares.values()]
    return sum(count > 1 for count in counts), max(counts)


@pytest.mark.parametrize("stage", [slow(0), slow(1), 3])
def test_these_tiles_cut_parameters(stage):
    for cut, most in on_ranks(case("mixtral", "ep=2,tp=2", zero=stage, overrides=ONE), tiles):
        assert cut >= 2 and most >= 2  # the experts' two stacks


def step(pm, batch, rank):
    """Elements of parameters, of gradients and of what gradients keep alive; collectives by phase; gathers in
    backward while compiled nothing."""
    index, count = pm.batch_coordinate
    mine = split_batch(batch, index, count)
    with count_collectives() as log:
        pm(**mine).loss.backward()
    storages = {
        p.grad.to_local().untyped_storage().data_ptr(): p.grad.to_local().untyped_storage().nbytes()
        for p in pm.parameters()
    }
    whole = {name: placed.whole.numel for name, placed in pm.placed.items()}
    return dict(
        parameters=sum(p.to_local().numel() for p in pm.parameters()),
        gradients=sum(p.grad.to_local().numel() for p in pm.parameters()),
        alive=sum(storages.values()) // 8,
        whole=sum(whole.values()),
        share=sum(placed.share.numel for placed in pm.placed.values()),
        gathers=Counter(c.phase for c in log if c.op == "gather_parameters"),
        gathered=Counter(
            {
                phase: sum(c.bytes for c in log if c.op == "gather_parameters" and c.phase == phase)
                for phase in ("forward", "recompute")
            }
        ),
        reductions=Counter(r.op for r in pm.reductions),
        scattered=sum(r.bytes for r in pm.reductions if r.op == "reduce_scatter"),
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_a_rank_holds_and_sends(stage):
    """ZeRO's table, in elements: parameters M, M, M/N; gradients kept alive M, M/N, M/N; sent: gradients
    once, whole; parameters at stage 3 twice."""
    for found in on_ranks(case("mixtral", "dp=2,ep=2", zero=stage, overrides=ONE), step):
        whole, share = found["whole"], found["share"]
        assert whole / 4 <= share <= whole / 2  # experts are cut over dp alone: ep has cut them already
        assert found["parameters"] == (share if stage == 3 else whole)
        assert found["gradients"] == share
        assert found["alive"] == (whole if stage == 1 else share)
        assert (
            found["reductions"] == {"reduce_scatter": 2} and found["scattered"] == 8 * whole
        )  # experts' and the others'
        if stage == 3:
            assert found["gathered"]["forward"] == 8 * share
            # backward reads every weight again but the embedding's, whose adjoint needs none
            assert 0 < found["gathered"]["forward"] - found["gathered"]["recompute"] <= 8 * share / 10
        else:
            assert not found["gathers"]


def accumulated(pm, batch, rank):
    """Gradients of two micro-batches, the first without communication, against both in one; and what was
    sent."""
    index, count = pm.batch_coordinate
    mine = split_batch(batch, index, count)
    first, second = ({name: x[rows] for name, x in mine.items()} for rows in (slice(0, 1), slice(1, None)))
    pm(**mine).loss.backward()
    together = pm.gather_gradients()
    pm.zero_grad()
    counts = [x["labels"][:, 1:].ne(-100).sum().double() for x in (first, second)]
    for c in counts:
        torch.distributed.all_reduce(c)
    total = sum(counts)
    with pm.no_sync():
        (pm(**first).loss * counts[0] / total).backward()
    sent = len(pm.reductions)
    (pm(**second).loss * counts[1] / total).backward()
    apart = pm.gather_gradients()
    return (
        max(float((apart[n] - g).norm() / g.norm().clamp(min=1e-12)) for n, g in together.items()),
        sent,
        len(pm.reductions),
    )


@pytest.mark.parametrize("stage", [slow(1), slow(2), 3])
def test_micro_batches_are_reduced_once(stage):
    for error, before, after in on_ranks(case("llama", "dp=2", zero=stage, overrides=ONE), accumulated):
        assert error < 1e-6 and (before, after) == (0, 1)
