"""Draws by global index: shards put together are the whole's draw, replicas agree, and the draws look
random."""

import math

import pytest
import torch

from tedfx.ops import context, random
from tedfx.ops.distributions import DISTRIBUTIONS
from tests import pool

SEED = torch.tensor(1234)


def _uniform(factors, site, dtype=torch.float32, seed=SEED):
    return random.draw("uniform", (0.0, 1.0), seed, site, factors, dtype)


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
                local = _uniform(factors, 3, dtype)
            assert torch.equal(local, _cut(_uniform(_whole(8, 12), 3, dtype), factors, ctx.coordinates)), name
        whole = random.dropout(x, 0.3, SEED, 3, _whole(8, 12))
        with context.use(ctx):
            local = random.dropout(_cut(x, factors, ctx.coordinates), 0.3, SEED, 3, factors)
        assert torch.equal(local, _cut(whole, factors, ctx.coordinates)), name


def _rows_on_rank():
    """Rows of this rank's tokens, two choices each, in an order of their own: they draw what the whole draws
    at their assignments' numbers."""
    ctx = pool.context((2, 2), ("a", "b"), (("a", "b"), ("b", "a")))
    whole = _uniform(_whole(16, 6), 3)  # 8 tokens x 2 choices
    for name, (tokens, _) in CASES.items():
        with context.use(ctx):
            mine = _cut(torch.arange(16).view(8, 2), (tokens, ((2, ()),)), ctx.coordinates).flatten()
            order = torch.randperm(mine.numel(), generator=torch.Generator().manual_seed(1))[:5]
            numbers = random.row_numbers(order, 2, tokens)
            assert torch.equal(numbers, mine[order]), name
            rows = _uniform((((numbers, tokens, 2, random.NUMBERED),), ((6, ()),)), 3)
        assert torch.equal(rows, whole[mine[order]]), name


def test_rows_draw_by_their_number(ranks):
    ranks(4).run(_rows_on_rank)


def test_shards_are_pieces_of_the_whole(ranks):
    ranks(4).run(_on_rank)


def test_statistics():
    n = 1 << 16
    draws = _uniform(_whole(256, 256), 0, torch.float64).flatten()
    assert 0.0 <= draws.min() and draws.max() < 1.0 and draws.unique().numel() == n
    assert abs(draws.mean() - 0.5) < 4 / (12 * n) ** 0.5
    bins = torch.histc(draws, 256, 0, 1)
    assert 150 < ((bins - n / 256) ** 2 / (n / 256)).sum() < 370  # chi square, 255 degrees, +- 5 sigma
    for other in (
        _uniform(_whole(256, 256), 0, torch.float64, SEED + 1).flatten(),
        _uniform(_whole(256, 256), 1, torch.float64).flatten(),
        draws.roll(1),
        draws.roll(256),
    ):
        assert torch.corrcoef(torch.stack([draws, other]))[0, 1].abs() < 5 / n**0.5
    for bit in range(0, 24, 5):
        assert abs(((draws * 2 ** (bit + 1)).long() & 1).double().mean() - 0.5) < 5 / (2 * n**0.5)


