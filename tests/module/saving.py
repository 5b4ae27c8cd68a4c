"""A run of the toy that is saved: what the tests of tedfx.saving share."""

import torch

import tedfx
from tests.module import toy
from tests.pool import context

MESHES = {
    "ep2": ((2,), ("ep",)),
    "ep2 tp2": ((2, 2), ("ep", "tp")),
    "dp2 tp2": ((2, 2), ("dp", "tp")),
    "tp2": ((2,), ("tp",)),
}


def two_groups(parameters, tensor_lr=False):
    return [
        {"params": parameters[1::2], "lr": torch.tensor(3e-3) if tensor_lr else 3e-3},
        {"params": parameters[::2]},
    ]


OPTIMIZERS = {
    "adamw": lambda parameters, lr: torch.optim.AdamW(two_groups(parameters), lr=lr),
    "sgd": lambda parameters, lr: torch.optim.SGD(two_groups(parameters), lr=lr, momentum=0.9, dampening=0.5),
    "tensor_lr": lambda parameters, lr: torch.optim.Adam(
        two_groups(parameters, tensor_lr=True), lr=torch.tensor(lr), amsgrad=True, foreach=False
    ),
}


def make(seed=0, mesh_name="dp2 tp2", optimizer=torch.optim.AdamW, model=None):
    shape, names = MESHES[mesh_name]
    pm = toy.parallel(context(shape, names).device_mesh, model, seed)
    return pm, optimizer([p for p in pm.parameters() if p.requires_grad], lr=0.05)


def step(pm, optimizer, number):
    x, labels = toy.shard(pm, *toy.data(number))
    loss = pm(x, labels=labels)["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def held(pm, optimizer):
    """Every local number of a run, in order."""
    found = [p.to_local() for p in pm.parameters()] + list(pm.buffers())
    for p in pm.parameters():
        found += [
            v.to_local() if hasattr(v, "to_local") else torch.as_tensor(v)
            for _, v in sorted(optimizer.state.get(p, {}).items())
        ]
    return [t.detach().clone() for t in found]


def saved_toy(folder):
    """Steps 1 and 2 of a run on two ranks."""
    pm, optimizer = make(mesh_name="tp2")
    step(pm, optimizer, 0)
    checkpoints = tedfx.Checkpointer(folder, pm, optimizer)
    checkpoints.save(1)
    step(pm, optimizer, 1)
    checkpoints.save(2)
