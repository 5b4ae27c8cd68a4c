"""16-bit parameters with float32 masters, and loss scaling."""

import gc

import pytest
import torch
import torch.distributed as dist

from tedfx.errors import ConfigError
from tedfx.optim import LossScale, ShardedOptimizer
from tedfx.optim.scaling import LossScale as Scale
from tests.marks import slow
from tests.module import toy
from tests.optim.training import assert_replicas_equal, loss_of, module

DATA = ((2, 2), ("dp", "ep"))


def by_hand(pm, gradients, steps, max_norm, scale=1.0, start=None):
    """A master loop as one would write it on one device: full float32 masters of the parameters, torch's
    AdamW, clipping; `gradients(step)` -> {name: full gradient}."""
    start = {name: p.clone() for name, p in (start or pm.gather_parameters()).items()}
    masters = {
        name: torch.nn.Parameter(p.float()) for name, p in start.items() if name not in ("frozen", "tied")
    }
    optimizer = torch.optim.AdamW(masters.values(), lr=0.05)
    for step in range(steps):
        for name, grad in gradients(step).items():
            if name in masters:
                masters[name].grad = grad.float() / scale
        torch.nn.utils.clip_grad_norm_(masters.values(), max_norm)
        optimizer.step()
    return {name: master.detach() for name, master in masters.items()}


def masters(zero, tile, offload, dtype):
    """bfloat16: parameters are the rounded masters, and these those of the loop by hand, from the same
    gradients.

    Bound: clipping multiplies by a factor that is float64 here and float32 there, and a tile ends a
    vectorised loop elsewhere: a few units of float32's last place per step.
    """
    pm = module(*DATA, zero, dtype=dtype, bucket_bytes=100)
    optimizer = ShardedOptimizer(pm, torch.optim.AdamW, lr=0.05, max_norm=0.5, tile=tile, offload=offload)
    start, seen = pm.gather_parameters(), []
    for step in range(4):
        optimizer.zero_grad()
        loss_of(pm, step).backward()
        seen.append(pm.gather_gradients())
        optimizer.step()
    expected = by_hand(pm, lambda step: seen[step], 4, 0.5, start=start)
    for name, share in optimizer._shares.items():
        assert share.master.dtype == torch.float32 and share.master.numel() == pm.placed[name].share.numel
        assert share.master.untyped_storage().nbytes() == 4 * share.numel
    found = {}
    for name, state in optimizer.named_state().items():
        if state:
            found.update(pm.placed[name].gather(state["master"]))
            assert all(state[key].dtype == torch.float32 for key in ("exp_avg", "exp_avg_sq"))
    assert found.keys() >= expected.keys()
    for name, want in expected.items():
        assert (found[name] - want).abs().max() < 4e-6 * max(float(want.abs().max()), 1.0), name
    for name, full in pm.gather_parameters().items():
        if name in found:
            assert torch.equal(full, found[name].to(dtype)), name
    assert_replicas_equal(pm)


@pytest.mark.parametrize(
    "tile,offload,zero",
    [
        slow(7, None, 0),
        slow(7, None, 1),
        (7, None, 2),
        slow(None, None, 0),
        (None, None, 1),
        slow(None, None, 2),
        (7, "cpu", 0),
        slow(7, "cpu", 1),
        slow(7, "cpu", 2),
    ],
)
def test_bfloat16_with_float32_masters(ranks, zero, tile, offload):
    ranks(4).run(masters, zero, tile, offload, torch.bfloat16)


