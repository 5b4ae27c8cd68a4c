"""1-bit Adam: warm-up as AdamW, momentum that travels with one bit per element, errors that are fed back, bytes as counted, and a run that goes on."""

import pytest
import torch
import torch.distributed as dist

import tedfx
from tedfx.checkpoint_folder import CheckpointError
from tedfx.errors import ConfigError, TedfxError
from tedfx.optim import OneBitAdam, onebit
from tedfx.optim.compression import CompressedMean, ring_bytes
from tedfx.state import StateError
from tests.module import toy
from tests.optim.training import assert_replicas_equal, loss_of, mesh, module, parameters

OPTIONS = dict(lr=0.05, betas=(0.9, 0.95), weight_decay=0.1)


def train(pm, optimizer, steps, start=0, rows=8):
    losses = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss = loss_of(pm, step, rows=rows)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def weights(pm):
    return {name: full.clone() for name, full in pm.gather_parameters().items()}


# ---- warm-up -------------------------------------------------------------------------------------------------------


def halve(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def warmup(shape, names):
    """Two groups, a schedule, a parameter without a gradient in one step: torch.optim.AdamW to 1e-12."""
    model = toy.Mlp()
    split = lambda named: [dict(params=[named["head"]], lr=0.2, weight_decay=0.0), dict(params=[p for n, p in named.items() if n != "head" and p.requires_grad])]  # noqa: E731
    reference = torch.optim.AdamW(split(dict(model.named_parameters())), **OPTIONS)
    pm = module(shape, names, 0)
    optimizer = OneBitAdam(split(dict(pm.named_parameters())), module=pm, warmup_steps=9, **OPTIONS)
    schedules = halve(reference), halve(optimizer)
    for step in range(5):
        reference.zero_grad(), optimizer.zero_grad(set_to_none=step % 2 == 0)
        x, labels = toy.data(step)
        skip = step == 2
        (model(x)["y"].square().sum() if skip else model(x, labels)["loss"]).backward()
        mine, target = toy.shard(pm, x, labels)
        (pm(mine)["y"].square().sum() if skip else pm(mine, labels=target)["loss"]).backward()
        reference.step(), optimizer.step()
        [schedule.step() for schedule in schedules]
    assert not optimizer.compressed and pm.reductions
    assert toy.worst(pm.gather_parameters(), parameters(model)) < 1e-12
    assert_replicas_equal(pm)


@pytest.mark.parametrize("shape,names", [((2, 2), ("dp", "tp")), ((2, 2), ("dp", "ep"))])
def test_the_warmup_is_adamw(ranks, shape, names):
    ranks(4).run(warmup, shape, names)


# ---- the compressed mean -------------------------------------------------------------------------------------------


def means():
    """The first mean is signs and scales of two compressions, by hand; means of equal tensors add up to what was sent, by error feedback; replicas agree bit by bit; padding stays zero."""
    rank, sizes = dist.get_rank(), [(1, 70), (2, 33), (1, 3), (1, 64)]
    each = CompressedMean(sizes, dist.group.WORLD, torch.float64, torch.device("cpu"))
    assert each.width % 8 == 0 and each.message == each.width // 8 + 5 * 8 + 4
    draw = torch.Generator().manual_seed(0)
    everyone = [[torch.randn(*size, generator=draw, dtype=torch.float64) * 10**k for k, size in enumerate(sizes)] for _ in range(4)]
    mine, want = everyone[rank], [sum(values) / 4 for values in zip(*everyone)]

    # By hand, of the last member: 64 elements, 16 to a row.
    compress = lambda x: x.abs().mean(-1, keepdim=True) * torch.where(x >= 0, 1.0, -1.0).double()  # noqa: E731
    rows = [compress(values[3].view(4, 16)) for values in everyone]
    served = compress(sum(rows) / 4)
    first = each.mean(mine, [True] * 4)
    assert torch.allclose(first[3].view(4, 16), served, rtol=1e-14)
    assert [tuple(value.shape) for value in first] == sizes

    total = [value.clone() for value in first]
    for _ in range(399):
        for have, value in zip(total, each.mean(mine, [True] * 4)):
            have += value
    for index, (have, value) in enumerate(zip(total, want)):
        assert (have / 400 - value).abs().max() < 0.1 * value.abs().max(), index
        others = [torch.empty_like(have) for _ in range(4)]
        dist.all_gather(others, have)
        assert all(torch.equal(other, have) for other in others)

    # What is left is exactly what is missing: sent = delivered + errors.
    errors = each.worker_error.clone()
    dist.all_reduce(errors)
    errors = errors / 4
    servers = [torch.empty_like(each.server_error) for _ in range(4)]
    dist.all_gather(servers, each.server_error)
    left = errors + torch.cat(servers)
    for index, (have, value) in enumerate(zip(total, want)):
        assert torch.allclose(have + each._take(left, index), 400 * value, rtol=1e-9, atol=1e-9 * float(value.abs().max())), index
    padding = each._rows([torch.ones(size, dtype=torch.float64) for size in sizes]) == 0
    assert padding.any() and not each.worker_error[padding].any() and not each.server_error[0][padding[rank]].any()


def test_the_compressed_mean(ranks):
    ranks(4).run(means)


def absent():
    """A member that no rank has is None everywhere and keeps its errors; one that some rank has is the mean of all."""
    rank = dist.get_rank()
    each = CompressedMean([(1, 20), (1, 40)], dist.group.WORLD, torch.float64, torch.device("cpu"))
    values = [torch.randn(1, size, generator=torch.Generator().manual_seed(rank), dtype=torch.float64) for size in (20, 40)]
    each.mean(values, [True, True])
    before = each.worker_error.clone(), each.server_error.clone()
    assert before[0].any() and before[1].any()
    found = each.mean(values, [rank == 1, False])
    assert found[1] is None and found[0].shape == (1, 20)
    for error, old in zip((each.worker_error, each.server_error), before):
        assert torch.equal(each._part(error, 1), each._part(old, 1)) and not torch.equal(each._part(error, 0), each._part(old, 0))


def test_members_without_a_value(ranks):
    ranks(2).run(absent)


# ---- after the warm-up ---------------------------------------------------------------------------------------------


def exact_mean(self, values, have):
    """In place of the compression: what it stands for, without loss."""
    total = []
    for value in values:
        value = value.clone()
        dist.all_reduce(value, group=self.group)
        total.append(value / self.ranks)
    self.sent = {}
    return total


def frozen_adam(model, optimizer_steps, warm, loss):
    """One device: AdamW whose (bias-corrected) variance stays as it is after `warm` steps."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    mean, variance = ({name: torch.zeros_like(p) for name, p in named.items()} for _ in range(2))
    (beta1, beta2), lr, frozen = OPTIONS["betas"], OPTIONS["lr"], {}
    for step in range(optimizer_steps):
        model.zero_grad()
        loss(model, step).backward()
        with torch.no_grad():
            for name, p in named.items():
                mean[name] = beta1 * mean[name] + (1 - beta1) * p.grad
                if step < warm:
                    variance[name] = beta2 * variance[name] + (1 - beta2) * p.grad**2
                    frozen[name] = variance[name] / (1 - beta2 ** (step + 1))
                p.mul_(1 - lr * OPTIONS["weight_decay"])
                p.sub_(lr * mean[name] / (1 - beta1 ** (step + 1)) / (frozen[name].sqrt() + 1e-8))
    return model


def scale(shape, names, micro):
    """With an exact mean in place of the compressed one, the run is Adam with a frozen variance, of the *sum* of the ranks' gradients; also over micro-batches."""
    real, CompressedMean.mean = CompressedMean.mean, exact_mean
    try:
        pm = module(shape, names, 0, bucket_bytes=100)
        optimizer = OneBitAdam(pm, warmup_steps=3, bucket=50, **OPTIONS)
        for step in range(7):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            for part in range(micro - 1):
                with pm.no_sync():
                    loss_of(pm, 10 * step + part).backward()
            loss_of(pm, 10 * step + micro - 1).backward()
            assert bool(pm.reductions) == (step < 3) and optimizer.compressed == (step >= 3)
            optimizer.step()
    finally:
        CompressedMean.mean = real
    assert len(optimizer._exchanges) > 1
    model = frozen_adam(toy.Mlp(), 7, 3, lambda model, step: sum(model(*toy.data(10 * step + part))["loss"] for part in range(micro)))
    assert toy.worst(pm.gather_parameters(), parameters(model)) < 1e-11
    assert all(float(state["step"]) == 7 for name, state in optimizer.named_state().items())


@pytest.mark.parametrize("shape,names,micro", [((2, 2), ("dp", "tp"), 1), ((2, 2), ("dp", "ep"), 2)])
def test_the_momentum_is_that_of_the_sum(ranks, shape, names, micro):
    ranks(4).run(scale, shape, names, micro)


def replicas(dtype):
    """Parameters and momenta are bitwise the same where ranks hold the same, float32 masters too; and p.grad is unsynced and says so."""
    pm = module((2, 2), ("dp", "ep"), 0, dtype)
    optimizer = OneBitAdam(pm, warmup_steps=2, bucket=60, **OPTIONS)
    before = None
    for step in range(6):
        train(pm, optimizer, 1, start=step)
        assert_replicas_equal(pm)
        for name, state in optimizer.named_state().items():
            for key in state.keys() - {"step"}:
                local = state[key].to_local()
                others = [torch.empty_like(local) for _ in range(4)]
                dist.all_gather(others, local.contiguous())
                assert all(torch.equal(other, local) for other in others) and local.any(), (name, key)
                assert local.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, share in optimizer._shares.items():
        assert tuple(share.parameter.grad.placements) == share.placed.unsynced != share.placed.placements
        if share.master is not None:
            assert torch.equal(share.master.to(dtype), share.parameter.to_local().reshape(-1)) and not torch.equal(share.master.to(dtype).float(), share.master)
    assert before is None and pm.reductions == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_replicas_agree_bit_by_bit(ranks, dtype):
    ranks(4).run(replicas, dtype)
