"""Experts that are frozen or carry low-rank pairs, mixtures in two places, layers of unlike mixtures."""

import pytest

from tests.marks import slow
from tests.models_adapters import ADAPTERS
from tests.parity.cases import case, verified

PPMOE = {"expert": "tp"}
CASES = [
    case("parametrized", "ep=2,tp=2", steps=2, batch="one_token_in_second_half"),
    slow(case("parametrized", "ep=2,tp=2", overrides={"experts": 3}, steps=2)),
    slow(case("parametrized", "dp=2,ep=2", overrides={"experts": 3}, steps=2, zero=3)),
    *(
        slow(case(name, "ep=2,tp=2", steps=2, batch="one_token_in_second_half"))
        for name in ADAPTERS
        if name != "parametrized"
    ),
    *(slow(case(name, "tp=2", roles=PPMOE, steps=2)) for name in ADAPTERS),
    *(slow(case(name, "dp=2,ep=2", steps=2, zero=3, batch="odd")) for name in ADAPTERS),
    slow(case("parametrized", "ep=2,tp=2", steps=1, compile="aot_eager")),
    slow(case("pairs_of_one", "ep=2,tp=2", steps=1, compile="aot_eager")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_single_device(case):
    result = verified(case)
    assert result.ok, f"\n{result}"
