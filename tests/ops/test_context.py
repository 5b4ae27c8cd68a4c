"""The run-time context: coordinates, groups over several axes, and the log of collectives."""

import pytest
import torch
import torch.distributed as dist

from tedfx.ops import context, convert
from tests import pool

SHAPE, NAMES = (2, 1, 2), ("a", "one", "b")
AXES = [(), ("a",), ("b",), ("one",), ("a", "b"), ("b", "a"), ("b", "one", "a")]


def _places():
    ctx = pool.context(SHAPE, NAMES, tuple(AXES))
    out = {}
    for axes in AXES:
        span = ctx.span(axes)
        group = ctx.group(axes) if span.size > 1 else None
        ranks = dist.get_process_group_ranks(group) if group else [dist.get_rank()]
        order = span.order or tuple(range(span.size))
        # the group's rank that holds my coordinate is me
        assert ranks[order[span.index]] == dist.get_rank()
        out[axes] = (span.size, span.index, ctx.size(axes), ctx.coordinate(axes))
    return out


def test_coordinates_are_flattened_major_first(ranks):
    for rank, out in enumerate(ranks(4).run(_places)):
        a, b = divmod(rank, 2)
        expected = {(): (1, 0), ("a",): (2, a), ("b",): (2, b), ("one",): (1, 0), ("a", "b"): (4, 2 * a + b)}
        expected[("b", "a")] = expected[("b", "one", "a")] = (4, 2 * b + a)
        for axes, (size, index) in expected.items():
            assert out[axes] == (size, index, size, index)


def _groups():
    ctx = pool.context((2, 2, 2), ("a", "b", "c"), (("a", "c"), ("c", "a")))
    assert ctx.group(("a", "c")) is ctx.group(("c", "a"))  # one communicator, two orders
    with pytest.raises(KeyError, match=r"ensure_groups\(\[\('b', 'c'\)\]\)"):
        ctx.span(("b", "c"))
    with pytest.raises(ValueError, match="does not exist"):
        ctx.group(())
    return sorted(dist.get_process_group_ranks(ctx.group(("a", "c"))))


def test_subgroups_of_two_of_three_axes(ranks):
    found = ranks(8).run(_groups)
    assert found == [[0, 1, 4, 5], [0, 1, 4, 5], [2, 3, 6, 7], [2, 3, 6, 7]] * 2


def _log():
    ctx = pool.context((2, 2), ("a", "b"), (("a", "b"),))
    x = torch.ones(4, 2, dtype=torch.float64, requires_grad=True)
    with context.use(ctx), context.count_collectives() as log:
        y = convert.all_gather(convert.sum_gradient(x, ("a",)), ("a", "b"), 0)
        convert.all_reduce(y, ("b",)).sum().backward()
    convert_outside = len(log)
    with context.use(ctx):
        convert.all_reduce(x, ("a",))
    assert len(log) == convert_outside
    return [(c.op, c.axes, c.phase, c.bytes) for c in log], context.totals(log)


def test_log_names_every_collective(ranks):
    log, totals = ranks(4).run(_log)[0]
    assert log == [
        ("all_gather", ("a", "b"), "forward", 64),
        ("all_reduce", ("b",), "forward", 256),
        ("reduce_scatter", ("a", "b"), "backward", 256),
        ("all_reduce", ("a",), "backward", 64),
    ]
    assert totals["all_reduce", ("b",)] == (1, 256)


def test_no_context_is_one_clear_line():
    with pytest.raises(RuntimeError, match="no tedfx run-time context is active"):
        context.current()
    assert context.span(()).size == 1
