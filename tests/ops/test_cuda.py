"""The single-device operators on a GPU: the grouped matmul against the loop, its edges, and bitwise
repetition."""

import pytest
import torch

from tedfx.ops import experts, moe, random, vocab
from tests.ops.layers import plain, whole

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

COUNTS = {
    "even": [16, 16, 16, 16],
    "empty experts": [0, 41, 0, 3],
    "one expert": [0, 0, 64, 0],
    "odd": [1, 2, 3, 5],
}


def _near(got, exact):
    assert not got.isnan().any()
    assert (got.double() - exact).norm() <= 2e-2 * exact.norm()  # several roundings of 4e-3 each


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", [32, 12])  # 12 does not suit the kernel: the loop
def test_grouped_linear_and_its_gradients(counts, transposed, width):
    counts = torch.tensor(COUNTS[counts], device="cuda")
    rows = torch.randn(int(counts.sum()), width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(
        4, *((width, 24) if transposed else (24, width)), device="cuda", dtype=torch.bfloat16
    )
    cotangent = torch.randn(rows.shape[0], 24, device="cuda", dtype=torch.bfloat16)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (rows, weight)]
        # poisoned memory: what the kernel leaves unwritten shows
        junk = [torch.full_like(leaf, float("nan")) for leaf in leaves for _ in range(3)]
        del junk
        out = moe.grouped_linear(*leaves, counts, transposed)
        results.append([out, *torch.autograd.grad(out, leaves, cotangent.to(dtype))])
    for got, exact in zip(*results, strict=True):
        _near(got, exact)
    assert experts._has_kernel(rows, width, 24) == (width == 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layer_is_right_and_bitwise_repeatable(dtype):
    tokens, k, e, h, f = 257, 2, 8, 64, 96
    ids = torch.randint(0, e - 2, (tokens, k), device="cuda")
    shapes = (tokens, h), (tokens, k), (e, f, h), (e, f), (e, f, h)
    x, *rest = [torch.randn(s, device="cuda").to(dtype).requires_grad_() for s in shapes]
    cotangent = torch.randn(tokens, h, device="cuda").to(dtype)
    runs = []
    for _ in range(3):
        out = whole(x, ids, *rest)
        runs.append([out, *torch.autograd.grad(out, [x, *rest], cotangent)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    doubles = [t.detach().double().requires_grad_() for t in (x, *rest)]
    exact = plain(doubles[0], ids, *doubles[1:])
    for got, want in zip(
        runs[0], [exact, *torch.autograd.grad(exact, doubles, cotangent.double())], strict=True
    ):
        _near(got, want)


def test_no_host_synchronisation_with_the_kernel():
    ids = torch.randint(0, 4, (64, 2), device="cuda")
    shapes = (64, 32), (64, 2), (4, 16, 32), (4, 16), (4, 16, 32)
    x, *rest = [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    whole(x, ids, *rest).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        whole(x, ids, *rest).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_draws_and_cross_entropy_agree_with_the_cpu():
    factors, seed = (((64, ()),), ((33, ()),)), torch.tensor(-5)
    draw = lambda seed: random.draw("uniform", (0.0, 1.0), seed, 7, factors)
    assert torch.equal(draw(seed.cuda()).cpu(), draw(seed))
    logits, labels = torch.randn(9, 50, dtype=torch.float64), torch.randint(0, 50, (9,))
    on_cpu = vocab.vocab_parallel_cross_entropy(logits, labels, ())
    torch.testing.assert_close(
        vocab.vocab_parallel_cross_entropy(logits.cuda(), labels.cuda(), ()).cpu(), on_cpu
    )


def test_compiled_draws_are_the_eager_ones():
    factors = (((640, ()),), ((33, ()),))

    def draw(seed):
        return random.draw("uniform", (0.0, 1.0), seed, 7, factors)

    compiled = torch.compile(draw, fullgraph=True)
    for seed in (0, -1, -(2**63), 2**63 - 1, 123456789):
        seed = torch.tensor(seed, device="cuda")
        assert torch.equal(compiled(seed), draw(seed))


def test_compiled_layer():
    compiled = torch.compile(whole, fullgraph=True, dynamic=True)
    for seed in (0, 1):
        torch.manual_seed(seed)
        tokens = 20 + seed
        ids = torch.randint(0, 4, (tokens, 2), device="cuda")
        shapes = (tokens, 32), (tokens, 2), (4, 16, 32), (4, 16), (4, 16, 32)
        x, *rest = [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes]
        results = []
        for fn in (whole, compiled):
            out = fn(x, ids, *rest)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), [x, *rest])])
        for eager, traced in zip(*results, strict=True):
            _near(traced, eager.double())
