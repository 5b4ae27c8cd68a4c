"""The ops inside one compiled graph: no breaks, the same numbers as eager, and new row counts do not recompile."""

import pytest
import torch

from tedfx.ops import context, convert, moe, random, vocab
from tests import pool

import os
BACKEND=os.environ.get('BACKEND','aot_eager')
E, K, H, F = 8, 2, 6, 10


def _expert_layer(x, ids, weights, up, down, axes):
    order, counts = moe.route(ids, E)
    send, recv, recv_counts, counts = moe.exchange_counts(counts, axes)
    rows = moe.permute_rows(x, order, K)
    rows = moe.all_to_all_single(rows, recv, send, axes)
    index = moe.expert_major(recv_counts, recv)
    rows = moe.index_rows(rows, index)
    rows = moe.grouped_linear(torch.relu(moe.grouped_linear(rows, up, counts)), down, counts)
    rows = moe.all_to_all_single(moe.unindex_rows(rows, index), send, recv, axes)
    return moe.combine(rows, order, weights)


def _owned_layer(x, ids, weights, up, down, axes):
    order, counts = moe.route(ids, E, owned=axes)
    counts = moe.local_counts(counts, axes)
    rows = moe.permute_rows(convert.sum_gradient(x, axes), order, K)
    rows = moe.grouped_linear(torch.relu(moe.grouped_linear(rows, up, counts)), down, counts)
    return convert.all_reduce(moe.combine(rows, order, convert.sum_gradient(weights, axes)), axes)


def _moe_on_rank(shape, names, axes, layer, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.config.capture_scalar_outputs = True
    ctx = pool.context(shape, names, (axes,))
    size = ctx.size(axes)
    replicated = layer is _owned_layer
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    stats = torch._dynamo.utils.counters["stats"]
    with context.use(ctx):
        for step in range(4):
            torch.manual_seed(step if replicated else step * 100 + ctx.coordinate(axes))
            tokens = 5 + step
            x = torch.randn(tokens, H, dtype=torch.float64)
            ids = torch.randint(0, E, (tokens, K))
            if step == 2:
                ids[:] = 3
            weights = torch.rand(tokens, K, dtype=torch.float64)
            up = torch.randn(E // size, F, H, dtype=torch.float64)
            down = torch.randn(E // size, H, F, dtype=torch.float64)
            grads = []
            for fn in (layer, compiled):
                leaves = [t.clone().requires_grad_() for t in (x, weights, up, down)]
                out = fn(leaves[0], ids, *leaves[1:], axes)
                out.square().sum().backward()
                grads.append([out.detach(), *(leaf.grad for leaf in leaves)])
            for eager, traced in zip(*grads, strict=True):
                torch.testing.assert_close(traced, eager, rtol=1e-12, atol=1e-12)
            if step == 0:
                before = stats["unique_graphs"]
    return before, stats["unique_graphs"]


@pytest.mark.parametrize("layer", [_expert_layer, _owned_layer])
def test_new_counts_do_not_recompile(ranks, layer):
    for before, after in ranks(2).run(_moe_on_rank, (2,), ("ep",), ("ep",), layer, BACKEND):
        assert before == after == 1
