"""The MoE's local form on ranks against the single-device form: values and the gradient of every operand."""

import pytest
import torch

from tedfx.ops import context, moe
from tests import pool
from tests.ops.layers import E, F, H, K, Roles, local, whole

# name -> (world, mesh shape, names, roles)
LAYOUTS = {
    "ep2": (2, (2,), ("ep",), Roles(("ep",), tokens=("ep",), exchange=("ep",))),
    "ep4": (4, (4,), ("ep",), Roles(("ep",), tokens=("ep",), exchange=("ep",))),
    "owned tp2": (2, (2,), ("tp",), Roles(("tp",), owned=("tp",))),
    "owned tp2 x tp2": (4, (2, 2), ("a", "b"), Roles(("b", "a"), owned=("b", "a"))),
    "ep2, lanes of tp2": (
        4,
        (2, 2),
        ("ep", "tp"),
        Roles(("ep",), tokens=("ep",), exchange=("ep",), lanes=("tp",)),
    ),
    "folded ep2 x tp2": (
        4,
        (2, 2),
        ("ep", "tp"),
        Roles(("ep", "tp"), tokens=("ep",), exchange=("ep", "tp"), lanes=("tp",)),
    ),
    "folded, tp major": (
        4,
        (2, 2),
        ("ep", "tp"),
        Roles(("tp", "ep"), tokens=("ep",), exchange=("tp", "ep"), lanes=("tp",)),
    ),
    "owned tp2 in ep2": (
        4,
        (2, 2),
        ("ep", "tp"),
        Roles(("ep", "tp"), tokens=("ep",), exchange=("ep",), owned=("tp",)),
    ),
    "owned tp2 around ep2": (
        4,
        (2, 2),
        ("ep", "tp"),
        Roles(("tp", "ep"), tokens=("ep",), exchange=("ep",), owned=("tp",)),
    ),
}

# routing -> (tokens of each of up to four token shards, the experts that exist to the router)
ROUTINGS = {
    "even": ((6, 6, 6, 6), range(E)),
    "uneven, empty experts": ((5, 9, 3, 1), (1, 6)),
    "a rank without tokens": ((7, 0, 2, 0), range(E)),
    "all to one expert": ((4, 5, 6, 7), (5,)),
    "no tokens at all": ((0, 0, 0, 0), range(E)),
}


def _problem(routing, shards):
    """The global operands, and each token shard's run of tokens."""
    sizes, experts = ROUTINGS[routing]
    generator = torch.Generator().manual_seed(5)
    sizes = sizes[:shards]
    tokens = sum(sizes)
    double = {"dtype": torch.float64, "generator": generator}
    ids = torch.tensor(experts)[torch.randint(len(experts), (tokens, K), generator=generator)]
    x, weights = torch.randn(tokens, H, **double), torch.rand(tokens, K, **double)
    params = torch.randn(E, F, H, **double), torch.randn(E, F, **double), torch.randn(E, F, H, **double)
    stops = [sum(sizes[: i + 1]) for i in range(shards)]
    return (
        x,
        ids,
        weights,
        params,
        torch.randn(tokens, H, **double),
        [slice(a - n, a) for a, n in zip(stops, sizes)],
    )


