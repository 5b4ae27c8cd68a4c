"""Mixtures of which a tensor of assignments is computed, on every kind of mesh."""

import pytest

from tedfx.ops import count_collectives
from tedfx.verification.batches import split_batch
from tests.marks import slow
from tests.models_dense import LAYERS
from tests.parity.cases import case, on_ranks, verified

MESHES = {
    "ep2 tp2": ("ep=2,tp=2", {}),
    "dp2 ep2": ("dp=2,ep=2", {}),
    "tp2 ppmoe": ("tp=2", {"expert": "tp"}),
}
FAST = [
    ("interleaved", "ep2 tp2"),
    ("all_biases", "tp2 ppmoe"),
    ("llama4", "dp2 ep2"),
]


def made(name, mesh, **options):
    mesh, roles = MESHES[mesh]
    return case(f"dense_{name}", mesh, roles=roles, overrides={"layers": 1}, steps=2, **options)


@pytest.mark.parametrize(
    "name, mesh",
    [*FAST, *(slow(name, mesh) for name in LAYERS for mesh in MESHES if (name, mesh) not in FAST)],
)
def test_matches_the_single_device(name, mesh):
    result = verified(made(name, mesh))
    assert result.ok, f"\n{result}"


@pytest.mark.parametrize("name", [slow("three_gathers"), slow("all_einsum"), slow("llama4")])
def test_compiled(name):
    result = verified(made(name, "ep2 tp2", compile="aot_eager"))
    assert result.ok, f"\n{result}"


def sent(pm, batch, rank):
    with count_collectives() as log:
        pm(**split_batch(batch, *pm.batch_coordinate))
    return [c.op for c in log]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["by_einsum", "all_einsum", "llama4", "gathered_one"])
def test_a_layer_sends_rows_there_and_back(name):
    """Two all-to-alls of rows, and one exchange of counts."""
    one, two = (
        on_ranks(case(f"dense_{name}", "ep=2", overrides={"layers": layers}), sent)[0] for layers in (1, 2)
    )
    more = {op: two.count(op) - one.count(op) for op in two if two.count(op) > one.count(op)}
    assert more == {"all_to_all": 2, "all_gather": 1}
