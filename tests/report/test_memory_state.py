"""`benchmarks/memory.py state` at small sizes: what is measured is what the formulas say, a tiled spike does
not grow with the experts, and fake tensors count as real ones do."""

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest

from tedfx.compiler import compile_graph
from tedfx.options import Options
from tedfx.placement.roles import MeshShape, Roles
from tedfx.report.explanation import explain
from tedfx.stages.graphs import GlobalGraph
from tests.marks import slow, slow_but

_BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def state():
    sys.path.insert(0, _BENCHMARKS)
    try:
        yield importlib.import_module("memory_state")
    finally:
        sys.path.remove(_BENCHMARKS)


@pytest.fixture(scope="module")
def gpt(state):
    """(experts, hidden) -> two layers, the second one's MLP with experts."""
    return lambda experts=0, hidden=64: state.Shape(
        "gpt", hidden=hidden, layers=2, heads=4, experts=experts, vocabulary=64
    )


@pytest.mark.parametrize("stage", slow_but([3], range(4)))
def test_stages_of_zero(state, gpt, stage):
    (row,) = state.measure("", gpt(), "dp=4", stage)
    share = lambda at: 4 if stage >= at else 1
    assert (row.parameters, row.gradients, row.states) == (
        2 * row.psi // share(3),
        2 * row.psi // share(2),
        12 * row.psi // share(1),
    )
    assert row.psi == gpt().base
    assert (
        0 <= row.total - state.zero_formula(stage, row.psi, 4) < 1000
    )  # an optimizer's step counts: 4 bytes each
    assert 0 <= row.idle - (row.parameters + row.states) < 1000
    told = explained(gpt(), "dp=4", stage)
    assert (told.parameters, told.gradients, told.optimizer) == (row.parameters, row.gradients, row.states)
    assert told.peak > row.total - 1000 and told.activations > 0


def explained(shape, mesh, stage):
    """What `explain` says that a rank holds."""
    _, trace = importlib.import_module("memory_state_rank").traced(shape)
    roles, options = Roles.resolve(MeshShape.of(mesh)), Options(zero=stage)
    return explain(compile_graph(GlobalGraph.of(trace, roles, set(trace.parameters), options=options))).memory


@pytest.mark.slow
def test_teds_expression(state, gpt):
    """E=4, T=2, G=16: exact but for what the expression does not know: router, embedding, and the norms and
    biases that T does not cut."""
    shape = gpt(4, hidden=1024)
    (row,) = state.measure("", shape, "dp=2,ep=4,tp=2", 1)
    assert row.total == pytest.approx(state.ted_memory(shape.base, 2, 4, 16), rel=5e-3)


@pytest.mark.slow
def test_layers_add_up(state, gpt):
    shape = dataclasses.replace(gpt(), layers=3)
    whole, sum_ = (
        make("", shape, "dp=2,tp=2", 1, steppers=[state.WHOLE])[0]
        for make in (state.measure, state.extrapolated)
    )
    for name in ("model", "psi", "share", "parameters", "gradients", "states"):
        assert getattr(whole, name) == getattr(sum_, name), name


TILE = 2**22
BUCKETS = 3 * 25 * 2**20  # a gathered bucket, this rank's part of it, and the next one's


@pytest.mark.slow
def test_a_tiled_spike_does_not_grow_with_the_experts(state, gpt):
    tiled, untiled = {}, {}
    for experts in (4, 16):
        both = state.measure(
            "",
            gpt(experts, hidden=2048),
            "dp=2,ep=4",
            1,
            steppers=[{"tile": TILE, "fused": True}, {"tile": None, "fused": True}],
        )
        tiled[experts], untiled[experts] = (row.spike for row in both)
        assert untiled[experts] == pytest.approx(4 * both[1].share, rel=0.2)
    assert tiled[16] <= tiled[4] * 1.05 and tiled[16] < 4 * TILE + BUCKETS
    assert untiled[16] > 2 * untiled[4] and untiled[16] > 4 * tiled[16]


@pytest.mark.parametrize(
    "where, device, host", [slow("gradients", 14, 2), slow("optimizer", 4, 12), ("cpu", 2, 14)]
)
def test_offload_leaves_what_its_table_says(state, gpt, where, device, host):
    (row,) = state.measure("", gpt(), "dp=1", 0, steppers=[{"fused": True, "offload": where}])
    assert 0 <= row.host - host * row.psi < 1000 and 0 <= row.total - row.host - device * row.psi < 1000
    assert 0 <= row.idle - row.total + (2 * row.psi if where == "optimizer" else 0) < 1000


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_real_tensors_take_the_same(state, gpt, stage):
    steppers = [{"tile": 5000, "fused": True}, {"tile": None, "fused": True}]
    fake, real = (
        state.measure("", gpt(4), "dp=2,ep=2", stage, steppers=steppers, real=real) for real in (False, True)
    )
    assert fake == real
