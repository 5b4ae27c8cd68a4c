"""Random programs on dp2 x tp2 and ep2: each trains as on one device, or is refused with a line.

Here are two; CI runs 300 beside the suite, in which every kind is right at least once
(`what_is_lacking`), `make fuzz` thousands.
"""

import collections
import copy

import pytest
import torch

from tests.fuzz.program import Program
from tests.fuzz.run import Verdict, default_runs, judge, verdicts, what_is_lacking
from tests.parity.nursery import nursery

SEEDS = [144, 161]  # odd ones have a mixture, and run on ep2
BAD = ("silent", "crash", "invalid")


def _verdicts(seeds: list[int]) -> list:
    import warnings

    warnings.filterwarnings("ignore")
    return verdicts(default_runs(seeds))


def test_parity_or_refusal():
    found = nursery().call(_verdicts, SEEDS)
    print(f"seeds {SEEDS}:", dict(collections.Counter(v.outcome for v in found)))
    failed = [v for v in found if v.outcome in BAD]
    assert not failed, f"{len(failed)} of {len(found)} runs:\n" + "\n".join(map(str, failed))
    assert sum(v.outcome == "parity" for v in found) > len(found) / 2
    assert {v.mesh for v in found if v.outcome == "parity"} == {"dp2xtp2", "ep2"}


def test_a_kind_that_is_never_right_is_named():
    found = [Verdict("", 0, "dp2xtp2", "refused")]
    assert [line.partition(":")[0] for line in what_is_lacking(found)] == [
        "0 of 1 runs reach parity",
        "never drawn, or never right",
    ]


def test_a_program_is_its_seed():
    assert Program(11).source == Program(11).source != Program(12).source


def _outcome(batch: int) -> dict:
    rows = torch.arange(8.0).view(4, 2)
    one = {
        "losses": [1.0, 2.0],
        "gradients": [{"w": torch.ones(3)}] * 2,
        "outputs": [{"rows_y": rows, "same_b": torch.ones(2)}] * 2,
        "parameters": {"w": torch.ones(3)},
        "buffers": {"b": torch.ones(2)},
    }
    if batch < 0:
        return one
    outputs = {"rows_y": rows.chunk(2)[batch], "same_b": torch.ones(2)}
    return {
        **copy.deepcopy(one),
        "outputs": [dict(outputs), dict(outputs)],
        "digests": {("w", ()): "a"},
        "batch": batch,
    }


def _change(rank: dict, what: str) -> None:
    if what == "loss":
        rank["losses"][1] += 1e-4
    elif what == "gradient":
        rank["gradients"][1] = {"w": torch.tensor([1.0, 1.0, 1.0001])}
    elif what == "parameter":
        rank["parameters"]["w"][0] += 1e-4
    elif what == "buffer":
        rank["buffers"]["b"][0] += 1e-4
    elif what == "rows":
        rank["outputs"][1]["rows_y"] = torch.arange(8.0).view(4, 2)
    elif what == "output":
        rank["outputs"][0]["same_b"] = torch.ones(2) * 1.1
    else:
        rank["digests"]["w", ()] = "b"


@pytest.mark.parametrize(
    "what, rank",
    [
        ("loss", 1),
        ("gradient", 0),
        ("parameter", 0),
        ("buffer", 1),
        ("rows", 1),
        ("output", 1),
        ("replica", 1),
    ],
)
def test_every_kind_of_difference_is_silent(what, rank):
    ranks = [_outcome(0), _outcome(1)]
    assert judge(_outcome(-1), ranks)[0] == "parity"
    _change(ranks[rank], what)
    outcome, line, _ = judge(_outcome(-1), ranks)
    assert outcome == "silent" and line


def test_a_refusal_counts_on_all_ranks_and_in_one_line():
    refused = [{"refused": "no | at a.py:1 | write b"}] * 2
    assert judge(_outcome(-1), refused)[0] == "refused"
    assert judge(_outcome(-1), [refused[0], _outcome(1)])[0] == "crash"
    assert judge(_outcome(-1), [{"refused": "two\nlines"}] * 2)[0] == "crash"
