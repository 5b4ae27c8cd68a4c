"""The gradient boundary: accumulation, what is reduced and when, parameters that only some ranks use."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tedfx.errors import TedfxError
from tedfx.runtime.gradients import GradientBoundary
from tedfx.state.parameters import ParameterLayout, Placed, materialize
from tests.module import toy
from tests.module.test_module import named_grads
from tests.module.toy import F, H
from tests.pool import context


def expected_grads(*steps):
    model = toy.Mlp()
    for step in steps:
        model(*toy.data(step))["loss"].backward()
    return named_grads(model)


def backward(pm, step):
    pm(*toy.shard(pm, *toy.data(step)))["loss"].backward()


class CountReductions:
    """Calls of dist.all_reduce outside the graph, which wait later, presence counts apart."""

    def __enter__(self):
        self.real, self.sums, self.counts = dist.all_reduce, 0, 0
        dist.all_reduce = self
        return self

    def __call__(self, tensor, *args, **kwargs):
        if tensor.dtype == torch.int32:
            self.counts += 1
        elif kwargs.get("async_op"):
            self.sums += 1
        return self.real(tensor, *args, **kwargs)

    def __exit__(self, *_):
        dist.all_reduce = self.real


def accumulate(order):
    """`order`: S a synced and n an unsynced backward, z zero_grad(), 0 zero_grad(set_to_none=False)."""
    pm = toy.parallel(context((2, 2), ("dp", "tp")).device_mesh)
    since, step, sums = [], 0, 0
    with CountReductions() as counter:
        for word in order:
            if word in "z0":
                pm.zero_grad(set_to_none=word == "z")
                since = []
                continue
            if word == "n":
                with pm.no_sync():
                    backward(pm, step)
            else:
                backward(pm, step)
                sums += 1
            since.append(step)
            step += 1
        assert (counter.sums, counter.counts) == (sums, sums), (counter.sums, counter.counts, sums)
    grads = pm.gather_gradients()
    expected = expected_grads(*since)
    for name in set(grads) - set(expected):  # after zero_grad(set_to_none=False) alone
        assert float(grads.pop(name).abs().max()) == 0
    assert toy.worst(grads, expected) < 1e-12
    if order[-1] == "S":
        for parameter in pm.parameters():
            assert parameter.grad is None or parameter.grad.placements == parameter.placements
            assert parameter.grad is None or isinstance(parameter.grad, DTensor)


@pytest.mark.parametrize(
    "order", ["SSS", "nnS", "nSnS", "Snn", "SnS", "nzS", "SzS", "n0S", "S0S", "Sn0nS", "S0", "nn", "nnSznnS"]
)
def test_accumulation(ranks, order):
    """Whatever was synchronised when, `.grad` is the gradient since zero_grad(), each backward reduced
    once."""
    ranks(4).run(accumulate, order)


def micro_batches():
    """Three micro-batches under no_sync, each loss divided by three, are one large batch."""
    pm = toy.parallel(context((2, 2), ("dp", "tp")).device_mesh)
    x, labels = toy.shard(pm, *toy.data(0, rows=12))
    for i, (a, b) in enumerate(zip(x.chunk(3), labels.chunk(3))):
        loss = pm(a, b)["loss"] / 3
        if i < 2:
            with pm.no_sync():
                loss.backward()
        else:
            loss.backward()
    model = toy.Mlp()
    model(*toy.data(0, rows=12))["loss"].backward()
    assert toy.worst(pm.gather_gradients(), named_grads(model)) < 1e-12
    norm = torch.nn.utils.clip_grad_norm_(pm.parameters(), 1e9).full_tensor()
    assert abs(norm - torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)) < 1e-12


def test_micro_batches_equal_one_large_batch(ranks):
    ranks(4).run(micro_batches)


def twice():
    pm = toy.parallel(context((2,), ("dp",)).device_mesh)
    loss = pm(*toy.shard(pm, *toy.data(0)))["loss"]
    loss.backward(retain_graph=True)
    loss.backward()
    assert toy.worst(pm.gather_gradients(), {n: 2 * g for n, g in expected_grads(0).items()}) < 1e-12
    # two forwards, one backward
    pm.zero_grad()
    (pm(*toy.shard(pm, *toy.data(0)))["loss"] + pm(*toy.shard(pm, *toy.data(1)))["loss"]).backward()
    assert toy.worst(pm.gather_gradients(), expected_grads(0, 1)) < 1e-12


def test_backward_twice(ranks):
    ranks(2).run(twice)


def asked():
    """Gradients of parameters that autograd.grad is asked for; those of an input, and backward, are as
    ever."""
    pm = toy.parallel(context((2,), ("dp",)).device_mesh)
    x, labels = toy.shard(pm, *toy.data(0))
    (gradient,) = torch.autograd.grad(pm(x.requires_grad_(), labels)["loss"], x)
    assert gradient.abs().sum() > 0
    learned = [p for p in pm.parameters() if p.requires_grad]
    for ask in (
        lambda loss: torch.autograd.grad(loss, learned, allow_unused=True),
        lambda loss: loss.backward(inputs=learned[:1]),
    ):
        with pytest.raises(TedfxError, match="call loss.backward\\(\\) and read p.grad"):
            ask(pm(x.detach(), labels)["loss"])
    pm.zero_grad()
    loss = pm(x.detach(), labels)["loss"]
    loss /= 2
    loss.backward()
    assert toy.worst(pm.gather_gradients(), {n: g / 2 for n, g in expected_grads(0).items()}) < 1e-12


def test_gradients_asked_of_autograd(ranks):
    ranks(2).run(asked)


def buckets(size):
    """Small buckets: one collective each, in reverse order of use, and all but the last overlap backward."""
    pm = toy.parallel(context((2, 2), ("dp", "tp")).device_mesh, bucket_bytes=size)
    with CountReductions() as counter:
        backward(pm, 0)
    assert counter.sums == len(pm.reductions) and counter.counts == 1
    assert toy.worst(pm.gather_gradients(), expected_grads(0)) < 1e-12
    return [(r.axes, r.names, r.overlapped) for r in pm.reductions]


def test_buckets(ranks):
    every = ranks(4).run(buckets, 1)
    assert every == [every[0]] * 4
    assert [names for _, names, _ in every[0]] == [
        ("head",),
        ("scales.*.weight",),
        ("mlp.bias",),
        ("mlp.down",),
        ("mlp.gate_up",),
    ]
    assert all(axes == ("dp",) and overlapped for axes, _, overlapped in every[0])
    assert len(ranks(4).run(buckets, 25 * 2**20)[0]) == 1
    assert [len(names) for _, names, _ in ranks(4).run(buckets, 8 * F * H)[0]] == [4, 1]


def some_unused():
    """A loss on one rank's outputs only, and a parameter (`head`) that one of the two programs does not
    know."""
    rank = dist.get_rank()
    pm = toy.parallel(context((2,), ("dp",)).device_mesh, bucket_bytes=1)
    model = toy.Mlp()
    x, labels = toy.data(0)
    mine, labels_mine = toy.shard(pm, x, labels)
    # Step 1: a program without `head`: its gradient stays None everywhere
    pm(mine)["y"].sum().backward()
    model(x)["y"].sum().backward()
    assert dict(pm.named_parameters())["head"].grad is None
    assert toy.worst(pm.gather_gradients(), named_grads(model)) < 1e-12
    # Step 2: both programs have run; again without `head`, now that its bucket exists
    pm(mine, labels_mine)["loss"].backward()
    model(x, labels)["loss"].backward()
    head = dict(pm.named_parameters())["head"].grad.to_local().clone()
    pm(mine)["y"].sum().backward()
    model(x)["y"].sum().backward()
    assert torch.equal(dict(pm.named_parameters())["head"].grad.to_local(), head)
    assert toy.worst(pm.gather_gradients(), named_grads(model)) < 1e-12
    pm.zero_grad()
    pm(mine)["y"].sum().backward()
    assert dict(pm.named_parameters())["head"].grad is None
    # Step 3: each rank leaves other parameters out
    boundary, pm = pm.boundary, None
    names = ["mlp.gate_up", "mlp.down", "head"]
    for unsynced in (False, True):
        for name in names:
            boundary.parameter(name).grad = None
        boundary.begin(names)
        first, second, head = boundary.leaves(names)
        boundary.synced = not unsynced
        (first.sum() if rank == 0 else second.sum() * 3).backward()
        boundary.synced = True
        if unsynced:  # rank 0 has an unsynced gradient where rank 1 has None, and the reverse
            (head.sum() * (rank + 1)).backward()
            assert (boundary.parameter("head").grad.to_local() == 3).all()
        else:
            assert boundary.parameter("head").grad is None
        assert (boundary.parameter("mlp.gate_up").grad.to_local() == 1).all()
        assert (boundary.parameter("mlp.down").grad.to_local() == 3).all()
        # and on top of what is there, one of them unsynced on one rank only
        boundary.synced = not unsynced
        (first.sum() if rank == 0 else second.sum()).backward()
        if unsynced:
            boundary.synced = True
            (head.sum() * (rank + 1)).backward()
            assert (boundary.parameter("head").grad.to_local() == 6).all()
        assert (boundary.parameter("mlp.gate_up").grad.to_local() == 2).all()
        assert (boundary.parameter("mlp.down").grad.to_local() == 4).all()


def test_parameters_that_some_ranks_leave_out(ranks):
    ranks(2).run(some_unused)


def broken():
    """A backward that raises leaves nothing behind."""
    pm = toy.parallel(context((2,), ("dp",)).device_mesh, bucket_bytes=1)
    out = pm(*toy.shard(pm, *toy.data(0)))
    x = out["y"].detach().requires_grad_()

    class Raise(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ArithmeticError("no")

    leaves = pm.boundary.leaves(["mlp.gate_up", "head"])
    with pytest.raises(ArithmeticError):
        (Raise.apply(leaves[0] * 2).sum() + leaves[1].sum() + x.sum()).backward()
    assert pm.boundary._tasks
    backward(pm, 0)
    assert toy.worst(pm.gather_gradients(), expected_grads(0)) < 1e-12


def test_backward_that_raises(ranks):
    ranks(2).run(broken)


def shared_storage():
    """Autograd gives views of one cotangent to two leaves: each parameter gets a gradient of its own."""
    mesh = context((2,), ("dp",)).device_mesh
    layouts = [ParameterLayout("a", (2, 3), None, (), ()), ParameterLayout("b", (3, 2), None, (), ())]
    values = {n: torch.ones(s, dtype=torch.float64) for n, s in (("a", (2, 3)), ("b", (3, 2)))}
    placed = {layout.name: Placed(layout, mesh) for layout in layouts}
    parameters = {n: materialize(p, lambda name: values[name].clone()) for n, p in placed.items()}
    boundary = GradientBoundary(placed, parameters.__getitem__)
    boundary.begin(parameters)
    a, b = boundary.leaves(parameters)
    (a.view(-1) + b.view(-1)).pow(2).sum().backward()
    for parameter in parameters.values():
        parameter.grad.mul_(0.5)
    assert all((p.grad.to_local() == 2).all() for p in parameters.values())


def test_gradients_do_not_share_storage(ranks):
    ranks(2).run(shared_storage)


def pointers():
    """Leaves follow the parameter: loads, in-place updates, replaced storage, frozen and thawed."""
    pm = toy.parallel(context((2,), ("dp",)).device_mesh)
    parameters = dict(pm.named_parameters())
    assert not parameters["frozen"].requires_grad
    leaf = pm.boundary.leaves(["mlp.down"])[0]
    assert leaf is pm.boundary.leaves(["mlp.down"])[0]
    assert leaf.data_ptr() == parameters["mlp.down"].to_local().data_ptr()
    pm._apply(lambda tensor: tensor.clone())
    assert parameters["mlp.down"] is dict(pm.named_parameters())["mlp.down"]
    other = pm.boundary.leaves(["mlp.down"])[0]
    assert other is not leaf and other.data_ptr() == parameters["mlp.down"].to_local().data_ptr()
    backward(pm, 0)
    assert toy.worst(pm.gather_gradients(), expected_grads(0)) < 1e-12
    pm.zero_grad()
    parameters["mlp.down"].requires_grad_(False)
    backward(pm, 0)
    assert parameters["mlp.down"].grad is None
    model = toy.Mlp()
    model.mlp.down.requires_grad_(False)
    model(*toy.data(0))["loss"].backward()
    assert toy.worst(pm.gather_gradients(), named_grads(model)) < 1e-12


def test_leaves_follow_the_parameters(ranks):
    ranks(2).run(pointers)


def several_groups():
    """Experts over ep reduce over dp, the rest over both; nothing reduces where an axis has one rank."""
    rank = dist.get_rank()
    mesh = context((2, 2, 1), ("dp", "ep", "tp")).device_mesh
    layouts = [
        ParameterLayout("experts", (4, 3), None, {"ep": 0, "tp": 1}, ("dp",)),
        ParameterLayout("router", (3,), None, (), ("dp", "ep", "tp")),
        ParameterLayout("whole", (3,), None, {"tp": 0}, ()),
        ParameterLayout("half", (3,), None, (), ("ep",)),
    ]
    placed = {layout.name: Placed(layout, mesh) for layout in layouts}
    values = {layout.name: torch.ones(layout.shape, dtype=torch.float64) for layout in layouts}
    parameters = {n: materialize(p, lambda name: values[name].clone()) for n, p in placed.items()}
    boundary = GradientBoundary(placed, parameters.__getitem__)
    for unsynced in (1, 0):
        boundary.begin(parameters)
        with boundary.no_sync() if unsynced else contextlib.nullcontext():
            sum(leaf.sum() for leaf in boundary.leaves(parameters)).mul(10**rank).backward()
    local = {name: parameter.grad.to_local() / 2 for name, parameter in parameters.items()}
    same = {0: 101, 1: 1010, 2: 101, 3: 1010}[rank]
    assert (local["experts"] == same).all() and local["experts"].shape == (2, 3)
    assert (local["router"] == 1111).all()
    assert (local["whole"] == 10**rank).all()
    assert (local["half"] == (11 if rank < 2 else 1100)).all()
    return [(r.axes, r.names) for r in boundary.reductions]


def test_groups_of_experts_and_others(ranks):
    for found in ranks(4).run(several_groups):
        assert found == [(("ep",), ("half",)), (("dp", "ep"), ("router",)), (("dp",), ("experts",))]


def converted():
    pm = toy.parallel(context((2,), ("dp",)).device_mesh)
    x, labels = toy.shard(pm, *toy.data(0))
    with pytest.raises(
        TedfxError,
        match="stays in its dtype and on its device, it cannot become torch.float32 .* convert the model "
        "before",
    ):
        pm.float()
    pm.double()
    pm(x, labels)["loss"].backward()


def test_parameters_keep_their_dtype(ranks):
    ranks(2).run(converted)


def summed_wide(stage):
    """bfloat16 parameters, gradients summed and kept in float32: two micro-batches, one sum."""
    pm = toy.parallel(
        context((2, 2), ("dp", "tp")).device_mesh,
        toy.Mlp(0).to(torch.bfloat16),
        zero=stage,
        gradient_dtype=torch.float32,
    )
    (x, labels), grads = (t.to(torch.bfloat16) for t in toy.shard(pm, *toy.data(0, rows=8))), {}
    with pm.no_sync():
        pm(x[:2], labels[:2])["loss"].backward()
    for name, p in ((name, pm.get_parameter(name)) for name in pm.placed):
        grads[name] = None if p.grad is None else p.grad.to_local().clone()
        assert p.grad is None or p.grad.dtype == p.grad.to_local().dtype == torch.float32
    pm(x[2:], labels[2:])["loss"].backward()
    assert all(
        p.dtype == torch.bfloat16 and (p.grad is None or p.grad.dtype == torch.float32)
        for p in pm.parameters()
    )
    assert sum(r.bytes for r in pm.reductions) == 4 * sum(
        pm.placed[n].whole.numel for n, g in grads.items() if g is not None
    )
    expected = {n: g.float() for n, g in named_grads_of_halves(toy.data(0, rows=8)).items()}
    found = pm.gather_gradients()
    assert all((found[n] - g).norm() < 0.02 * g.norm() for n, g in expected.items())


def named_grads_of_halves(data):
    """Rows that the two data ranks take first, and those that they take second, each a mean of its own."""
    model = toy.Mlp(0)
    x, labels = data
    for rows in ([0, 1, 4, 5], [2, 3, 6, 7]):
        model(x[rows], labels[rows])["loss"].backward()
    return named_grads(model)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gradients_in_a_wider_dtype(ranks, stage):
    ranks(4).run(summed_wide, stage)
