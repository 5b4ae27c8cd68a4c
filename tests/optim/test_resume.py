"""A run saved by the sharded optimizer goes on at another stage, on another mesh, and with torch's own
optimizer of the same class."""

import pytest
import torch

import tedfx
from tests.module import toy
from tests.optim.training import OPTIMIZERS, loss_of, module, parameters, sharded, single, train

TILE = 7


def first(folder, name, dtype):
    pm = module((2, 2), ("dp", "tp"), 2, dtype)
    optimizer = sharded(pm, name, max_norm=0.5, tile=TILE)
    train(pm, optimizer, 2)
    tedfx.Checkpointer(folder, pm, optimizer).save(2)


def second(folder, name, dtype):
    pm = module((4,), ("dp",), 1, dtype)
    with torch.no_grad():
        for p in pm.parameters():
            p.to_local().fill_(0.25)  # all comes from the checkpoint
    optimizer = sharded(pm, name, max_norm=0.5, tile=5)
    checkpoints = tedfx.Checkpointer(folder, pm, optimizer)
    assert checkpoints.load().step == 2
    train(pm, optimizer, 2, start=2)
    checkpoints.save(4)


def third(folder, name):
    """Torch's own optimizer, nothing sharded."""
    pm = module((2, 2), ("dp", "tp"), 0)
    cls, options = OPTIMIZERS[name]
    optimizer = cls([p for p in pm.parameters() if p.requires_grad], **options)
    assert tedfx.Checkpointer(folder, pm, optimizer).load().step == 4
    for step in (4, 5):
        optimizer.zero_grad()
        loss_of(pm, step).backward()
        torch.nn.utils.clip_grad_norm_(pm.parameters(), 0.5)
        optimizer.step()
    model, _ = single(name, 6)
    assert toy.worst(pm.gather_parameters(), {n: p.detach() for n, p in parameters(model).items()}) < 1e-11


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_other_stages_and_meshes_continue(ranks, tmp_path, name):
    ranks(4).run(first, tmp_path, name, torch.float64)
    ranks(4).run(second, tmp_path, name, torch.float64)
    ranks(4).run(third, tmp_path, name)


def masters(folder):
    """bfloat16: the masters that were saved are those that go on, not the rounded parameters."""
    pm = module((2, 2), ("dp", "tp"), 2, torch.bfloat16)
    optimizer = sharded(pm, "AdamW", max_norm=0.5, tile=TILE)
    train(pm, optimizer, 3)
    tedfx.Checkpointer(folder, pm, optimizer).save(3)
    other = module((4,), ("dp",), 1, torch.bfloat16)
    more = sharded(other, "AdamW", max_norm=0.5, tile=3)
    tedfx.Checkpointer(folder, other, more).load()
    whole = lambda pm, optimizer: {
        n: v
        for name, state in optimizer.named_state().items()
        for n, v in pm.placed[name].gather(state["master"]).items()
    }
    mine, theirs = whole(pm, optimizer), whole(other, more)
    assert mine.keys() == theirs.keys() and all(
        torch.equal(mine[n], theirs[n]) and mine[n].dtype == torch.float32 for n in mine
    )
    assert any(not torch.equal(mine[n], mine[n].bfloat16().float()) for n in mine)
    for pm, optimizer in ((pm, optimizer), (other, more)):
        assert all(
            torch.equal(p.bfloat16(), q)
            for p, q in zip(
                whole(pm, optimizer).values(), (pm.gather_parameters()[n] for n in whole(pm, optimizer))
            )
        )


def test_masters_go_on(ranks, tmp_path):
    ranks(4).run(masters, tmp_path)
