"""Mixtures to whose experts nothing is dispatched (tests/models_dense_experts.py), on every kind of mesh."""

from collections import Counter

import pytest

from tedfx.ops import count_collectives
from tedfx.verification.batches import split_batch
from tests.marks import slow
from tests.models_dense_experts import LAYERS
from tests.parity.cases import case, on_ranks, verified

MESHES = {
    "ep2 tp2": ("ep=2,tp=2", {}),
    "dp2 ep2": ("dp=2,ep=2", {}),
    "tp2 ppmoe": ("tp=2", {"expert": "tp"}),
}
FAST = [("threshold", "ep2 tp2")]


def made(name, mesh, **options):
    mesh, roles = MESHES[mesh]
    options = {"steps": 2, "batch": "one_token_in_second_half", **options}
    return case(f"soft_{name}", mesh, roles=roles, overrides={"layers": 1}, **options)


@pytest.mark.parametrize(
    "name, mesh",
    [*FAST, *(slow(name, mesh) for name in LAYERS for mesh in MESHES if (name, mesh) not in FAST)],
)
def test_matches_the_single_device(name, mesh):
    result = verified(made(name, mesh))
    assert result.ok, f"\n{result}"


@pytest.mark.parametrize("name", [slow("plain"), slow("moe"), slow("peer")])
def test_compiled(name):
    result = verified(made(name, "ep2 tp2", compile="aot_eager"))
    assert result.ok, f"\n{result}"


def sent(pm, batch, rank):
    with count_collectives() as log:
        pm(**split_batch(batch, *pm.batch_coordinate))
    return [c.op for c in log]


TOKENS = {"all_gather": 2, "reduce_scatter": 1}  # tokens and their scores; what the ranks' experts add up to
SENT = {"plain": TOKENS, "threshold": TOKENS}


@pytest.mark.parametrize("name", [slow(name) for name in SENT])
def test_a_layer_gathers_tokens_and_scatters_sums(name):
    one, two = (
        on_ranks(case(f"soft_{name}", "ep=2", overrides={"layers": layers}), sent)[0] for layers in (1, 2)
    )
    assert Counter(two) - Counter(one) == SENT[name]
