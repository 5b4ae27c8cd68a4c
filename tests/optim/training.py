"""Training the toy on one device and on a mesh, with any optimizer: what the tests of tedfx.optim compare."""

import torch
import torch.distributed as dist

from tedfx.optim import ShardedOptimizer
from tests.module import toy
from tests.pool import context

OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, dict(lr=0.05)),
    "Adam": (torch.optim.Adam, dict(lr=0.05, weight_decay=0.1, amsgrad=True)),
    "SGD": (torch.optim.SGD, dict(lr=0.1, momentum=0.9, dampening=0.3)),
    "RMSprop": (torch.optim.RMSprop, dict(lr=0.02, momentum=0.5, centered=True)),
    "Adagrad": (torch.optim.Adagrad, dict(lr=0.1, initial_accumulator_value=0.2)),
}


def mesh(shape, names):
    return context(shape, names).device_mesh


def module(shape, names, zero, dtype=torch.float64, **options):
    return toy.parallel(mesh(shape, names), toy.Mlp(0).to(dtype), zero=zero, **options)


def loss_of(pm, step, labels=True, rows=8):
    x, target = (t.to(next(pm.parameters()).dtype) for t in toy.shard(pm, *toy.data(step, rows)))
    return pm(x, labels=target)["loss"]


def single(name, steps, max_norm=0.5, groups=None, schedule=None, seed=0, **more):
    """(model, norms) after `steps` of torch's own optimizer on the whole batch.

    groups: model -> param groups. schedule: optimizer -> scheduler.
    """
    model = toy.Mlp(seed)
    cls, options = OPTIMIZERS[name]
    optimizer = cls(
        groups(dict(model.named_parameters())) if groups else model.parameters(), **{**options, **more}
    )
    scheduler = schedule(optimizer) if schedule else None
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        model(*toy.data(step))["loss"].backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
        optimizer.step()
        if scheduler:
            scheduler.step()
    return model, norms


def train(pm, optimizer, steps, start=0):
    norms = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(pm, step).backward()
        optimizer.step()
        norms.append(float(optimizer.grad_norm) if optimizer.grad_norm is not None else None)
    return norms


def sharded(pm, name, **options):
    cls, own = OPTIMIZERS[name]
    return ShardedOptimizer(pm, cls, **{**own, **options})


def parameters(model):
    return dict(model.named_parameters(remove_duplicate=False))


def assert_replicas_equal(pm):
    """Every local tensor is bitwise that of the ranks which hold the same."""
    for name, placed in pm.placed.items():
        local = pm.get_parameter(name).to_local().detach()
        if placed.kept is not placed.whole:
            continue
        for axis in pm.device_mesh.mesh_dim_names:
            if axis in placed.whole.axes:
                continue
            group = pm.device_mesh.get_group(axis)
            others = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
            dist.all_gather(others, local.contiguous(), group=group)
            assert all(torch.equal(other, local) for other in others), (name, axis)
