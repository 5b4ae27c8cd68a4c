"""Mixtures with a capacity on every kind of mesh: which tokens are dropped is decided over the global batch, as on a single device."""

import pytest

from tests.parity.cases import case, verified

PPMOE = {"expert": "tp"}
ONE = {"layers": 1}

CASES = [
    case("capacity_switch", "dp=2", overrides=ONE, batch="all_labels"),
    case("capacity_switch", "ep=2", overrides=ONE, batch="all_labels"),
    case("capacity_switch", "ep=2,tp=2", overrides=ONE, batch="all_labels"),
    case("capacity_switch", "tp=2", roles=PPMOE, overrides=ONE, batch="all_labels"),
    case("capacity_gshard", "ep=2", overrides=ONE, batch="all_labels"),
    case("capacity_gshard", "tp=2", overrides=ONE, batch="all_labels"),
    case("capacity_gshard", "tp=2", roles=PPMOE, overrides=ONE, batch="all_labels"),
    case("capacity_gshard", "dp=2,ep=2", overrides=ONE, batch="all_labels"),
    case("capacity_gshard", "ep=2,tp=2", roles={"expert": ("ep", "tp")}, overrides=ONE, batch="all_labels"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_single_device(case):
    result = verified(case)
    print(result)
    assert result.ok, f"\n{result}"
