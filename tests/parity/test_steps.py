"""Step by step: other rows and another learning rate in every step, and the first difference has a name."""

import dataclasses

import torch

from tedfx.verification.batches import step_batches
from tedfx.verification.run import Outcome, rate_of_step
from tedfx.verification.verdict import TOLERANCES, compare
from tests.parity import mutations
from tests.parity.cases import case, verified


def test_state_that_should_move_and_does_not_shows_in_a_later_step():
    this = case("llama", "tp=2", steps=3, overrides={"num_hidden_layers": 1})
    result = verified(this, mutations.rate_stays)
    assert (
        result["loss"].ok
        and result["gradients"].ok
        and result["later gradients"].error > 0
        and not result["later losses"].ok
    )
    assert (
        result.first.startswith("step 3, loss: ")
        and result.first.endswith("allowed 1e-06")
        and str(result).splitlines()[-1] == f"the first difference: {result.first}"
    )


def outcome():
    g = torch.Generator().manual_seed(0)
    weight = lambda: {
        "w": torch.randn(4, 3, generator=g, dtype=torch.float64),
        "b": torch.randn(3, generator=g, dtype=torch.float64),
    }
    made = Outcome(
        [3.0, 2.0, 1.0],
        [1.0, 1.1, 1.2],
        {1: weight(), 3: weight()},
        {1: {"count": torch.tensor(1)}, 3: {"count": torch.tensor(3)}},
        weight(),
    )
    return made


def changed(**fields):
    return dataclasses.replace(outcome(), **fields)


def test_the_first_difference_is_named():
    reference = outcome()
    bad = lambda tensors, name: {**tensors, name: tensors[name] * 1.01}
    expected = {
        "": outcome(),
        "step 2, loss: 5.0e-03, allowed 1e-06": changed(losses=[3.0, 2.01, 1.1], norms=[1.0, 1.2, 1.2]),
        "step 1, gradient of w: 1.0e-02, allowed 1e-05": changed(
            gradients={1: bad(reference.gradients[1], "w"), 3: reference.gradients[3]}, norms=[1.1, 1.1, 1.2]
        ),
        "step 3, gradient of b: 1.0e-02, allowed 1e-05": changed(
            gradients={1: reference.gradients[1], 3: bad(reference.gradients[3], "b")}
        ),
        "step 2, gradient norm: 9.1e-02, allowed 1e-05": changed(norms=[1.0, 1.2, 1.2]),
        "step 3, buffer count: 3.3e-01, allowed 1e-05": changed(
            buffers={1: reference.buffers[1], 3: {"count": torch.tensor(2)}}
        ),
        "step 3, buffer count: inf, allowed 1e-05": changed(buffers={1: reference.buffers[1], 3: {}}),
        "step 3, parameter b: 1.0e-02, allowed 1e-05": changed(parameters=bad(reference.parameters, "b")),
    }
    for line, mesh in expected.items():
        result = compare("", reference, [mesh], TOLERANCES[torch.float64], 3)
        assert result.first == line and result.ok == (not line)


def test_batches_and_rates_of_the_steps():
    rows = {
        "ids": torch.arange(6).view(3, 2),
        "nested": [torch.arange(3)],
        "scale": torch.tensor(2.0),
        "one": torch.ones(1, 2),
    }
    first, second, third, fourth = step_batches(rows, 4)
    assert torch.equal(first["ids"], rows["ids"]) and torch.equal(fourth["ids"], rows["ids"])
    assert (
        second["ids"][:, 0].tolist() == [4, 0, 2]
        and second["nested"][0].tolist() == [2, 0, 1]
        and third["ids"][:, 0].tolist() == [2, 4, 0]
    )
    assert all(torch.equal(step["one"], rows["one"]) and step["scale"] == 2 for step in (second, third))
    assert [b["n"] for b in step_batches([{"n": 1}, {"n": 2}], 3)] == [1, 2, 1]
    assert all(rate_of_step(step) != rate_of_step(step + 1) for step in range(8))
