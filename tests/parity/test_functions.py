"""Functions of the user's own on ranks: trained for some steps, compiled, with regions that are recomputed,
and micro-batch by micro-batch.
"""

import pytest

from tests.parity.cases import case, on_ranks, verified
from tests.parity.test_layered import three_ways

VERIFIED = [
    case("everything", "ep=2,tp=2"),
    case("everything", "dp=2,tp=2", checkpoint="full"),
    case("everything", "ep=2,tp=2", compile="aot_eager", checkpoint="comm", steps=1),
]


@pytest.mark.parametrize("this", VERIFIED, ids=str)
def test_trains_as_on_one_device(this):
    result = verified(this)
    assert result.ok, f"\n{result}"


def test_layer_by_layer_is_one_after_the_other():
    for to_apart, *_, sums, layered_sums, overlapped in on_ranks(
        case("everything", "dp=2,tp=2", checkpoint="comm", zero=3), three_ways
    ):
        assert to_apart < 1e-11 and sums == layered_sums and overlapped
