"""Small sums, and small prefix sums, that do not wait for each other go together; large ones, and those with
gradients, stay alone."""

import operator

import pytest
import torch

from tedfx.analysis.cost import Cost
from tedfx.compiler import compile_graph
from tedfx.errors import TypeCheckError
from tedfx.passes.check_types import check_types
from tedfx.placement.roles import MeshShape, Roles
from tedfx.placement.types import I
from tedfx.stages.graphs import GlobalGraph
from tedfx.trace.export import trace
from tests.marks import slow
from tests.models_capacity import CAPACITY
from tests.passes import models as m
from tests.passes.helpers import count, default_passes, find, parity
from tests.passes.test_collective_algebra import H, compiled, sums


def test_sums_that_do_not_wait_for_each_other():
    """Three small sums over the batch: the third needs the first, so two go together."""

    def fn(s, x):
        first, second = (x * s.w).square().mean(), x.sin().mul(s.w).mean()
        third = ((x - first) * s.w).square().mean()
        return first + second * 2 + third

    model = m.Fn(fn, w=(H,))
    program, found = compiled(model, "dp=2", ("batch",))
    assert sums(found, axes=("dp",)) == (2, 3 * 8) and count(program, "all_reduce_batched") == {
        "all_reduce_batched": 1
    }
    assert sums(compiled(model, "dp=2", ())[1], axes=("dp",)) == (3, 3 * 8)
    parity(model, "dp=2", m.inputs())


def test_leaves_large_sums_and_other_axes_alone():
    large = m.Fn(lambda s, x: (x * s.w).sum(0).square().sum() + (x.sin() * s.w).sum(0).square().sum(), w=(H,))
    program, _ = compiled(large, "dp=2", ("batch",))  # their size is the sequence's
    assert count(program, "all_reduce", "all_reduce_batched") == {"all_reduce": 2, "all_reduce_batched": 0}


def gathers(found):
    return found.get(("forward", "all_gather_into_tensor", ("dp",)), (0, 0))


def test_prefix_sums_that_do_not_wait_for_each_other():
    """Three queues over the tokens of the batch: the third needs the first, so two go together. What is small
    is their totals."""

    def fn(s, x):
        flat = (x * s.w).reshape(-1, H)
        first, second = (flat > 0).cumsum(0), (flat.sin() < 0.5).cumsum(0)
        third = (first > 2).cumsum(0)
        return (flat * (first + second * 2 + third * 3)).square().mean()

    model = m.Fn(fn, w=(H,))
    program, found = compiled(model, "dp=2", ("batch",))
    assert gathers(found) == (2, 3 * H * 8) and count(program, "cumsum", "cumsum_batched") == {
        "cumsum": 1,
        "cumsum_batched": 1,
    }
    assert gathers(compiled(model, "dp=2", ())[1]) == (3, 3 * H * 8)
    parity(model, "dp=2", m.inputs())

    item = next(
        n
        for n in program.graph_module.graph.nodes
        if n.target is operator.getitem and n.args[0] in find(program, "cumsum_batched")
    )
    check_types(program)
    item.meta["type"] = dict(item.meta["type"], dp=I)  # the check sees through the batched op
    with pytest.raises(TypeCheckError, match=item.name):
        check_types(program)


@pytest.mark.parametrize(
    "fn, batched",
    [
        (lambda x: (x.reshape(-1, H) > 0).cumsum(0) + (x.reshape(-1, H) < 0.5).cumsum(0), 1),
        slow(
            lambda x: (x.sum(1) > 0).t().reshape(-1).cumsum(0) + (x.sum(1) < 0.5).t().reshape(-1).cumsum(-1),
            1,
        ),  # (H, batch): H runs
        (lambda x: (x > 0).cumsum(0) + (x < 0.5).cumsum(0), 0),  # totals of the sequence's size
        slow(
            lambda x: (
                (x.reshape(-1, H) > 0).cumsum(0) + (x.reshape(-1, H) < 0.5).cumsum(0, dtype=torch.int32)
            ),
            0,
        ),
        (lambda x: x.reshape(-1, H).cumsum(0) + x.sin().reshape(-1, H).cumsum(0), 0),  # with gradients
    ],
    ids=["bits", "runs", "large", "dtypes", "gradients"],
)
def test_prefix_sums_that_are_small_and_of_one_integer_dtype(fn, batched):
    model = m.Fn(lambda s, x: fn(x * s.w).to(x.dtype).square().mean() * (x * s.w).square().mean(), w=(H,))
    program, found = compiled(model, "dp=2", ("batch",))
    assert count(program, "cumsum", "cumsum_batched") == {
        "cumsum": 2 - 2 * batched,
        "cumsum_batched": batched,
    }
    assert gathers(found) == (1, 2 * H * 8) if batched else gathers(found)[0] == 2
    parity(model, "dp=2", m.inputs())


@pytest.mark.slow
def test_the_queues_of_a_layer_that_chooses_two_experts():
    """GShard numbers first and second choices by themselves: one gather per layer, of the totals of both."""
    traced = trace(CAPACITY["capacity_gshard"](layers=2))
    program = compile_graph(
        GlobalGraph.of(traced, Roles.resolve(MeshShape.of("dp=2,ep=2"), None), set(traced.parameters)),
        default_passes(),
    )
    batched = find(program, "cumsum_batched")
    assert [len(n.args[0]) for n in batched] == [2, 2] and not find(program, "cumsum")
    experts = [i.elements for i in Cost(program).items if i.node == batched[0].name]
    assert experts == [2 * 4]
