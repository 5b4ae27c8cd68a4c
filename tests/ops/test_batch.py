"""Several sums, and several prefix sums, by one collective, against each by itself."""

import pytest
import torch

from tedfx.ops import all_reduce, all_reduce_batched, context, count_collectives, cumsum, cumsum_batched
from tests import pool

SHAPES = [(3,), (), (2, 0), (2, 5)]


def _batched_on_rank():
    ctx = pool.context((2, 2), ("a", "b"))
    g = torch.Generator().manual_seed(ctx.coordinate(("a", "b")))
    values = [
        torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_(i != 1)
        for i, shape in enumerate(SHAPES)
    ]
    with context.use(ctx), count_collectives() as log:
        together = all_reduce_batched(values, ("b",))
        alone = [all_reduce(x, ("b",)) for x in values]
    assert (
        [c.op for c in log] == ["all_reduce"] * 5
        and log[0].bytes == sum(c.bytes for c in log[1:])
        and {c.axes for c in log} == {("b",)}
    )
    for i, (x, y, z) in enumerate(zip(values, together, alone)):
        assert torch.equal(y, z) and y.shape == x.shape
        if i == 1:
            continue  # no gradient asked for
        (grad,) = torch.autograd.grad(
            y.square().sum(), [x], retain_graph=True
        )  # the others have no cotangent
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


# shape without the summed dim, that dim, outer runs, dtype
QUEUES = [
    ((5,), 0, 1, torch.int64),
    ((2, 3), -2, 2, torch.bool),
    ((), 0, 3, torch.int32),
    ((4, 0), 1, 1, torch.int64),
    ((2, 3), 2, 2, torch.uint8),
]
LENGTHS = [2, 3, 0, 5]  # by rank: pieces need not be equal


def _cumsum_batched_on_rank(axes, dtype):
    ctx = pool.context((2, 2), ("a", "b"))
    ctx.ensure_groups([axes])
    index, size = ctx.coordinate(axes), ctx.size(axes)
    lengths, g = LENGTHS[:size], torch.Generator().manual_seed(0)
    mine, expected = [], []
    for shape, dim, outer, own in QUEUES:
        at = dim % (len(shape) + 1)
        whole = torch.randint(
            0, 2 if own == torch.bool else 9, (*shape[:at], outer, sum(lengths), *shape[at:]), generator=g
        ).to(own)
        cut = lambda t: t.split(lengths, at + 1)[index].flatten(at, at + 1)  # noqa: B023, E731
        mine.append(cut(whole))
        expected.append(cut(whole.flatten(at, at + 1).cumsum(at, dtype=dtype).view(whole.shape)))
    dims, outers = [q[1] for q in QUEUES], [q[2] for q in QUEUES]
    with context.use(ctx), count_collectives() as log:
        together = cumsum_batched(mine, axes, dims, outers, dtype)
        alone = [cumsum(x, dim, axes, outer, dtype) for x, dim, outer in zip(mine, dims, outers)]
    assert [(c.op, c.axes, c.phase) for c in log] == [("all_gather", axes, "forward")] * 6
    assert (
        log[0].bytes == sum(c.bytes for c in log[1:]) == dtype.itemsize * (5 + 2 * 2 * 3 + 3 + 0 + 2 * 2 * 3)
    )
    for x, y, z, want in zip(mine, together, alone, expected, strict=True):
        assert (
            y.dtype == z.dtype == dtype
            and y.shape == x.shape
            and torch.equal(y, want)
            and torch.equal(z, want)
        )
    with context.use(ctx):
        with pytest.raises(TypeError, match="only integers"):
            cumsum_batched(mine, axes, dims, outers, torch.float32)
        with pytest.raises(ValueError, match="in 3 runs"):
            cumsum_batched([torch.ones(4, dtype=dtype)] * 2, axes, [0, 0], [1, 3], dtype)


@pytest.mark.parametrize("axes", [("b",), ("a", "b"), ("b", "a")], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_cumsum_batched(ranks, axes, dtype):
    ranks(4).run(_cumsum_batched_on_rank, axes, dtype)


def _over_one_rank():
    with context.use(pool.context((1,), ("a",))), count_collectives() as log:
        found = cumsum_batched(
            [torch.ones(3, 2, dtype=torch.bool), torch.arange(3)], ("a",), [0, 0], [1, 1], torch.int64
        )
    assert not log and found[0][:, 0].tolist() == [1, 2, 3] and found[1].tolist() == [0, 1, 3]


def test_cumsum_batched_over_one_rank(ranks):
    ranks(1).run(_over_one_rank)
