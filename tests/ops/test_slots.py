"""Rows in slots: the layer with a capacity in equal splits, against plain torch with dropped assignments
weighed by zero."""

import pytest
import torch

from tedfx import ops
from tedfx.ops import context, convert
from tests import pool
from tests.ops.layers import E, F, H, K, plain

TOKENS, SLOTS = 7, 3
# name -> (world, mesh shape, names, axes of the experts, lanes, lanes whose rows are gathered)
LAYOUTS = {
    "ep2": (2, (2,), ("ep",), ("ep",), (), ()),
    "ep2, lanes of tp2": (4, (2, 2), ("ep", "tp"), ("ep",), ("tp",), ("tp",)),
    "folded": (4, (2, 2), ("ep", "tp"), ("ep", "tp"), ("tp",), ()),
    "folded, tp major": (4, (2, 2), ("ep", "tp"), ("tp", "ep"), ("tp",), ()),
}


def problem(shard, routing, slots):
    """One token shard's operands; as many assignments of an expert are kept as it has slots."""
    generator = torch.Generator().manual_seed(shard)
    experts = {"even": range(E), "two of them": (1, 6), "one": (5,)}[routing]
    ids = torch.tensor(experts)[torch.randint(len(experts), (TOKENS, K), generator=generator)]
    hit = torch.nn.functional.one_hot(ids.flatten(), E)
    keep = (((hit.cumsum(0) - 1) * hit).sum(1) < slots).view(TOKENS, K)
    double = {"dtype": torch.float64, "generator": generator}
    return (
        torch.randn(TOKENS, H, **double),
        ids,
        keep,
        torch.rand(TOKENS, K, **double),
        torch.randn(TOKENS, H, **double),
    )


def parameters():
    double = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(9)}
    return torch.randn(E, F, H, **double), torch.randn(E, F, **double), torch.randn(E, F, H, **double)


def body(rows, up, bias, down):
    return ops.slot_linear(torch.relu(ops.slot_linear(rows, up) + ops.slot_rows(bias, rows)), down, True)


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("routing, slots", [("even", SLOTS), ("two of them", SLOTS), ("one", 1), ("even", 0)])
def test_on_one_device(routing, slots):
    x, ids, keep, weights, cotangent = problem(0, routing, slots)
    results = []
    for slotted in (True, False):
        mine = leaves(x, weights, *parameters())
        if slotted:
            order = ops.route_slots(torch.where(keep, ids, E), E, slots)
            assert order.shape == (E * slots,) and (order < TOKENS * K).sum() == keep.sum()
            rows = ops.fill_slots(mine[0], order, K)
            kept = order[order < TOKENS * K]  # an empty slot has a token that has a slot, if any has
            assert (rows[order == TOKENS * K] == (x[kept.min() // K] if len(kept) else 0)).all()
            out = ops.combine_slots(body(rows, *mine[2:]), order, mine[1] * keep)
        else:
            out = plain(mine[0], ids, mine[1] * keep, *mine[2:])
        out.backward(cotangent)
        results.append([out, *(t.grad for t in mine)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_more_tokens_than_slots():
    with pytest.raises(RuntimeError, match="more tokens than slots"):
        ops.route_slots(torch.zeros(4, 1, dtype=torch.int64), 2, 3)
    with pytest.raises(ValueError, match="3 experts do not divide"):
        with context.use(_Two()):
            ops.route_slots(torch.zeros(4, 1, dtype=torch.int64), 3, 4, ("tp",))


class _Two:
    def span(self, axes):
        return context.Span(axes, 2, 0, "", None)


def on_rank(shape, names, split, lanes, gathered):
    ctx = pool.context(shape, names, (split, lanes))
    shards = ctx.size(("ep",))
    for routing in ("even", "two of them", "one"):
        problems = [problem(i, routing, SLOTS) for i in range(shards)]
        x, ids, keep, weights, cotangent = (torch.cat(each) for each in zip(*problems))
        reference = leaves(x, weights, *parameters())
        expected = plain(reference[0], ids, reference[1] * keep, *reference[2:])
        expected.backward(cotangent)

        run = slice(ctx.coordinate(("ep",)) * TOKENS, (ctx.coordinate(("ep",)) + 1) * TOKENS)
        place, size = ctx.coordinate(split), ctx.size(split)
        inner = [p.chunk(size)[place] for p in parameters()]
        if gathered:  # the experts' own features over the lanes
            inner = [p.chunk(ctx.size(gathered), 1)[ctx.coordinate(gathered)].contiguous() for p in inner]
        mine, local = leaves(x[run], weights[run], *inner), E // size
        with context.use(ctx), context.count_events() as events, context.count_collectives() as log:
            tokens, scale = convert.sum_gradient(mine[0], lanes), convert.sum_gradient(mine[1], lanes)
            order = ops.route_slots(torch.where(keep[run], ids[run], E), E, SLOTS, lanes=lanes)
            rows = ops.send_slots(ops.fill_slots(tokens, order, K), split, local)
            rows = body(ops.gather_slots(rows, gathered, local) if gathered else rows, *mine[2:])
            rows = ops.return_slots(
                ops.scatter_slots(rows, gathered, local) if gathered else rows, split, local
            )
            out = convert.all_reduce(ops.combine_slots(rows, order, scale * keep[run]), lanes)
        out.backward(cotangent[run])
        assert [e.what for e in events] == ["route"] and not any(c.ragged for c in log)
        torch.testing.assert_close(out, expected[run], rtol=1e-12, atol=1e-12)
        wanted = [reference[0].grad[run], reference[1].grad[run]]
        for p in reference[2:]:
            grad = p.grad.chunk(size)[place]
            wanted.append(grad.chunk(ctx.size(gathered), 1)[ctx.coordinate(gathered)] if gathered else grad)
        for a, b in zip(mine, wanted, strict=True):
            torch.testing.assert_close(a.grad, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_ranks(layout, ranks):
    world, *rest = LAYOUTS[layout]
    ranks(world).run(on_rank, *rest)