def offloaded_float32(zero, offload):
    """Offload changes nothing in the numbers, over two backwards, `no_sync`, clipping and a gradient set to
    zero; what has left is not on the device any more."""
    plain, moved = module(*DATA, zero, dtype=torch.float32), module(*DATA, zero, dtype=torch.float32)
    first = ShardedOptimizer(plain, torch.optim.AdamW, lr=0.05, max_norm=0.5, tile=8)
    second = ShardedOptimizer(moved, torch.optim.AdamW, lr=0.05, max_norm=0.5, tile=8, offload=offload)
    leaves = offload != "optimizer"
    for step in range(4):
        for pm, optimizer in ((plain, first), (moved, second)):
            (pm if step % 2 else optimizer).zero_grad(set_to_none=step < 2)
            loss_of(pm, step).backward()
            if step > 0:
                with pm.no_sync():
                    loss_of(pm, step + 10).backward()
                loss_of(pm, step + 20).backward()
            if step == 3:
                optimizer.clip_grad_norm_(0.3)
        for share in second._shares.values():
            grad = share.parameter.grad
            assert share.has_taken == leaves and (
                grad is None or not leaves or not grad.to_local().count_nonzero()
            ), share.name  # zero: what set_to_none=False left
        gradients = plain.gather_gradients(), moved.gather_gradients()
        assert gradients[0].keys() == gradients[1].keys() and all(
            torch.allclose(g, gradients[1][name], rtol=1e-5, atol=1e-7) for name, g in gradients[0].items()
        )
        first.step(), second.step()
        assert torch.allclose(first.grad_norm, second.grad_norm, rtol=1e-6)
    assert all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        for a, b in zip(plain.gather_parameters().values(), moved.gather_parameters().values())
    )
    assert (
        all((share.master is not None) == (offload != "gradients") for share in second._shares.values())
        and "master" not in second.named_state()["mlp.down"]
    )
    del second, optimizer
    gc.collect()
    moved.zero_grad()
    loss_of(moved, 0).backward()
    assert all(
        p.grad is not None for p in moved.parameters() if p.requires_grad
    )  # nobody takes them any more


@pytest.mark.parametrize(
    "zero,offload",
    [slow(0, "cpu"), (0, "gradients"), (1, "optimizer"), (2, "cpu"), slow(2, "gradients")],
)
def test_offload_changes_no_number(ranks, zero, offload):
    ranks(4).run(offloaded_float32, zero, offload)


def leaving_early(zero):
    """Buckets leave while backward runs, each as the next is launched."""
    import tedfx.runtime.leaving as leaving

    real, leaving.Leaving.ready = leaving.Leaving.ready, lambda self, work, device: True
    try:
        pm = module(*DATA, zero, dtype=torch.float32)
        pm.boundary.bucket_bytes = 1
        optimizer = ShardedOptimizer(pm, torch.optim.AdamW, lr=0.05, offload="cpu")
        seen, take, finish = [], optimizer.take, pm.boundary._finish
        optimizer.take = lambda name, value: (seen.append(name), take(name, value))
        pm.boundary._finish = lambda task: (seen.append("end"), finish(task))
        loss_of(pm, 0).backward()
    finally:
        leaving.Leaving.ready = real
    buckets = len({r.names for r in pm.reductions})
    assert (
        buckets > 3
        and len(seen[: seen.index("end")]) >= buckets - 1
        and sorted(seen) == sorted([*optimizer._shares, "end"])
    )


@pytest.mark.parametrize("zero", [0, 2])
def test_gradients_leave_bucket_by_bucket(ranks, zero):
    ranks(4).run(leaving_early, zero)


def no_room():
    import tedfx.optim.offload as offload

    real, offload.available = offload.available, lambda: 1400 if dist.get_rank() == 1 else 10**12
    try:
        pm = module((2,), ("dp",), 0)
        with pytest.raises(
            ConfigError,
            match='offload="cpu" without room: masters, 2 states and gradients take .* GiB on each of 1',
        ) as error:
            ShardedOptimizer(pm, torch.optim.AdamW, offload="cpu")
        assert "\n" not in str(error.value)
        one = (
            offload.check_room([(100, torch.bfloat16)], torch.float32, 2, None, "cpu")
            if dist.get_rank() == 1
            else 1000
        )
        assert (
            one == 1000
        )  # states and gradients, 1000 bytes, are still to come; the masters, 400, are taken at once
        if dist.get_rank() == 1:  # 1400 would not fit beside what is promised
            offload.available = lambda: 2399
            with pytest.raises(ConfigError, match="without room"):
                offload.check_room([(100, torch.bfloat16)], torch.float32, 2, None, "cpu", promised=one)
    finally:
        offload.available = real
    assert real() > 2**20


def test_offload_without_room_is_refused_on_all_ranks(ranks):
    ranks(2).run(no_room)


