"""Programs under torch.compile: the same gradients, two graphs for all sizes, leaves that follow the
optimizer."""

import pytest
import torch

from tests.module import toy
from tests.pool import context


def compiled(options):
    torch._dynamo.reset()
    plain = toy.parallel(context((2,), ("dp",)).device_mesh)
    pm = toy.parallel(context((2,), ("dp",)).device_mesh, compile=options)
    for step, rows in enumerate((8, 8, 16, 24)):
        for each in (plain, pm):
            each.zero_grad()
            each(*toy.shard(each, *toy.data(step, rows)))["loss"].backward()
        assert toy.worst(pm.gather_gradients(), plain.gather_gradients()) < 1e-12
        if step == 2:
            frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    opt = torch.optim.SGD(pm.parameters(), lr=0.1)  # leaves follow updates in place, without a new graph
    before = pm(*toy.shard(pm, *toy.data(0)))["loss"].item()
    opt.step()
    assert pm(*toy.shard(pm, *toy.data(0)))["loss"].item() != before
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames


@pytest.mark.slow
def test_compiled(ranks):
    ranks(2).run(compiled, {"backend": "aot_eager"}, timeout=300)