def _leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def _on_rank(shape, names, roles):
    ctx = pool.context(shape, names, (roles.expert, roles.tokens, roles.exchange, roles.owned, roles.lanes))
    for routing in ROUTINGS:
        x, ids, weights, params, cotangent, runs = _problem(routing, ctx.size(roles.tokens))
        reference = _leaves(x, weights, *params)
        expected = whole(reference[0], ids, *reference[1:])
        expected.backward(cotangent)

        run = runs[ctx.coordinate(roles.tokens)]
        place, size = ctx.coordinate(roles.expert), ctx.size(roles.expert)
        mine = _leaves(x[run], weights[run], *(p.chunk(size)[place] for p in params))
        with context.use(ctx):
            out = local(mine[0], ids[run], *mine[1:], roles)
        out.backward(cotangent[run])

        wanted = [expected[run], reference[0].grad[run], reference[1].grad[run]]
        wanted += [p.grad.chunk(size)[place] for p in reference[2:]]
        got = [out, *(leaf.grad for leaf in mine)]
        for name, a, b in zip(("out", "x", "weights", "up", "bias", "down"), got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m: f"{routing}, {name}: {m}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_local_layer_is_the_single_device_layer(ranks, layout):
    world, shape, names, roles = LAYOUTS[layout]
    ranks(world).run(_on_rank, shape, names, roles)


def _bitwise_on_rank():
    ctx = pool.context((2,), ("ep",))
    x, ids, weights, params, cotangent, runs = _problem("uneven, empty experts", 2)
    results = []
    for _ in range(3):
        run = runs[ctx.coordinates["ep"]]
        mine = _leaves(x[run], weights[run], *(p.chunk(2)[ctx.coordinates["ep"]] for p in params))
        with context.use(ctx):
            out = local(mine[0], ids[run], *mine[1:], LAYOUTS["ep2"][3])
        out.backward(cotangent[run])
        results.append([out, *(leaf.grad for leaf in mine)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bitwise_the_same_every_time(ranks):
    ranks(2).run(_bitwise_on_rank)


def _lanes_on_rank():
    ctx = pool.context((2, 2), ("ep", "tp"), (("ep", "tp"),))
    with context.use(ctx):
        for tokens in (0, 1, 3, 8, 11):
            ids = torch.arange(tokens * K).view(tokens, K) % E
            order, counts = moe.route(ids, E, lanes=("ep", "tp"))
            mine = [n for n in range(tokens) if n * 4 // tokens == ctx.coordinate(("ep", "tp"))]
            assert sorted(order.tolist()) == [n * K + k for n in mine for k in range(K)]
            assert ids.flatten()[order].tolist() == sorted(ids[mine].flatten().tolist())
            assert counts.tolist() == torch.bincount(ids[mine].flatten(), minlength=E).tolist()
            owned, kept = moe.route(ids, E, owned=("tp",), lanes=("ep",))
            assert all(ids.flatten()[m] // 4 == ctx.coordinates["tp"] for m in owned.tolist())
            assert moe.local_counts(kept, ("tp",)).sum() == len(owned)


def test_lanes_are_the_documented_tokens(ranks):
    ranks(4).run(_lanes_on_rank)


def _counts_on_rank():
    ctx = pool.context((2,), ("ep",))
    me = ctx.coordinates["ep"]
    with context.use(ctx), context.count_collectives() as log:
        counts = torch.tensor([[1, 0, 2, 3], [4, 5, 0, 0]])
        send, recv, recv_counts, mine = moe.exchange_counts(counts[me], ("ep",))
        assert send == [[1, 5], [9, 0]][me] and recv == [[1, 9], [5, 0]][me]
        assert recv_counts.tolist() == [[[1, 0], [4, 5]], [[2, 3], [0, 0]]][me]
        assert mine.tolist() == [[5, 5], [2, 3]][me]
        assert (
            moe.expert_major(recv_counts, recv).tolist()
            == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 4]][me]
        )
        assert [c.op for c in log] == ["all_gather"]
        send, recv, recv_counts, mine = moe.exchange_counts(
            torch.tensor([1, 2, 4, 8, 16]) * (me + 1), ("ep",)
        )
        assert send == [[7, 24], [14, 48]][me] and recv == [[7, 14], [24, 48]][me]  # three experts, and two
        assert mine.tolist() == [[3, 6, 12], [24, 48]][me] and recv_counts.shape == (2, [3, 2][me])
        assert moe.local_counts(torch.arange(5), ("ep",)).tolist() == [[0, 1, 2], [3, 4]][me]
        ids = torch.tensor([[4, 0], [2, 3], [5, 1]])  # 5 is no expert's
        order, counts = moe.route(ids, 5, owned=("ep",))
        assert (
            order.tolist() == [[1, 5, 2], [3, 0]][me]
            and counts.tolist()[:5] == [[1, 1, 1, 0, 0], [0, 0, 0, 1, 1]][me]
        )
        with pytest.raises(ValueError, match="send_splits do not sum"):
            moe.all_to_all_single(torch.ones(3, 2), [1, 1], [1, 1], ("ep",))
        with pytest.raises(ValueError, match="5 experts do not divide into 2 runs"):
            moe.route(torch.zeros(2, 1, dtype=torch.int64), 5, owned=("ep",), owned_outer=2)
    return moe.expert_major(torch.tensor([[1, 2], [2, 1]]), [3, 3]).tolist()


def test_counts_and_expert_major_by_hand(ranks):
    # received: source 0 (e0, e1, e1), source 1 (e0, e0, e1)
    assert ranks(2).run(_counts_on_rank)[0] == [0, 3, 4, 1, 2, 5]