# name -> (parameters, the same drawn by torch, the distribution function; None: whole numbers)
TORCH = {
    "uniform": ((-1.0, 3.0), lambda x: x.uniform_(-1.0, 3.0), lambda x: (x + 1) / 4),
    "normal": ((1.0, 2.0), lambda x: x.normal_(1.0, 2.0), lambda x: torch.special.ndtr((x - 1) / 2)),
    "log_normal": (
        (0.5, 0.25),
        lambda x: x.log_normal_(0.5, 0.25),
        lambda x: torch.special.ndtr((x.log() - 0.5) * 4),
    ),
    "exponential": ((2.0,), lambda x: x.exponential_(2.0), lambda x: 1 - (-2 * x).exp()),
    "cauchy": ((1.0, 2.0), lambda x: x.cauchy_(1.0, 2.0), lambda x: ((x - 1) / 2).atan() / math.pi + 0.5),
    "bernoulli": ((0.3,), lambda x: x.bernoulli_(0.3), None),
    "geometric": ((0.3,), lambda x: x.geometric_(0.3), None),
    "integers": ((-3, 8), lambda x: x.random_(-3, 8), None),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", TORCH)
def test_a_distribution_is_torchs(name, dtype):
    """Kolmogorov and Smirnov's distance to the distribution function; of whole numbers how often each is
    drawn, beside torch's own draws."""
    parameters, theirs, function = TORCH[name]
    n = 1 << 16
    x = random.draw(name, parameters, SEED, 2, _whole(n // 16, 16), dtype).flatten()
    assert x.dtype == dtype and x.isfinite().all()
    torch.manual_seed(0)
    other = theirs(torch.empty(n, dtype=dtype))
    if function is None:
        bins = lambda x: torch.bincount(x.long() + 3, minlength=64)[:64] / n
        assert torch.equal(x, x.round()) and (bins(x) - bins(other)).abs().max() < 5 * (0.5 / n) ** 0.5
        assert x.min() == other.min()
        return
    ranks = torch.arange(1, n + 1, dtype=torch.float64) / n
    for drawn in (x, other):  # the second: that the function is right
        assert (function(drawn.double().sort().values) - ranks).abs().max() < 1.95 / n**0.5  # p = 1e-3
    if name != "cauchy":
        assert abs(x.double().mean() - other.double().mean()) < 5 * x.double().std() * (2 / n) ** 0.5
        assert abs(x.double().std() / other.double().std() - 1) < 0.03


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_logarithms_are_finite(dtype):
    """Also of the first and the last of all words of bits."""
    words = torch.tensor([0, -1, 1 << 62, -(1 << 62)])
    for name in ("exponential", "normal", "cauchy", "log_normal", "geometric"):
        made = DISTRIBUTIONS[name].value(words, dtype, *TORCH[name][0])
        assert made.dtype == dtype and (
            made.isfinite().all() or (name, dtype) == ("cauchy", torch.float16)
        ), name
    drawn = random.draw("exponential", (1.0,), SEED, 0, _whole(1 << 16), dtype)
    assert drawn.log().isfinite().all() and drawn.min() > 0
    assert DISTRIBUTIONS["uniform"].value(words, dtype, 0.98, 1.02).max() <= torch.tensor(1.02, dtype=dtype)


def test_integers_of_every_kind():
    for dtype, last in (
        (torch.uint8, 255),
        (torch.int32, 2**31 - 1),
        (torch.int64, 2**63 - 1),
        (torch.bool, 1),
    ):
        drawn = random.draw("integers", (0, None), SEED, 0, _whole(1 << 12), dtype)
        assert drawn.dtype == dtype and drawn.max() > 0.99 * last and drawn.min() <= 0.01 * last
    normal = random.draw("normal", (torch.tensor([[0.0, 5.0]]), torch.ones(3, 1)), SEED, 0, _whole(3, 2))
    assert normal.shape == (3, 2) and (normal[:, 1] > normal[:, 0]).all()


@pytest.mark.parametrize("replacement", [False, True])
def test_multinomial_is_torchs(replacement):
    weights = torch.tensor([0.1, 0.0, 0.5, 0.4], dtype=torch.float64).expand(1 << 14, 4)
    torch.manual_seed(0)
    factors = _whole(1 << 14, 2, 4) if replacement else _whole(1 << 14, 4)
    mine = random.multinomial(weights, 2, replacement, SEED, 0, factors)
    pairs = [
        torch.bincount(x[:, 0] * 4 + x[:, 1], minlength=16) / len(x)
        for x in (mine, torch.multinomial(weights, 2, replacement))
    ]
    assert (pairs[0] - pairs[1]).abs().max() < 0.02
    assert (mine != 1).all() and (replacement or (mine[:, 0] != mine[:, 1]).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_no_draw_rounds_up_to_one(dtype):
    draws = _uniform(_whole(1 << 16), 0, dtype)
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
    with pytest.raises(ValueError, match="no draws of torch.complex64"):
        _uniform(_whole(4), 0, torch.complex64)