def overflow(zero, tile):
    """One rank's gradient overflows, in an element that it alone owns: nobody steps, all halve the scale."""
    pm = module(*DATA, zero, dtype=torch.float16)
    scale = LossScale(init_scale=256.0, growth_interval=2)
    optimizer = ShardedOptimizer(pm, torch.optim.AdamW, lr=0.05, max_norm=0.5, tile=tile, loss_scale=scale)
    seen, history, start = [], [], pm.gather_parameters()
    for step in range(6):
        optimizer.zero_grad()
        loss = optimizer.scale(loss_of(pm, step))
        assert loss.dtype == torch.float32
        loss.backward()
        before = {name: p.to_local().clone() for name, p in pm.named_parameters()}
        if step == 2 and (dist.get_rank() == 1 or zero == 0):  # at stage 0 all hold all elements
            pm.get_parameter("mlp.down").grad.to_local().view(-1)[0] = float("inf")
        if step == 4 and (dist.get_rank() == 2 or zero == 0):
            pm.get_parameter("mlp.down").grad.to_local().view(-1)[0] = float("nan")
        if step not in (2, 4):
            seen.append(
                {name: grad.float() / optimizer.loss_scale for name, grad in pm.gather_gradients().items()}
            )
        optimizer.step()
        history.append((optimizer.loss_scale, optimizer.skipped))
        if step in (2, 4):
            assert all(torch.equal(p.to_local(), before[name]) for name, p in pm.named_parameters())
            assert not torch.isfinite(optimizer.grad_norm)
    assert history == [(256, 0), (512, 0), (256, 1), (256, 1), (128, 2), (128, 2)]
    assert {float(state["step"]) for state in optimizer.named_state().values() if state} == {4}
    expected = by_hand(pm, lambda step: seen[step], 4, 0.5, start=start)
    full = pm.gather_parameters()
    for name, want in expected.items():
        assert (full[name].float() - want).abs().max() < 1e-3 * max(float(want.abs().max()), 1.0), name
    assert_replicas_equal(pm)
    assert optimizer.scaler_state() == {"scale": 128.0, "good": 1, "skipped": 2}


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_overflow_on_one_rank(ranks, zero):
    ranks(4).run(overflow, zero, 7)


def constant():
    """A constant scale on any dtype: the same update, the true norm, and clipping by hand in unscaled
    units."""
    a, b, c = (module((2,), ("dp",), 2) for _ in range(3))
    options = dict(lr=0.05, tile=5)
    first = ShardedOptimizer(a, torch.optim.AdamW, max_norm=0.5, **options)
    second = ShardedOptimizer(b, torch.optim.AdamW, max_norm=0.5, loss_scale=1024, **options)
    third = ShardedOptimizer(c, torch.optim.AdamW, loss_scale=1024, **options)
    for step in range(3):
        loss_of(a, step).backward()
        second.scale(loss_of(b, step)).backward()
        third.scale(loss_of(c, step)).backward()
        norm = third.clip_grad_norm_(0.5)
        for optimizer in (first, second, third):
            optimizer.step()
            optimizer.zero_grad()
        assert (
            abs(float(first.grad_norm) / float(second.grad_norm) - 1) < 1e-6
            and abs(float(norm) / float(first.grad_norm) - 1) < 1e-6
        )
    assert second.loss_scale == 1024 and second.skipped == 0
    for other in (b, c):
        assert toy.worst(other.gather_parameters(), a.gather_parameters()) < 1e-6


def test_constant_scale(ranks):
    ranks(2).run(constant)


def test_scale_follows_torch():
    """The scale over 40 steps of good and bad luck, against torch.amp.GradScaler's own update rule."""
    mine, scale, tracker = (
        Scale(init_scale=8.0, growth_interval=3),
        torch.tensor(8.0),
        torch.tensor(0, dtype=torch.int32),
    )
    for bad in torch.rand(40, generator=torch.Generator().manual_seed(0)) < 0.2:
        torch._amp_update_scale_(scale, tracker, bad.float(), 2.0, 0.5, 3)
        mine.update(not bad)
        assert (mine.scale, mine.good) == (float(scale), int(tracker))


def loaded():
    """Values loaded into the parameters go into the masters; masters that round to them are kept."""
    pm = module((2,), ("dp",), 1, dtype=torch.bfloat16)
    optimizer = ShardedOptimizer(pm, torch.optim.AdamW, lr=0.05, tile=7)
    loss_of(pm, 0).backward()
    optimizer.step()
    before = {name: share.master.clone() for name, share in optimizer._shares.items()}
    state = {name: value.clone() for name, value in pm.gather_parameters(buffers=True).items()}
    pm.load_state_dict(state)
    optimizer.follow_parameters()
    assert all(torch.equal(share.master, before[name]) for name, share in optimizer._shares.items())
    state["head"].add_(1)
    pm.load_state_dict(state)
    optimizer.follow_parameters()
    for name, share in optimizer._shares.items():
        assert torch.equal(share.master, before[name]) == (name != "head")
    assert torch.equal(
        pm.placed["head"].gather(optimizer.named_state()["head"]["master"])["head"], state["head"].float()
    )


def test_masters_follow_loaded_parameters(ranks):
    ranks(2).run(loaded)
