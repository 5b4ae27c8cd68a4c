"""Draws by global index: shards put together are the whole's draw, replicas agree, and the draws look
random."""

import pytest
import torch

from tedfx.ops import context, random
from tests import pool

SEED = torch.tensor(1234)


def _whole(*sizes):
    return tuple(((size, ()),) for size in sizes)


# name -> (factors on the mesh (a, b) = (2, 2), their global sizes, how to cut the whole's [8, 12] draw)
CASES = {
    "replicated": (((8, ()),), ((12, ()),)),
    "rows over a": (((4, ("a",)),), ((12, ()),)),
    "columns over both": (((8, ()),), ((3, ("a", "b")),)),
    "columns over both, b major": (((8, ()),), ((3, ("b", "a")),)),
    "fused columns": (((8, ()),), ((2, ()), (3, ("b",)))),
    "two sharded factors in a dim": (((2, ("a",)), (1, ("b",))), ((12, ()),)),
    "both dims": (((4, ("b",)),), ((2, ()), (3, ("a",)))),
}


def _cut(whole, factors, coordinate):
    """The local piece by plain indexing: every dim is seen as its global factors."""
    sizes = {"a": 2, "b": 2}
    for dim, parts in enumerate(factors):
        spans = [torch.Size([sizes[axis] for axis in axes]).numel() for _, axes in parts]
        shape = [local * span for (local, _), span in zip(parts, spans, strict=True)]
        index = torch.arange(whole.shape[dim]).view(shape)
        for d, ((local, axes), span) in enumerate(zip(parts, spans, strict=True)):
            place = 0
            for axis in axes:
                place = place * sizes[axis] + coordinate[axis]
            index = index.narrow(d, place * local, local)
        whole = whole.index_select(dim, index.reshape(-1))
    return whole


def _on_rank():
    ctx = pool.context((2, 2), ("a", "b"), (("a", "b"), ("b", "a")))
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    for name, factors in CASES.items():
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            with context.use(ctx):
                local = random.uniform(factors, SEED, 3, dtype)
            assert torch.equal(
                local, _cut(random.uniform(_whole(8, 12), SEED, 3, dtype), factors, ctx.coordinates)
            ), name
        whole = random.dropout(x, 0.3, SEED, 3, _whole(8, 12))
        with context.use(ctx):
            local = random.dropout(_cut(x, factors, ctx.coordinates), 0.3, SEED, 3, factors)
        assert torch.equal(local, _cut(whole, factors, ctx.coordinates)), name


def _rows_on_rank():
    """Rows of this rank's tokens, two choices each, in an order of their own: they draw what the whole draws
    at their assignments' numbers."""
    ctx = pool.context((2, 2), ("a", "b"), (("a", "b"), ("b", "a")))
    whole = random.uniform(_whole(16, 6), SEED, 3)  # 8 tokens x 2 choices
    for name, (tokens, _) in CASES.items():
        with context.use(ctx):
            mine = _cut(torch.arange(16).view(8, 2), (tokens, ((2, ()),)), ctx.coordinates).flatten()
            order = torch.randperm(mine.numel(), generator=torch.Generator().manual_seed(1))[:5]
            numbers = random.row_numbers(order, 2, tokens)
            assert torch.equal(numbers, mine[order]), name
            rows = random.uniform((((numbers, tokens, 2, random.NUMBERED),), ((6, ()),)), SEED, 3)
        assert torch.equal(rows, whole[mine[order]]), name


def test_rows_draw_by_their_number(ranks):
    ranks(4).run(_rows_on_rank)


def test_shards_are_pieces_of_the_whole(ranks):
    ranks(4).run(_on_rank)


def test_statistics():
    n = 1 << 16
    draws = random.uniform(_whole(256, 256), SEED, 0, torch.float64).flatten()
    assert 0.0 <= draws.min() and draws.max() < 1.0 and draws.unique().numel() == n
    assert abs(draws.mean() - 0.5) < 4 / (12 * n) ** 0.5
    bins = torch.histc(draws, 256, 0, 1)
    assert 150 < ((bins - n / 256) ** 2 / (n / 256)).sum() < 370  # chi square, 255 degrees, +- 5 sigma
    for other in (
        random.uniform(_whole(256, 256), SEED + 1, 0, torch.float64).flatten(),
        random.uniform(_whole(256, 256), SEED, 1, torch.float64).flatten(),
        draws.roll(1),
        draws.roll(256),
    ):
        assert torch.corrcoef(torch.stack([draws, other]))[0, 1].abs() < 5 / n**0.5
    for bit in range(0, 24, 5):
        assert abs(((draws * 2 ** (bit + 1)).long() & 1).double().mean() - 0.5) < 5 / (2 * n**0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_no_draw_rounds_up_to_one(dtype):
    draws = random.uniform(_whole(1 << 16), SEED, 0, dtype)
    assert draws.dtype == dtype and draws.min() >= 0 and draws.max() < 1
    assert abs(draws.double().mean() - 0.5) < 0.01


def test_dropout_keeps_the_mean_and_has_its_own_gradient():
    x = torch.ones(300, 300, requires_grad=True)
    out = random.dropout(x, 0.25, SEED, 5, _whole(300, 300))
    assert abs((out == 0).double().mean() - 0.25) < 0.01 and abs(out.mean() - 1) < 0.01
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    assert torch.equal(random.dropout(x, 0.0, SEED, 5, _whole(300, 300)), x)
    assert not random.dropout(x, 1.0, SEED, 5, _whole(300, 300)).any()
    assert random.dropout(torch.ones(0, 3), 0.5, SEED, 5, _whole(0, 3)).shape == (0, 3)


def test_errors():
    x = torch.ones(4, 6)
    with pytest.raises(ValueError, match="not in"):
        random.dropout(x, 1.5, SEED, 0, _whole(4, 6))
    with pytest.raises(ValueError, match="do not multiply to dim 1"):
        random.dropout(x, 0.5, SEED, 0, _whole(4, 5))
    with pytest.raises(ValueError, match="factors for 1 dims"):
        random.dropout(x, 0.5, SEED, 0, _whole(4))
    with pytest.raises(ValueError, match="not torch.int64"):
        random.uniform(_whole(4), SEED, 0, torch.int64)
