"""A sharded, tiled step is the step of torch's optimizer on one device."""

import pytest
import torch

from tests.module import toy
from tests.optim.training import OPTIMIZERS, assert_replicas_equal, module, parameters, sharded, single, train


def five_steps(shape, names, cases):
    """cases: (optimizer, tile, bucket_bytes)."""
    expected = {name: single(name, 5) for name in {name for name, *_ in cases}}
    for zero in (0, 1, 2):
        for name, tile, bucket_bytes in cases:
            model, norms = expected[name]
            pm = module(shape, names, zero, bucket_bytes=bucket_bytes)
            found = train(pm, sharded(pm, name, tile=tile, max_norm=0.5), 5)
            assert torch.allclose(torch.tensor(found, dtype=torch.float64), torch.tensor(norms, dtype=torch.float64), rtol=1e-12, atol=0), (zero, name, tile)
            assert toy.worst(pm.gather_parameters(), parameters(model)) < 1e-12, (zero, name, tile)
            assert_replicas_equal(pm)


@pytest.mark.parametrize("names", [("dp", "tp"), ("dp", "ep")])
def test_every_optimizer_in_small_tiles(ranks, names):
    ranks(4).run(five_steps, (2, 2), names, [(name, 7, 2**20) for name in OPTIMIZERS])


@pytest.mark.parametrize("names", [("dp", "tp"), ("dp", "ep"), ("tp", "dp")])
def test_tiles_and_buckets_of_any_size(ranks, names):
    ranks(4).run(five_steps, (2, 2), names, [("AdamW", 16, 100), ("AdamW", None, 200), ("AdamW", 10**6, 1)])
