"""ParallelModule against the single device: values, gradients, norm, optimizer, accumulation."""

import pytest
import torch
import torch.distributed as dist

from tests.module import toy
from tests.pool import context

MESHES = [
    ((2,), ("dp",)),
    ((2,), ("tp",)),
    ((2, 2), ("dp", "tp")),
    ((2, 2), ("tp", "dp")),
    ((2, 1), ("dp", "tp")),
    ((1,), ("dp",)),
]


def reference(steps=1, seed=0, fused=None, max_norm=0.5):
    model = toy.Mlp(seed)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses, norms = [], []
    for step in range(steps):
        opt.zero_grad()
        loss = model(*toy.data(step))["loss"]
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        opt.step()
        losses.append(loss.item())
    return model, losses, norms


def named_grads(model):
    return {n: p.grad for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}


def train(shape, names, options):
    mesh = context(shape, names).device_mesh
    log = []
    pm = toy.parallel(mesh, seed=0 if dist.get_rank() == 0 else 7, log=log)
    opt = torch.optim.AdamW([p for p in pm.parameters() if p.requires_grad], lr=0.05, **options)
    expected = toy.Mlp()
    expected(*toy.data(0))["loss"].backward()
    losses, norms = [], []
    for step in range(3):
        opt.zero_grad()
        x, labels = toy.shard(pm, *toy.data(step))
        out = pm(x, labels=labels)
        out["loss"].backward()
        if step == 0:
            assert toy.worst(pm.gather_gradients(), named_grads(expected)) < 1e-12
        norm = torch.nn.utils.clip_grad_norm_(pm.parameters(), 0.5)
        norms.append((norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item())
        opt.step()
        losses.append(out["loss"].item())
    model, expected_losses, expected_norms = reference(3)
    assert torch.allclose(torch.tensor(losses), torch.tensor(expected_losses), rtol=1e-12, atol=0)
    assert torch.allclose(torch.tensor(norms), torch.tensor(expected_norms), rtol=1e-12, atol=0)
    full = pm.gather_parameters()
    assert toy.worst(full, dict(model.named_parameters(remove_duplicate=False))) < 1e-11
    assert len(log) == 1 and pm.get_buffer("calls").tolist() == [3.0, 3.0]
    assert type(out) is dict and out["y"].shape[0] == x.shape[0]
    local = {n: p.to_local() for n, p in pm.named_parameters()}
    return {
        n: p
        for n, p in local.items()
        if all(q.is_replicate() for q in dict(pm.named_parameters())[n].placements)
    }


@pytest.mark.parametrize("shape,names", MESHES)
def test_three_steps(ranks, shape, names):
    world = torch.Size(shape).numel()
    replicas = ranks(world).run(train, shape, names, {})
    for other in replicas[1:]:
        assert all(torch.equal(other[name], replicas[0][name]) for name in other)


@pytest.mark.parametrize("options", [dict(foreach=True), dict(fused=True), dict(foreach=False)])
def test_optimizers(ranks, options):
    ranks(4).run(train, (2, 2), ("dp", "tp"), options)


def let_go():
    import gc
    import weakref

    mesh = context((2,), ("dp",)).device_mesh
    pm = toy.parallel(mesh)
    x, labels = toy.shard(pm, *toy.data(0))
    pm(x, labels=labels)["loss"].backward()
    module, parameter = weakref.ref(pm), weakref.ref(next(pm.parameters()))
    del pm
    gc.collect()
    return module() is None and parameter() is None


def test_a_module_that_is_let_go_of_frees_its_parameters(ranks):
    assert all(ranks(2).run(let_go))
