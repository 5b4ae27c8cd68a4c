"""1-bit Adam: warm-up as AdamW, momentum that travels with one bit per element, errors that are fed back,
bytes as counted, and a run that goes on."""

import pytest
import torch
import torch.distributed as dist

import tedfx
from tedfx.errors import ConfigError, TedfxError
from tedfx.optim import OneBitAdam
from tedfx.optim.compression import CompressedMean
from tedfx.optim.volume import ring_bytes
from tedfx.runtime.state_dict import StateError
from tedfx.saving.folder import CheckpointError
from tests.marks import slow
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


# ---- warm-up -----------------------------------------------------------------------------------------------


def halve(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def warmup(shape, names):
    """Two groups, a schedule, a parameter without a gradient in one step: torch.optim.AdamW to 1e-12."""
    model = toy.Mlp()
    split = lambda named: [
        dict(params=[named["head"]], lr=0.2, weight_decay=0.0),
        dict(params=[p for n, p in named.items() if n != "head" and p.requires_grad]),
    ]
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


# ---- the compressed mean -----------------------------------------------------------------------------------


def means():
    """The first mean is signs and scales of two compressions, by hand; means of equal tensors add up to what
    was sent, by error feedback; replicas agree bit by bit; padding stays zero."""
    rank, sizes = dist.get_rank(), [(1, 70), (2, 33), (1, 3), (1, 64)]
    each = CompressedMean(sizes, dist.group.WORLD, torch.float64, torch.device("cpu"))
    assert each.width % 8 == 0 and each.message == each.width // 8 + 5 * 8 + 4
    draw = torch.Generator().manual_seed(0)
    everyone = [
        [torch.randn(*size, generator=draw, dtype=torch.float64) * 10**k for k, size in enumerate(sizes)]
        for _ in range(4)
    ]
    mine, want = everyone[rank], [sum(values) / 4 for values in zip(*everyone)]

    # By hand, of the last member: 64 elements, 16 to a row.
    compress = lambda x: x.abs().mean(-1, keepdim=True) * torch.where(x >= 0, 1.0, -1.0).double()
    rows = [compress(values[3].view(4, 16)) for values in everyone]
    served = compress(sum(rows) / 4)
    first = each.mean(mine, [True] * 4)
    assert torch.allclose(first[3].view(4, 16), served, rtol=1e-14)
    assert [tuple(value.shape) for value in first] == sizes

    total = [value.clone() for value in first]
    for _ in range(199):
        for have, value in zip(total, each.mean(mine, [True] * 4)):
            have += value
    for index, (have, value) in enumerate(zip(total, want)):
        assert (have / 200 - value).abs().max() < 0.1 * value.abs().max(), index
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
        assert torch.allclose(
            have + each._take(left, index), 200 * value, rtol=1e-9, atol=1e-9 * float(value.abs().max())
        ), index
    padding = each._rows([torch.ones(size, dtype=torch.float64) for size in sizes]) == 0
    assert (
        padding.any()
        and not each.worker_error[padding].any()
        and not each.server_error[0][padding[rank]].any()
    )


def test_the_compressed_mean(ranks):
    ranks(4).run(means)


def absent():
    """A member that no rank has is None everywhere and keeps its errors; one that some rank has is the mean
    of all."""
    rank = dist.get_rank()
    each = CompressedMean([(1, 20), (1, 40)], dist.group.WORLD, torch.float64, torch.device("cpu"))
    values = [
        torch.randn(1, size, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
        for size in (20, 40)
    ]
    each.mean(values, [True, True])
    before = each.worker_error.clone(), each.server_error.clone()
    assert before[0].any() and before[1].any()
    found = each.mean(values, [rank == 1, False])
    assert found[1] is None and found[0].shape == (1, 20)
    for error, old in zip((each.worker_error, each.server_error), before):
        assert torch.equal(each._part(error, 1), each._part(old, 1)) and not torch.equal(
            each._part(error, 0), each._part(old, 0)
        )


def test_members_without_a_value(ranks):
    ranks(2).run(absent)


# ---- after the warm-up -------------------------------------------------------------------------------------


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
    """With an exact mean in place of the compressed one, the run is Adam with a frozen variance, of the *sum*
    of the ranks' gradients; also over micro-batches."""
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
    model = frozen_adam(
        toy.Mlp(),
        7,
        3,
        lambda model, step: sum(model(*toy.data(10 * step + part))["loss"] for part in range(micro)),
    )
    assert toy.worst(pm.gather_parameters(), parameters(model)) < 1e-11
    assert all(float(state["step"]) == 7 for name, state in optimizer.named_state().items())


@pytest.mark.parametrize("shape,names,micro", [((2, 2), ("dp", "tp"), 1), ((2, 2), ("dp", "ep"), 2)])
def test_the_momentum_is_that_of_the_sum(ranks, shape, names, micro):
    ranks(4).run(scale, shape, names, micro)


def replicas(dtype):
    """Parameters and momenta are bitwise the same where ranks hold the same, float32 masters too; and p.grad
    is unsynced and says so."""
    pm = module((2, 2), ("dp", "ep"), 0, dtype)
    optimizer = OneBitAdam(pm, warmup_steps=2, bucket=60, **OPTIONS)
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
            assert torch.equal(
                share.master.to(dtype), share.parameter.to_local().reshape(-1)
            ) and not torch.equal(share.master.to(dtype).float(), share.master)
    assert pm.reductions == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_replicas_agree_bit_by_bit(ranks, dtype):
    ranks(4).run(replicas, dtype)


class Experts(torch.nn.Module):
    """Four experts by a top-2 router, and a residual."""

    def __init__(self, width=8, experts=4):
        super().__init__()
        self.router = torch.nn.Linear(width, experts, bias=False)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(experts))

    def forward(self, x, labels):
        weights, ids = self.router(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return ((x + out - labels) ** 2).sum() / (labels.shape[0] * 8)


ROWS = 24


def tokens(step):
    draw = torch.Generator().manual_seed(step)
    return [torch.randn(ROWS, 8, generator=draw, dtype=torch.float64) for _ in range(2)]


def experts(folder, shape, number):
    """Experts are summed over dp, what is dense over dp and ep, each by its own axes and its own number of
    ranks; experts of ep alone need no collective and stay exact. A run goes on bit by bit, also where ranks
    have unequal numbers of experts, or none."""
    torch.manual_seed(0)
    model, world = Experts(experts=number).double(), shape[0] * shape[1]
    x, labels = tokens(0)
    made = lambda shape, names: tedfx.parallelize(
        model,
        mesh(shape, names),
        example_inputs=dict(zip(("x", "labels"), [x[: ROWS // world], labels[: ROWS // world]])),
        check="none",
    )
    both, alone = made(shape, ("dp", "ep")), made((world,), ("ep",))
    real, CompressedMean.mean = CompressedMean.mean, exact_mean
    try:
        for pm in (both, alone):
            optimizer = OneBitAdam(pm, warmup_steps=2, **OPTIONS)
            for step in range(5):
                optimizer.zero_grad()
                index, count = pm.batch_coordinate
                x, labels = (value.chunk(count)[index] for value in tokens(step))
                pm(x, labels=labels).backward()
                optimizer.step()
            axes = {
                share.placed.reduce_axes: exchange.ranks
                for exchange, shares in optimizer._exchanges
                for share in shares
            }
            ranks = {("dp",): 2, ("dp", "ep"): world} if pm is both else {("ep",): world}
            assert axes == ranks, axes
    finally:
        CompressedMean.mean = real
    torch.manual_seed(0)
    want = frozen_adam(Experts(experts=number).double(), 5, 2, lambda model, step: model(*tokens(step)))
    assert toy.worst(both.gather_parameters(), parameters(want)) < 1e-11
    assert (
        max(
            float((a - b).abs().max())
            for a, b in zip(alone.gather_parameters().values(), both.gather_parameters().values())
        )
        > 1e-6
    )  # AdamW's own variance there
    go_on(folder, made, shape)


def go_on(folder, made, shape):
    def more(pm, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            index, count = pm.batch_coordinate
            x, labels = (value.chunk(count)[index] for value in tokens(step))
            pm(x, labels=labels).backward()
            optimizer.step()

    pm = made(shape, ("dp", "ep"))
    optimizer = OneBitAdam(pm, warmup_steps=2, bucket=60, **OPTIONS)
    more(pm, optimizer, range(4))
    tedfx.Checkpointer(folder, pm, optimizer).save(4)
    more(pm, optimizer, range(4, 6))
    other = made(shape, ("dp", "ep"))
    resumed = OneBitAdam(other, warmup_steps=2, bucket=60, **OPTIONS)
    assert tedfx.Checkpointer(folder, other, resumed).load().step == 4
    assert any(value.any() for value in resumed.rank_state().values())
    more(other, resumed, range(4, 6))
    same(pm, optimizer, other, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("shape,number", [((2, 2), 4), ((2, 2), 3), ((2, 3), 4)], ids=str)
def test_experts_and_dense_parameters_have_their_own_axes(ranks, tmp_path, shape, number):
    ranks(shape[0] * shape[1]).run(experts, tmp_path, shape, number)


# ---- error feedback ----------------------------------------------------------------------------------------


def descend(feedback, steps=60, warm=5):
    """How far above its minimum the loss ends, at a falling rate: least squares in one bias, where the ranks'
    own gradients do not vanish at the minimum."""
    pm = module((2,), ("dp",), 0)
    optimizer = OneBitAdam(
        [pm.get_parameter("mlp.bias")],
        module=pm,
        warmup_steps=warm,
        lr=0.2,
        betas=(0.5, 0.9),
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.92)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(pm, 0)
        loss.backward()
        if not feedback:
            for exchange, _ in optimizer._exchanges:
                exchange.worker_error.zero_()
                exchange.server_error.zero_()
        optimizer.step()
        schedule.step()
    model, batch = toy.Mlp().requires_grad_(False), toy.data(0)
    loss_at = lambda bias: torch.func.functional_call(model, {"mlp.bias": bias, "tied": bias}, batch)["loss"]
    start = model.mlp.bias.detach()
    gradient, curvature = torch.func.grad(loss_at)(start), torch.func.hessian(loss_at)(start)
    return float(loss.detach() - loss_at(start - torch.linalg.solve(curvature, gradient)))


def feedback():
    return descend(True), descend(False)


@pytest.mark.slow
def test_error_feedback_converges_where_signs_alone_do_not(ranks):
    fed, unfed = ranks(2).run(feedback)[0]
    assert 0 <= fed < unfed / 20 and unfed > 5e-3, (fed, unfed)


# ---- variances of zero, gradients that are missing ---------------------------------------------------------


def zero_variance():
    """Elements whose gradient was zero in the whole warm-up move afterwards, and by steps of the size of all
    others."""
    pm = module((2,), ("dp",), 0)
    optimizer = OneBitAdam(pm, warmup_steps=3, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    largest, before = 0.0, weights(pm)
    for step in range(12):
        x, labels = toy.shard(pm, *toy.data(step))
        if step < 3:
            x[:, 0] = 0  # no gradient for gate_up[:, 0] and the second scale's first element
        optimizer.zero_grad()
        pm(x, labels=labels)["loss"].backward()
        optimizer.step()
        now = weights(pm)
        if step < 3:
            assert torch.equal(now["mlp.gate_up"][:, 0], before["mlp.gate_up"][:, 0]) and not torch.equal(
                now["mlp.gate_up"][:, 1], before["mlp.gate_up"][:, 1]
            )
        else:
            assert (
                not torch.equal(now["mlp.gate_up"][:, 0], before["mlp.gate_up"][:, 0])
                and now["scales.1.weight"][0] != before["scales.1.weight"][0]
            )
            largest = max(largest, *(float((now[name] - before[name]).abs().max()) for name in now))
        before = now
    assert largest < 10 * 0.01, largest


def test_a_frozen_variance_of_zero(ranks):
    ranks(2).run(zero_variance)


def missing():
    """`head` has no gradient in the warm-up: it goes on as AdamW, exactly, whatever the rest does. In a step
    where no rank has one for it, or for a compressed parameter, nothing of it changes."""
    pm = module((2,), ("dp",), 0)
    optimizer = OneBitAdam(pm, warmup_steps=2, **OPTIONS)
    head = torch.nn.Parameter(pm.gather_parameters()["head"].clone())
    reference = torch.optim.AdamW([head], **OPTIONS)
    for step in range(7):
        optimizer.zero_grad()
        x, labels = toy.shard(pm, *toy.data(step))
        used = step in (2, 3, 5, 6)
        (pm(x, labels=labels)["loss"] if used else pm(x)["y"].square().sum()).backward()
        head.grad = pm.gather_gradients()["head"] if used else None
        if step == 5:
            pm.get_parameter("mlp.down").grad = None  # on both ranks
        if step == 6 and dist.get_rank() == 0:
            pm.get_parameter("mlp.down").grad = None  # on one of them, where the other's still counts
        before, counts = (
            weights(pm),
            {name: float(state["step"]) for name, state in optimizer.named_state().items()},
        )
        optimizer.step()
        reference.step()
        now = weights(pm)
        assert optimizer._exact == (["head"] if step >= 1 else [])
        assert toy.difference(now["head"], head) < 1e-12
        still = {name for name in now if torch.equal(now[name], before[name])} - {"frozen"}
        assert still == (set() if used else {"head"}) | ({"mlp.down"} if step == 5 else set()), (step, still)
        assert {
            name for name, state in optimizer.named_state().items() if float(state["step"]) == counts[name]
        } == still
        assert_replicas_equal(pm)


def test_parameters_without_a_gradient(ranks):
    ranks(2).run(missing)


# ---- bytes -------------------------------------------------------------------------------------------------


class Counted:
    """Bytes a rank sends in these groups, by the ring formulas, from the tensors that torch.distributed is
    given."""

    def __init__(self, monkeypatch, groups):
        self.sent, self.calls = 0.0, []
        from tedfx import _torch

        def count(owner, name, kind, which):
            real = getattr(owner, name)

            def call(*args, **kwargs):
                if kwargs.get("group") in groups:
                    self.sent += ring_bytes(kind, args[which].nbytes, dist.get_world_size(kwargs["group"]))
                    self.calls.append(kind)
                return real(*args, **kwargs)

            monkeypatch.setattr(owner, name, call)

        count(dist, "all_reduce", "all_reduce", 0)
        count(dist, "all_to_all_single", "all_to_all", 1)
        count(_torch, "gather_into", "all_gather", 0)
        for owner, name in (
            (dist, "all_gather"),
            (dist, "broadcast"),
            (dist, "reduce_scatter"),
            (_torch, "scatter_into"),
        ):
            count(owner, name, "all_gather", 0)


class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(256, 512, bias=False), torch.nn.Linear(512, 256, bias=False)

    def forward(self, x):
        return self.down(self.up(x).relu()).float().square().mean()


def volume():
    """20 steps of 16-bit gradients, 15 % warm-up: what torch.distributed is given is what `volume` says, and
    1 / (0.15 + 0.85 / 16) = 4.92 times less than all-reduces of the gradients."""
    x = torch.randn(8, 256, dtype=torch.bfloat16)
    pm = tedfx.parallelize(Wide().to(torch.bfloat16), mesh((2,), ("dp",)), example_inputs={"x": x})
    optimizer = OneBitAdam(pm, warmup_steps=3, bucket=2**17)
    with pytest.MonkeyPatch.context() as monkeypatch:
        counted = Counted(monkeypatch, [group for group in pm.boundary.groups.values() if group is not None])
        for step in range(20):
            before = counted.sent
            optimizer.zero_grad()
            pm(x).backward()
            optimizer.step()
            if step == 2:
                before += ring_bytes(
                    "all_reduce", 0, 2
                )  # the freeze itself talks over the whole mesh: one number per parameter, once
            assert optimizer.volume.last == counted.sent - before
            assert counted.calls == (["all_reduce"] * 2 if step < 3 else ["all_to_all", "all_gather"] * 2), (
                step
            )  # a bucket and its counts; two buckets
            counted.calls.clear()
    elements = 2 * 256 * 512
    assert (
        optimizer.volume.steps == 20
        and optimizer.volume.sent == counted.sent
        and optimizer.volume.uncompressed == 20 * 2 * elements
    )
    gradients, signs = 3 * 2 * elements, 17 * 2 * elements / 16
    overhead = 3 * 2 * 4 + 17 * 2 * 2 * (
        4 + 1
    )  # counts of the warm-up; per step, tensor and direction a scale and a flag
    assert counted.sent == gradients + signs + overhead
    return 20 * 2 * elements / counted.sent


def test_the_volume(ranks):
    ratio = ranks(2).run(volume)[0]
    assert abs(ratio / (1 / (0.15 + 0.85 / 16)) - 1) < 1e-3 and round(1 / (0.15 + 0.85 / 16), 2) == 4.92, (
        ratio
    )


# ---- a run that goes on ------------------------------------------------------------------------------------


def same(pm, optimizer, other, more):
    assert all(torch.equal(a, b) for a, b in zip(weights(pm).values(), weights(other).values()))
    mine, theirs = optimizer.rank_state(), more.rank_state()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    for name, state in optimizer.named_state().items():
        for key, value in state.items():
            local = lambda value: value.to_local() if hasattr(value, "to_local") else value
            assert torch.equal(local(value), local(more.named_state()[name][key])), (name, key)


def resumed(folder, dtype):
    made = lambda warm=2, shape=(2, 2), names=("dp", "tp"): (
        pm := module(shape, names, 0, dtype),
        OneBitAdam(pm, warmup_steps=warm, bucket=60, **OPTIONS),
    )
    pm, optimizer = made()
    checkpoints = tedfx.Checkpointer(folder, pm, optimizer, keep=9)
    train(pm, optimizer, 1)
    checkpoints.save(1)
    train(pm, optimizer, 4, start=1)
    checkpoints.save(5)
    saved, params = optimizer.state_dict(), weights(pm)
    saved = {
        **saved,
        "state": {n: {k: v.clone() for k, v in each.items()} for n, each in saved["state"].items()},
        "errors": {k: v.clone() for k, v in saved["errors"].items()},
    }
    train(pm, optimizer, 2, start=5)
    assert saved["errors"] and any(value.any() for value in saved["errors"].values())

    # The same mesh: bit by bit, by the Checkpointer and by state_dict.
    other, more = made()
    with torch.no_grad():
        [p.to_local().fill_(0.25) for p in other.parameters()]
    assert (
        tedfx.Checkpointer(folder, other, more).load().step == 5
        and more.compressed
        and not other.boundary.synced
    )
    train(other, more, 2, start=5)
    same(pm, optimizer, other, more)
    third, last = made()
    third.load_state_dict({name: full for name, full in params.items() if name != "tied"}, strict=False)
    last.load_state_dict(saved)
    assert last.compressed and not third.boundary.synced and last.volume.steps == 5
    train(third, last, 2, start=5)
    same(pm, optimizer, third, last)

    # Back into the warm-up: gradients are summed again, and the run is the same once more.
    tedfx.Checkpointer(folder, other, more).load(folder / "step-00000001")
    assert not more.compressed and other.boundary.synced and not more.rank_state()
    train(other, more, 6, start=1)
    same(pm, optimizer, other, more)

    # Another mesh: everything but the errors; another warm-up: refused.
    wide, apart = made(shape=(4,), names=("dp",))
    with pytest.warns(UserWarning, match="start from zero"):
        tedfx.Checkpointer(folder, wide, apart).load(folder / "step-00000005")
    assert (
        apart.compressed
        and not wide.boundary.synced
        and not any(value.any() for value in apart.rank_state().values())
    )
    assert toy.worst(weights(wide), params) == 0
    train(wide, apart, 1, start=5)
    assert_replicas_equal(wide)
    with pytest.raises(StateError, match="change the mesh with tedfx.Checkpointer"):
        apart.load_state_dict(saved)
    with pytest.raises(CheckpointError, match="warmup_steps=2, this run has 3"):
        tedfx.Checkpointer(folder, *made(3)).load(folder / "step-00000005")


@pytest.mark.parametrize("dtype", [torch.float64, slow(torch.bfloat16)])
def test_a_run_goes_on(ranks, tmp_path, dtype):
    ranks(4).run(resumed, tmp_path, dtype)


# ---- refusals ----------------------------------------------------------------------------------------------


def refused():
    pm = module((2,), ("dp",), 0)
    head = pm.get_parameter("head")
    for message, make in {
        "zero >= 1": lambda: OneBitAdam(module((2,), ("dp",), 1), warmup_steps=2),
        "warmup_steps=0": lambda: OneBitAdam(pm, warmup_steps=0),
        "warmup_steps=True": lambda: OneBitAdam(pm, warmup_steps=True),
        "bucket=-1": lambda: OneBitAdam(pm, warmup_steps=2, bucket=-1),
        "lr=tensor": lambda: OneBitAdam(pm, warmup_steps=2, lr=torch.tensor(0.1)),
        "beta2=1.0": lambda: OneBitAdam(pm, warmup_steps=2, betas=(0.9, 1.0)),
        "needs the ParallelModule": lambda: OneBitAdam([head], warmup_steps=2),
        "parameter 0 of group 0, of shape .* is not the module's": lambda: OneBitAdam(
            [torch.nn.Parameter(torch.zeros(3))], module=pm, warmup_steps=2
        ),
    }.items():
        with pytest.raises(ConfigError, match=message) as error:
            make()
        assert "\n" not in str(error.value)
    optimizer = OneBitAdam([head], module=pm, warmup_steps=2)
    with pm.no_sync():
        loss_of(pm, 0).backward()
    with pytest.raises(TedfxError, match="is not summed over .*outside of no_sync"):
        optimizer.step()
    with pytest.raises(TedfxError, match="the closure would run"):
        optimizer.step(lambda: None)
    pm.zero_grad()
    norms = []
    for step in range(2):
        loss_of(pm, step).backward()
        norms.append(float(optimizer.clip_grad_norm_(0.01)))
        optimizer.step()
        pm.zero_grad()
    assert norms[0] > 0.01
    with pytest.raises(TedfxError, match="after the warm-up .* no rank has the global gradient"):
        optimizer.clip_grad_norm_(1.0)
    with pytest.raises(ConfigError, match="add_param_group after the warm-up"):
        optimizer.add_param_group({"params": [pm.get_parameter("mlp.down")]})
    pm.set_requires_gradient_sync(True)
    loss_of(pm, 0).backward()
    before = weights(pm)
    with pytest.raises(TedfxError, match="was summed by backward, after the warm-up"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in weights(pm).items())
    pm.zero_grad()
    pm.set_requires_gradient_sync(False)
    loss_of(pm, 0).backward()
    optimizer.step()
    assert optimizer.steps == 3


def test_refusals(ranks):
    ranks(2).run(refused)
