"""The ops inside one compiled graph: no breaks, the numbers of eager, and new row counts do not recompile.

aot_eager traces everything that inductor would be given. Inductor itself (a minute of C++ compilation) and
four ranks that trace at once are `slow`; not so the hash of the random draws under inductor, whose integer
arithmetic must wrap there as well.
"""

import pytest
import torch

from tedfx.ops import all_reduce_batched, context, convert, cumsum_batched, random, vocab
from tests import pool
from tests.ops.layers import E, F, H, K, Roles, local

LAYOUTS = {
    "exchange": ((2,), ("ep",), Roles(("ep",), tokens=("ep",), exchange=("ep",))),
    "owned": ((2,), ("tp",), Roles(("tp",), owned=("tp",))),
    "folded": (
        (1, 2),
        ("ep", "tp"),
        Roles(("ep", "tp"), tokens=("ep",), exchange=("ep", "tp"), lanes=("tp",)),
    ),
    # "tp major" on a mesh that has ep first: the group's ranks and the coordinates disagree
    "reordered": ((2, 2), ("ep", "tp"), Roles(("tp", "ep"), ("ep",), exchange=("tp", "ep"), lanes=("tp",))),
}


def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.config.capture_scalar_outputs = True


def _graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _layer_on_rank(shape, names, roles, backend):
    _fresh()
    ctx = pool.context(shape, names, (roles.expert, roles.exchange, roles.owned, roles.lanes))
    size = ctx.size(roles.expert)
    compiled = torch.compile(local, fullgraph=True, dynamic=True, backend=backend)
    graphs = []
    for step in range(4):
        torch.manual_seed(step * 100 + ctx.coordinate(roles.tokens))
        tokens = 5 + 3 * step
        ids = torch.randint(0, E, (tokens, K))
        if step == 2:
            ids[:] = 3  # one expert gets everything, the others and most ranks nothing
        shapes = (tokens, H), (tokens, K), (E // size, F, H), (E // size, F), (E // size, F, H)
        operands = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        results = []
        for fn in (local, compiled):
            x, *rest = leaves = [t.clone().requires_grad_() for t in operands]
            with context.use(ctx):
                out = fn(x, ids, *rest, roles)
            out.square().sum().backward()
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-12, atol=1e-12)
        graphs.append(_graphs())
    return graphs


@pytest.mark.parametrize(
    "layout",
    [
        "folded",
        *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("exchange", "owned", "reordered")),
    ],
)
def test_new_counts_do_not_recompile(ranks, layout):
    shape, names, roles = LAYOUTS[layout]
    world = torch.Size(shape).numel()
    assert ranks(world).run(_layer_on_rank, shape, names, roles, "aot_eager") == [[1, 1, 1, 1]] * world


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["exchange", "owned"])
def test_inductor(ranks, layout):
    shape, names, roles = LAYOUTS[layout]
    assert ranks(2).run(_layer_on_rank, shape, names, roles, "inductor", timeout=600) == [[1, 1, 1, 1]] * 2


def _everything(x, ids, table, seed):
    """Every conversion, both vocabulary ops and dropout, over both orders of two axes."""
    tokens = x.shape[0]
    h = x + convert.all_reduce(vocab.vocab_parallel_embedding(table, ids, ("a", "b"), 1), ("a", "b"))
    h = convert.shard(h, ("b",), 0, source="I")
    h = random.dropout(h, 0.25, seed, 2, (((tokens // 2, ("b",)),), ((8, ()),)))
    h = convert.all_gather(h, ("b",), 0, to="R")
    h = convert.reduce_scatter(h, ("b",), 1, 2)
    h = convert.all_gather(h, ("b",), 1, 2, to="I")
    h = convert.shard(convert.sum_gradient(h, ("b", "a")), ("b", "a"), 1)
    h = convert.reduce_scatter(convert.partial(convert.all_gather(h, ("b", "a"), 1), ("a",)), ("a",), 1)
    return vocab.vocab_parallel_cross_entropy(
        convert.sum_gradient(h @ table.mT[: h.shape[1]], ("b",)), ids, ("b", "a")
    )


def _everything_on_rank(shape):
    _fresh()
    ctx = pool.context(shape, ("a", "b"), (("a", "b"), ("b", "a")))
    compiled = torch.compile(_everything, fullgraph=True, dynamic=True, backend="aot_eager")
    for step, tokens in enumerate((4, 6, 10)):
        torch.manual_seed(step)
        ids = torch.randint(0, 12, (tokens,))
        results = []
        for fn in (_everything, compiled):
            torch.manual_seed(step)
            x = torch.randn(tokens, 8, dtype=torch.float64, requires_grad=True)
            table = torch.randn(12 // ctx.size(("a", "b")), 8, dtype=torch.float64, requires_grad=True)
            with context.use(ctx):
                out = fn(x, ids, table, torch.tensor(step))
            out.sum().backward()
            results.append([out.detach(), x.grad, table.grad])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-12, atol=1e-12)
    return _graphs()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 2), pytest.param((2, 2), marks=pytest.mark.slow)])
def test_conversions_vocabulary_and_dropout_trace_whole(ranks, shape):
    world = torch.Size(shape).numel()
    assert ranks(world).run(_everything_on_rank, shape) == [1] * world


@pytest.mark.slow
def test_inductor_draws_what_eager_draws():
    _fresh()
    factors = (((64, ()),), ((33, ()),))

    def draw(seed):
        return random.draw("uniform", (0.0, 1.0), seed, 7, factors, torch.float64)

    compiled = torch.compile(draw, fullgraph=True)
    for seed in (0, 1, -(2**63), 2**63 - 1, 123456789):
        assert torch.equal(compiled(torch.tensor(seed)), draw(torch.tensor(seed)))
    assert _graphs() == 1


def _sums(x, y, z):
    a, b, c = all_reduce_batched([x * 2, y.sum(0), z], ("t",))
    n, m = all_reduce_batched([(x > 0).long(), (y > 0).long().sum(0)], ("t",))  # nothing to differentiate
    p, q = cumsum_batched([x > 0, (y > 0).long()], ("t",), [0, 1], [1, 1], torch.int64)
    return (a * b * n * p).sum() + c * m.sum() + (y * q).sum()


def _batched_on_rank():
    _fresh()
    ctx = pool.context((2,), ("t",))
    x, y, z = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in [(3,), (4, 3), ()])
    compiled = torch.compile(_sums, fullgraph=True, backend="aot_eager")
    results = []
    for fn in (_sums, compiled):
        with context.use(ctx):
            out = fn(x, y, z)
        results.append([out.detach(), *torch.autograd.grad(out, [x, y, z])])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_batched_sums(ranks):
    ranks(2).run(_batched_on_rank)
