"""Tensor-parallel experts fed by slices of the tokens, on ranks, against the layer on one device: values and
every gradient."""

import pytest
import torch

from tedfx.ops import context, convert, lanes, moe
from tests import pool
from tests.ops.layers import E, F, H, K, _body, whole

# name -> (mesh shape, names, axes that split the experts, lanes)
LAYOUTS = {
    "ep2 x tp2": ((2, 2), ("ep", "tp"), ("ep",), ("tp",)),
    "tp2 x ep2": ((2, 2), ("tp", "ep"), ("ep",), ("tp",)),
    "tp4": ((1, 4), ("ep", "tp"), ("ep",), ("tp",)),
    "ep2 x two tensor axes": ((2, 1, 2), ("ep", "a", "b"), ("ep",), ("a", "b")),
}
# routing -> (tokens of each of four slices, the experts that exist to the router)
ROUTINGS = {
    "even": ((6, 6, 6, 6), range(E)),
    "uneven, empty experts": ((5, 9, 3, 1), (1, 6)),
    "slices without tokens": ((7, 0, 0, 2), range(E)),
    "all to one expert": ((4, 5, 6, 7), (5,)),
    "no tokens at all": ((0, 0, 0, 0), range(E)),
}


def _problem(routing):
    sizes, experts = ROUTINGS[routing]
    generator = torch.Generator().manual_seed(5)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
    ids = torch.tensor(experts)[torch.randint(len(experts), (sum(sizes), K), generator=generator)]
    x, weights, cotangent = make(sum(sizes), H), make(sum(sizes), K), make(sum(sizes), H)
    return (
        sizes,
        ids,
        cotangent,
        dict(x=x, weights=weights, up=make(E, F, H), bias=make(E, F), down=make(E, F, H)),
    )


def _layer(x, ids, weights, up, bias, down, split, lane):
    order, counts = moe.route(ids, E)
    send, recv, totals, received, counts = lanes.exchange_lanes(counts, (*lane, *split), split)
    rows = moe.all_to_all_single(moe.permute_rows(x, order, K), recv, send, split)
    index = lanes.lane_index(received, totals)
    rows = lanes.pick_rows(lanes.gather_lanes(rows, lane, totals), index)
    assert rows.shape[0] == int(counts.sum())
    rows = lanes.scatter_lanes(
        lanes.spread_lanes(_body(rows, counts, up, bias, down), index, totals), lane, totals
    )
    return moe.combine(moe.all_to_all_single(rows, send, recv, split), order, weights)


def _piece(x, dim, index, size):
    return x.chunk(size, dim)[index]


def _on_rank(routing, shape, names, split, lane):
    ctx = pool.context(shape, names, ((*lane, *split), lane))
    sizes, ids, cotangent, given = _problem(routing)
    slice_ = ctx.coordinate((*split, *lane))  # tokens: expert axes major
    start = sum(sizes[:slice_])
    take = lambda t: t[start : start + sizes[slice_]].clone()
    e, t = ctx.coordinate(split), ctx.coordinate(lane)
    mine = {
        name: take(given[name])
        if name in ("x", "weights")
        else _piece(_piece(given[name], 0, e, ctx.size(split)), 1, t, ctx.size(lane)).clone()
        for name in given
    }
    for value in mine.values():
        value.requires_grad_()
    with context.use(ctx), context.count_collectives() as log:
        out = _layer(
            mine["x"], take(ids), mine["weights"], mine["up"], mine["bias"], mine["down"], split, lane
        )
    with context.count_collectives() as back:
        out.backward(take(cotangent))
    return (
        slice_,
        (e, t),
        out.detach(),
        {n: v.grad for n, v in mine.items()},
        [c.op for c in log],
        [c.op for c in back],
    )


