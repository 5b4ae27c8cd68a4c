"""Several sums by one collective, against each by itself."""

import pytest
import torch

from tedfx.ops import all_reduce, all_reduce_batched, context, count_collectives
from tests import pool

SHAPES = [(3,), (), (2, 0), (2, 5)]


def _batched_on_rank():
    ctx = pool.context((2, 2), ("a", "b"))
    g = torch.Generator().manual_seed(ctx.coordinate(("a", "b")))
    values = [torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_(i != 1) for i, shape in enumerate(SHAPES)]
    with context.use(ctx), count_collectives() as log:
        together = all_reduce_batched(values, ("b",))
        alone = [all_reduce(x, ("b",)) for x in values]
    assert [c.op for c in log] == ["all_reduce"] * 5 and log[0].bytes == sum(c.bytes for c in log[1:]) and {c.axes for c in log} == {("b",)}
    for i, (x, y, z) in enumerate(zip(values, together, alone)):
        assert torch.equal(y, z) and y.shape == x.shape
        if i == 1:
            continue  # no gradient asked for
        (grad,) = torch.autograd.grad(y.square().sum(), [x], retain_graph=True)  # the others have no cotangent
        assert torch.equal(grad, 2 * z)
    with context.use(ctx), pytest.raises(ValueError, match="different dtypes"):
        all_reduce_batched([values[0], values[0].float()], ("b",))
    with context.use(ctx):
        (one,) = all_reduce_batched(values[:1], ("a",))
    assert torch.equal(one, sum_over_a(values[0].detach(), ctx))


def sum_over_a(x, ctx):
    with context.use(ctx):
        return all_reduce(x, ("a",))


def test_batched(ranks):
    ranks(4).run(_batched_on_rank)
