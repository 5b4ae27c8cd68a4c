"""Experts that choose tokens (tests/models_choices.py), on every kind of mesh, and what they send."""

from collections import Counter

import pytest

from tedfx.ops import count_collectives
from tedfx.verification.batches import split_batch
from tests.marks import slow
from tests.models_choices import LAYERS
from tests.parity.cases import case, on_ranks, verified

ONE = {"layers": 1}


@pytest.mark.parametrize(
    "case",
    [
        case("choice_batch", "dp=2,ep=2", overrides=ONE, steps=2, batch="one_token_in_second_half"),
        slow(case("choice_batch", "ep=2", overrides=ONE, steps=1, compile="aot_eager")),
        slow(
            case(
                "choice_batch", "ep=2,tp=2", overrides=ONE, steps=2, batch="no_labels_in_second_half", zero=3
            )
        ),
        *(slow(case(f"choice_{name}", "ep=2,tp=2", overrides=ONE, steps=2)) for name in LAYERS),
        *(
            slow(case(f"choice_{name}", "tp=2", roles={"expert": "tp"}, overrides=ONE, steps=2))
            for name in LAYERS
        ),
    ],
    ids=str,
)
def test_matches_the_single_device(case):
    result = verified(case)
    assert result.ok, f"\n{result}"


def sent(pm, batch, rank):
    with count_collectives() as log:
        pm(**split_batch(batch, *pm.batch_coordinate))
    return [c.op for c in log]


@pytest.mark.slow
def test_a_layer_sends_the_chosen_tokens_there_and_back():
    """Rows there and back; scores, and counts of rows."""
    one, two = (
        on_ranks(case("choice_batch", "ep=2", overrides={"layers": layers}), sent)[0] for layers in (1, 2)
    )
    assert Counter(two) - Counter(one) == {"all_to_all": 2, "all_gather": 2}
