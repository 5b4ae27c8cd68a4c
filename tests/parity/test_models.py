"""Every model and every mesh: loss, gradient norm, gradients, parameters after AdamW steps, replicas, against
the single device.

The full product is `make parity`; here every model meets meshes of each kind, and every mesh at least two
models. Labels are spread unevenly over the ranks, and the router's auxiliary loss is on.
"""

import pytest

from tests.parity.cases import case, verified

PPMOE = {"expert": "tp"}
FOLDED = {"expert": ("ep", "tp")}

CASES = [
    case("mixtral", "dp=2"),
    case("mixtral", "ep=2,tp=2"),
    case("mixtral", "dp=2,ep=2,tp=2"),
    case("mixtral", "tp=2", roles=PPMOE),
    case("mixtral", "ep=2,tp=2", roles=FOLDED),
    case("qwen3_moe", "ep=2"),
    case("qwen3_moe", "tp=4"),
    case("qwen3_moe", "ep=2,tp=2", roles=FOLDED),
    case("qwen2_moe", "tp=2"),
    case("qwen2_moe", "dp=2,tp=2"),
    case("qwen2_moe", "dp=2,ep=2"),
    case("olmoe", "dp=2,ep=2"),
    case("olmoe", "tp=4", roles=PPMOE),
    case("olmoe", "tp=2,ep=2"),  # another order of the axes
    case("deepseek_v3", "tp=2"),
    case("deepseek_v3", "ep=2,tp=2"),
    case("deepseek_v3", "dp=2"),
    case("deepseek_v3", "tp=2", roles=PPMOE),
    case("gpt_oss", "ep=2"),
    case("gpt_oss", "dp=2,tp=2"),
    case("gpt_oss", "tp=4"),
    case("gpt_oss", "dp=1,ep=2,tp=2"),  # an axis of size 1
    case("llama", "tp=4"),
    case("llama", "dp=2,tp=2"),
    case("llama", "tp=2", overrides={"tie_word_embeddings": True}),
    case("plain", "ep=2,tp=2"),
    case("plain_boolean", "dp=2,ep=2"),
    case("plain_stacked", "tp=2", roles=PPMOE),
    case("mixtral", "ep=2,tp=2", dtype="float32"),
    case("llama", "tp=2", dtype="float32"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_single_device(case):
    result = verified(case)
    print(result)
    assert result.ok, f"\n{result}"


def test_every_model_and_every_mesh_has_a_case():
    from tests.models import MODELS

    assert {c.model for c in CASES} >= set(MODELS)
    plain = {c.mesh for c in CASES if not c.roles}
    assert plain >= {
        "dp=2",
        "tp=2",
        "ep=2",
        "tp=4",
        "dp=2,tp=2",
        "dp=2,ep=2",
        "ep=2,tp=2",
        "dp=2,ep=2,tp=2",
        "tp=2,ep=2",
        "dp=1,ep=2,tp=2",
    }
    assert {(c.mesh, c.roles) for c in CASES} >= {
        (m, case("", m, roles=r).roles) for m, r in [("tp=2", PPMOE), ("tp=4", PPMOE), ("ep=2,tp=2", FOLDED)]
    }
