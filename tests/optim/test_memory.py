"""What a step allocates is bounded by the tile and the bucket, whatever the number of parameters."""

import weakref

import pytest
import torch

import tedfx
from tedfx._torch import TorchDispatchMode
from tedfx.optim import ShardedOptimizer
from tedfx.runtime.module import ParallelModule
from tedfx.state.parameters import ParameterLayout
from tests.marks import slow
from tests.optim.training import mesh


class Live(TorchDispatchMode):
    """Bytes of the storages that appear while it is on, and the most that there were at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._seen: dict[int, weakref.ref] = {}

    def _gone(self, key, size):
        self.now -= size
        self._seen.pop(key, None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            t.untyped_storage()._cdata
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and type(tensor) is torch.Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata in known or storage._cdata in self._seen:
                    continue
                size = storage.nbytes()
                self._seen[storage._cdata] = weakref.finalize(storage, self._gone, storage._cdata, size)
                self.now += size
                self.most = max(self.most, self.now)
        return out


def experts(number, zero, dtype, names=("dp",)):
    """A module of stacked experts that is never called: gradients are set by hand."""
    layouts = [
        ParameterLayout("experts", (number, 16, 8), None, (), ("dp",)),
        ParameterLayout("bias", (5,), None, (), ("dp",)),
    ]
    values = {
        layout.name: torch.randn(
            layout.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32
        ).to(dtype)
        for layout in layouts
    }
    pm = ParallelModule(
        layouts,
        values.__getitem__,
        {},
        mesh((2,), names),
        None,
        ("dp",),
        options=tedfx.Options(zero=zero, bucket_bytes=2048),
    )
    for name, placed in pm.placed.items():
        pm.get_parameter(name).grad = placed.dtensor(
            torch.full(placed.share.shape, 0.1, dtype=dtype), placed.share.placements
        )
    return pm


def peaks(zero, dtype, tile, options):
    found = {}
    for number in (4, 5, 16, 64):
        pm = experts(number, zero, dtype)
        optimizer = ShardedOptimizer(pm, torch.optim.AdamW, lr=0.1, tile=tile, max_norm=1.0, **options)
        optimizer.step()
        with Live() as live:
            optimizer.step()
        found[number] = live.most
    return found


@pytest.mark.parametrize(
    "dtype,options",
    [
        (torch.float32, {}),
        slow(torch.bfloat16, {}),
        (torch.bfloat16, dict(offload="cpu")),
        slow(torch.float32, dict(foreach=True)),
    ],
)
@pytest.mark.parametrize("zero", [0, slow(1), 2])
def test_the_spike_is_a_tile(ranks, zero, dtype, options):
    tile = 256
    (found, _) = ranks(2).run(peaks, zero, dtype, tile, options)
    bound = 8 * 4 * tile + (
        3 * 2048 if zero else 0
    )  # eight tensors of a tile in float32; a bucket, its own part and the copy
    assert max(found.values()) <= bound, found
    assert found[64] <= found[16] * 1.05, found  # four times the experts


def test_without_tiles_it_grows(ranks):
    """The same measurement sees the spike that tiling removes."""
    (found, _) = ranks(2).run(peaks, 0, torch.bfloat16, None, {})
    assert found[64] > 3 * found[16] and found[64] > 4 * 64 * 16 * 8


def by_stage(zero, dtype):
    pm = experts(6, zero, dtype)
    optimizer = ShardedOptimizer(pm, torch.optim.AdamW, lr=0.1, tile=100, max_norm=1.0)
    for _ in range(2):
        optimizer.step()
    held = {name: share.master for name, share in optimizer._shares.items()}
    assert all((master is None) == (dtype == torch.float32) for master in held.values())
    with Live() as live:
        optimizer.step()
    return (
        {
            name: (tuple(p.to_local().shape), p.full_tensor().float().clone())
            for name, p in pm.named_parameters()
        },
        float(optimizer.grad_norm),
        live.most,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_the_parameter_is_the_share(ranks, dtype):
    """Stage 3: the update is written to the parameter itself, and nothing is gathered."""
    (whole, norm, _), _ = ranks(2).run(by_stage, 0, dtype)
    for zero in (1, 2, 3):
        (found, its_norm, most), _ = ranks(2).run(by_stage, zero, dtype)
        assert abs(its_norm - norm) < 1e-6 * norm
        for name, (shape, full) in found.items():
            assert torch.allclose(full, whole[name][1], rtol=1e-6, atol=1e-7)
            assert (shape == whole[name][0]) == (zero != 3)
        assert zero != 3 or most <= 8 * 4 * 100
