"""The fused update against torch's optimizers in float64."""

import pytest
import torch

CASES = [(cls, maximize) for cls in (torch.optim.Adam, torch.optim.AdamW) for maximize in (False, True)]


@pytest.mark.parametrize("cls,maximize", CASES)
@pytest.mark.parametrize("size", [1, 3000, 20000])
@pytest.mark.parametrize("factor", [None, 0.37])
def test_is_torchs_update(cls, maximize, size, factor, device):
    from tedfx.kernels import adam

    generator = torch.Generator().manual_seed(0)
    options = dict(lr=1e-2, betas=(0.9, 0.999), weight_decay=0.1, eps=1e-8)
    start = torch.randn(size, generator=generator)
    exact = start.double().clone().requires_grad_()
    optimizer = cls([exact], **options, maximize=maximize)
    weight, low = start.to(device), start.bfloat16().to(device)
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    step = torch.zeros((), device=device)
    scale = None if factor is None else torch.tensor(factor, device=device)
    for _ in range(4):
        grad = torch.randn(size, generator=generator).bfloat16()
        exact.grad = grad.double() * (1.0 if factor is None else factor)
        optimizer.step()
        step += 1
        given = grad.to(device)
        tensors = weight, given, first, second, low, step
        entry = adam.Entry(*(x.data_ptr() for x in tensors), size)
        none = adam.Entry(*(0 for _ in tensors), 0)
        bases = adam.Bases(weight, given, first, low)
        adam.update(
            [none, entry],
            bases,
            scale,
            decoupled=cls is torch.optim.AdamW,
            maximize=maximize,
            **options,
        )
    torch.testing.assert_close(weight.double().cpu(), exact.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(low.float(), weight, rtol=2**-7, atol=0)
    state = optimizer.state[exact]
    torch.testing.assert_close(first.double().cpu(), state["exp_avg"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(second.double().cpu(), state["exp_avg_sq"], rtol=1e-5, atol=1e-6)


KINDS = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize("tile", [1000, None])
@pytest.mark.parametrize("dtype,master", KINDS)
def test_an_optimizer_steps_as_with_torchs_own(dtype, master, tile, device, monkeypatch):
    if device.type == "cpu" and torch.bfloat16 in (dtype, master):
        pytest.skip("Triton's interpreter cuts a bfloat16 off where a GPU rounds it")
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    import tedfx
    from tedfx import kernels
    from tedfx.optim import fused
    from tests.models_plain import PLAIN

    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh, taken = init_device_mesh(device.type, (1,), mesh_dim_names=("dp",)), []
    ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0)).to(device)
    takes, runs = fused._takes, []
    for _ in range(2):
        model = PLAIN["plain_stacked"]().to(device, dtype)
        pm = tedfx.parallelize(model, mesh, example_inputs=dict(input_ids=ids, labels=ids))
        optimizer = tedfx.optim.ShardedOptimizer(
            pm, torch.optim.AdamW, lr=1e-2, weight_decay=0.1, max_norm=0.5, master_dtype=master, tile=tile
        )
        runs.append((pm, optimizer))
    for _ in range(4):
        runs[0][0](input_ids=ids, labels=ids).loss.backward()
        for kernel, (pm, optimizer) in zip((False, True), reversed(runs)):
            for mine, given in zip(pm.parameters(), runs[0][0].parameters()):
                mine.grad = given.grad.clone()  # a GPU's gradients differ from run to run
            with monkeypatch.context() as patch:
                if device.type == "cpu":  # interpreted, for the optimizer alone
                    patch.setattr(kernels, "takes", lambda *tensors: True)
                patch.setattr(
                    fused, "_takes", lambda *given: bool(taken.append(takes(*given))) or kernel and taken[-1]
                )
                optimizer.step()
        for pm, optimizer in runs:
            optimizer.zero_grad()
    assert taken.count(True) >= 6  # all steps but the first of each
    (values, states), (others, their_states) = (
        (pm.state_dict(), optimizer.state_dict()["state"]) for pm, optimizer in runs
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # bfloat16 rounds in every step

    def check(found, expected):
        a, b = (x.to_local().float() if hasattr(x, "to_local") else x.float() for x in (found, expected))
        assert (a - b).norm() <= tolerance * b.norm()

    for name in values:
        check(values[name], others[name])
        for key in states.get(name, ()):
            check(states[name][key], their_states[name][key])
