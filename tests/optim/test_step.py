"""A sharded, tiled step is the step of torch's optimizer on one device."""

import pytest
import torch

from tests.marks import slow_but
from tests.module import toy
from tests.optim.training import OPTIMIZERS, assert_replicas_equal, module, parameters, sharded, single, train


def three_steps(shape, names, cases):
    """cases: (optimizer, tile, bucket_bytes)."""
    expected = {name: single(name, 3) for name in {name for name, *_ in cases}}
    for zero in (0, 1, 2):
        for name, tile, bucket_bytes in cases:
            model, norms = expected[name]
            pm = module(shape, names, zero, bucket_bytes=bucket_bytes)
            found = train(pm, sharded(pm, name, tile=tile, max_norm=0.5), 3)
            assert torch.allclose(
                torch.tensor(found, dtype=torch.float64),
                torch.tensor(norms, dtype=torch.float64),
                rtol=1e-12,
                atol=0,
            ), (zero, name, tile)
            assert toy.worst(pm.gather_parameters(), parameters(model)) < 1e-12, (zero, name, tile)
            assert_replicas_equal(pm)


@pytest.mark.slow
def test_every_optimizer_in_small_tiles(ranks):
    ranks(4).run(three_steps, (2, 2), ("dp", "tp"), [(name, 7, 2**20) for name in OPTIMIZERS])


@pytest.mark.parametrize("names", slow_but([("tp", "dp")], [("dp", "ep"), ("tp", "dp")]))
def test_tiles_and_buckets_of_any_size(ranks, names):
    ranks(4).run(three_steps, (2, 2), names, [("AdamW", 16, 100), ("AdamW", None, 200), ("AdamW", 10**6, 1)])


def kernels(zero):
    model, _ = single("AdamW", 3)
    for options in (dict(fused=True), dict(foreach=True), dict(foreach=False)):
        pm = module((2, 2), ("dp", "ep"), zero)
        optimizer = sharded(pm, "AdamW", tile=16, max_norm=0.5, **options)
        train(pm, optimizer, 3)
        key, value = next(iter(options.items()))
        assert all(
            batch.inner.param_groups[0][key] is value for batches in optimizer._batches for batch in batches
        )
        assert toy.worst(pm.gather_parameters(), parameters(model)) < 1e-12
        assert_replicas_equal(pm)


@pytest.mark.parametrize("zero", [0, 2])
def test_the_users_kernels(ranks, zero):
    """fused and foreach reach the inner optimizers; shares without elements do not disturb them."""
    ranks(4).run(kernels, zero)