def _same_weights(pieces, wanted):
    """pieces[e, t]: gradients of the experts' parts that coordinates e and t hold."""
    for name in ("up", "bias", "down"):
        grid = [
            [pieces[e, t][name] for t in range(1 + max(t for _, t in pieces))]
            for e in range(1 + max(e for e, _ in pieces))
        ]
        torch.testing.assert_close(torch.cat([torch.cat(row, 1) for row in grid]), wanted[name].grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_lanes_compute_what_one_device_does(ranks, layout, routing):
    shape, names, split, lane = LAYOUTS[layout]
    _, ids, cotangent, given = _problem(routing)
    wanted = {name: value.requires_grad_() for name, value in given.items()}
    expected = whole(wanted["x"], ids, wanted["weights"], wanted["up"], wanted["bias"], wanted["down"])
    expected.backward(cotangent)
    answers = sorted(ranks(4).run(_on_rank, routing, shape, names, split, lane), key=lambda a: a[0])
    torch.testing.assert_close(torch.cat([a[2] for a in answers]), expected.detach())
    for name in ("x", "weights"):
        torch.testing.assert_close(torch.cat([a[3][name] for a in answers]), wanted[name].grad)
    pieces = {a[1]: a[3] for a in answers}
    _same_weights(pieces, wanted)
    forward, backward = answers[0][4], answers[0][5]
    travels = ["all_to_all"] * (len({e for e, _ in pieces}) > 1)
    assert forward == [
        "all_gather",
        *travels,
        "all_gather",
        "reduce_scatter",
        *travels,
    ]  # the exchange of counts first
    assert backward == [*travels, "all_gather", "reduce_scatter", *travels]


def _striped_layer(x, ids, weights, up, bias, down, split, lane):
    """DeepSpeed-TED's order: all ranks of a lane group hold all its tokens; rows are sliced after the
    dispatch, gathered before the combine."""
    order, counts = moe.route(ids, E, stripes=lane)
    rows = convert.shard(moe.permute_rows(x, order, K), lane, 0, 1, "I")
    send, recv, totals, received, counts = lanes.exchange_lanes(counts, (*lane, *split), split)
    rows = moe.all_to_all_single(rows, recv, send, split)
    index = lanes.lane_index(received, totals)
    rows = lanes.pick_rows(lanes.gather_lanes(rows, lane, totals, "I"), index)
    rows = convert.all_reduce(_body(convert.sum_gradient(rows, lane), counts, up, bias, down), lane)
    rows = lanes.scatter_lanes(lanes.spread_lanes(rows, index, totals), lane, totals, "I")
    rows = convert.all_gather(moe.all_to_all_single(rows, send, recv, split), lane, 0, 1, "I", order.shape[0])
    return moe.combine(rows, order, weights)


def _striped_on_rank(routing, shape, names, split, lane):
    ctx = pool.context(shape, names, ((*lane, *split), lane))
    sizes, ids, cotangent, given = _problem(routing)
    e, t, groups = ctx.coordinate(split), ctx.coordinate(lane), ctx.size(split)
    starts = [sum(sizes[: i * 4 // groups]) for i in range(groups + 1)]
    take = lambda x: x[starts[e] : starts[e + 1]].clone()
    mine = {
        name: take(given[name]) if name in ("x", "weights") else _piece(given[name], 0, e, groups).clone()
        for name in given
    }
    for name in ("up", "bias", "down"):
        mine[name] = _piece(mine[name], 1, t, ctx.size(lane)).clone()
    for value in mine.values():
        value.requires_grad_()
    with context.use(ctx), context.count_collectives() as log:
        # The bias of the first product is cut with its features: nothing is partial before the second.
        out = _striped_layer(
            mine["x"], take(ids), mine["weights"], mine["up"], mine["bias"], mine["down"], split, lane
        )
    with context.count_collectives() as back:
        out.backward(take(cotangent))
    return e, t, out.detach(), {n: v.grad for n, v in mine.items()}, [c.op for c in log], [c.op for c in back]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_rows_sliced_after_the_dispatch_compute_what_one_device_does(ranks, layout, routing):
    shape, names, split, lane = LAYOUTS[layout]
    _, ids, cotangent, given = _problem(routing)
    wanted = {name: value.requires_grad_() for name, value in given.items()}
    expected = whole(wanted["x"], ids, wanted["weights"], wanted["up"], wanted["bias"], wanted["down"])
    expected.backward(cotangent)
    answers = sorted(ranks(4).run(_striped_on_rank, routing, shape, names, split, lane), key=lambda a: a[:2])
    for t in range(1 + max(a[1] for a in answers)):  # replicas on the lanes
        same = [a for a in answers if a[1] == t]
        torch.testing.assert_close(torch.cat([a[2] for a in same]), expected.detach())
        for name in ("x", "weights"):
            torch.testing.assert_close(torch.cat([a[3][name] for a in same]), wanted[name].grad)
    pieces = {a[:2]: a[3] for a in answers}
    _same_weights(pieces, wanted)
    travels = ["all_to_all"] * (len({e for e, _ in pieces}) > 1)
    assert answers[0][4] == [
        "all_gather",
        *travels,
        "all_gather",
        "all_reduce",
        *travels,
        "all_gather",
    ]  # the exchange of counts first
    assert answers[0][5] == [*travels, "all_gather", "all_reduce", *travels, "all_gather"]


def _sources_on_rank():
    ctx = pool.context((2,), ("t",))
    index = ctx.coordinates["t"]
    totals = [3, 1]
    rows = torch.arange(12.0).view(6, 2).requires_grad_()
    for source in ("P", "R", "I"):
        rows.grad = None
        with context.use(ctx):
            out = lanes.scatter_lanes(rows, ("t",), totals, source)
        assert torch.equal(out, rows.view(2, 3, 2)[index, : totals[index]] * (2 if source == "P" else 1))
        out.backward(torch.full_like(out, 1.0 + index))
        whole_ = torch.zeros(2, 3, 2)
        whole_[0, :3], whole_[1, :1] = 1.0, 2.0
        if source == "R":  # a partial cotangent: this lane's part
            whole_[1 - index] = 0
        assert torch.equal(rows.grad.view(2, 3, 2), whole_)
    with context.use(ctx), pytest.raises(ValueError, match="source must be"):
        lanes.scatter_lanes(rows, ("t",), totals, "S")
    with context.use(ctx), pytest.raises(ValueError, match="to must be"):
        lanes.gather_lanes(rows, ("t",), totals, "S")


def test_sources(ranks):
    ranks(2).run(_sources_on_rank)
