"""Experts that are frozen or carry low-rank pairs, mixtures in two places, layers of unlike mixtures."""

import pytest
import torch

from tedfx.errors import CaptureError
from tedfx.options import Options
from tedfx.placement.roles import MeshShape, Roles
from tedfx.state.layouts import layouts_of
from tedfx.trace.export import trace
from tedfx.verification.run import prepare
from tests.marks import slow
from tests.models_adapters import ADAPTERS, Loop, Model
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


def test_frozen_experts_are_a_stack_of_their_own():
    model = ADAPTERS["some_frozen"]()
    ids = torch.zeros(4, 6, dtype=torch.int64)
    traced = trace(model, kwargs={"input_ids": ids, "labels": ids})
    made = prepare(model, traced, Roles.resolve(MeshShape.of("ep=2,tp=2")), Options())
    layouts = {layout.name: layout for layout in layouts_of(model, made, set())}
    up = "mixtures.0.experts.{}.up.weight"
    trained, frozen = layouts[up.format("stacked")], layouts[up.format("stacked_1")]
    assert trained.requires_grad and trained.sources == (up.format(0), up.format(2))
    assert not frozen.requires_grad and frozen.sources == (up.format(1), up.format(3))


def test_a_mixture_in_an_expert_is_refused():
    model = Model(Loop(make=lambda: Loop(2, 1)))
    ids = torch.zeros(4, 6, dtype=torch.int64)
    with pytest.raises(CaptureError, match=r"an expert is a mixture itself \| at .*models_adapters"):
        prepare(
            model,
            trace(model, kwargs={"input_ids": ids, "labels": ids}),
            Roles.resolve(MeshShape.of("ep=2")),
            Options(),
        )
