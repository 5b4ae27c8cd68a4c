"""Mixtures in each style of tests/models_styles.py on the meshes, and what they send."""

from collections import Counter

import pytest

from tedfx.ops import count_collectives
from tedfx.verification.batches import split_batch
from tests.marks import slow, slow_but
from tests.models_styles import STYLES
from tests.parity.cases import case, on_ranks, verified

PPMOE = {"expert": "tp"}
FAST = ("hit_loop", "scores_first", "first_of_each")
CASES = [
    made
    for name in STYLES
    for made in (
        (slow if name not in FAST else lambda case: case)(
            case(name, "ep=2,tp=2", steps=2, batch="one_token_in_second_half")
        ),
        slow(case(name, "dp=2,ep=2", steps=2, zero=3, batch="odd")),
        slow(case(name, "tp=2", roles=PPMOE, steps=2, checkpoint="comm")),
        slow(case(name, "ep=2", steps=1, compile="aot_eager")),
    )
]


CASES.append(slow(case("first_of_each", "dp=2,ep=2", steps=2, capacity="local")))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_single_device(case):
    result = verified(case)
    assert result.ok, f"\n{result}"


def sent(pm, batch, rank):
    with count_collectives() as log:
        pm(**split_batch(batch, *pm.batch_coordinate)).backward()
    return Counter((c.op, c.phase, len(c.shape)) for c in log if c.axes == ("ep",))


COUNTED = {
    "kept_hits": 1,
    "mask_numbers": 1,
    "first_of_each": 1,
}  # running counts of the tokens, before any row is sent


@pytest.mark.parametrize("name", slow_but(["hit_loop", "scores_first"], STYLES))
def test_two_row_exchanges_and_one_of_counts(name):
    for log in on_ranks(case(name, "ep=2"), sent):
        assert log["all_to_all", "forward", 2] == 2 and log["all_to_all", "backward", 2] == 2
        gathers = sum(n for (op, phase, _), n in log.items() if phase == "forward" and op == "all_gather")
        assert gathers == 1 + COUNTED.get(name, 0)
