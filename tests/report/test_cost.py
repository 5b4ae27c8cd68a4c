"""Predicted communication against what runs on gloo, and the formulas themselves."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import Counter

import pytest
import sympy
import torch

from tedfx.analysis.communication import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    COUNTED,
    GATHER_PARAMETERS,
    REDUCE_SCATTER,
    SCATTER_GRADIENTS,
    Communication,
)
from tedfx.analysis.cost import Cost
from tedfx.analysis.text import format_bytes, format_formula
from tests.report.counting import CASES, SLOTS
from tests.report.toy import compile_toy


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """By case, the answers of the ranks."""
    path = tmp_path_factory.mktemp("counting") / "answers"
    done = subprocess.run(
        [sys.executable, "-m", "tests.report.counting", str(path)],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    by_rank = pickle.loads(path.read_bytes())
    return [[rank[i] for rank in by_rank] for i in range(len(CASES))]


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, c)) for c in CASES])
def test_predicted_is_counted(counted, case):
    for rank in counted[case]:
        assert rank["predicted"] <= rank["ran"]
        rest = Counter()
        for (*what, _), n in (rank["ran"] - rank["predicted"]).items():  # of sizes that are data
            rest[tuple(what)] += n
        assert rest == rank["predicted_ragged"]
        assert rank["predicted_buckets"] == rank["ran_buckets"] and not rank["other_wire"]
    # rows differ from rank to rank; all ranks together send exactly what balanced routing says, less what a
    # capacity drops
    ran, predicted = (sum(r[key] for r in counted[case]) for key in ("ran_rows", "predicted_rows"))
    assert (
        ran < predicted
        if CASES[case][0].startswith("capacity") and CASES[case] not in SLOTS
        else ran == predicted
    )
    for rank in counted[case]:
        if CASES[case] in SLOTS:
            assert rank["copies"] == 0 and rank["exact"] and rank["ran_rows"] == rank["predicted_rows"]
            # nothing that reads counts back, in the graph or by itself
            assert (
                not rank["ops"]
                & {
                    "exchange_counts",
                    "exchange_lanes",
                    "route",
                    "cut_tail",
                    "tedfx::grouped_linear",
                    "tedfx::expert_rows",
                }
                and "slot_linear" in rank["ops"]
            )
        else:
            assert rank["copies"] == 1


@pytest.mark.slow
def test_module_prints(counted):
    rank = counted[0][0]
    assert rank["text"].startswith("mesh ep=2,tp=2 (4 ranks)") and "all_to_all_single ep" in rank["text"]
    assert (
        rank["fresh"] == rank["text"]
    )  # parallelize compiles its example: there is something to print before the first call
    assert rank["json"]["sizes"] == {"batch": 2, "sequence": 6}
    assert len({r["text"] for r in counted[0]}) == 1  # every rank prints the same


def test_wire():
    make = lambda op, n: Communication("x", op, ("tp",), n, "forward", 12, torch.float32)
    wire = {
        ALL_REDUCE: 72,
        ALL_GATHER: 144,
        REDUCE_SCATTER: 36,
        ALL_TO_ALL: 36,
        GATHER_PARAMETERS: 144,
        SCATTER_GRADIENTS: 36,
    }
    assert {op: make(op, 4).payload * make(op, 4).factor for op in wire} == wire
    assert set(COUNTED.values()) == {
        ALL_REDUCE,
        ALL_GATHER,
        REDUCE_SCATTER,
        ALL_TO_ALL,
        GATHER_PARAMETERS,
        SCATTER_GRADIENTS,
    }


def test_text():
    b, s = sympy.symbols("batch sequence")
    assert format_bytes(1536) == "1.5 KiB" and format_bytes(0) == "0 B" and format_bytes(5 * 2**30) == "5 GiB"
    assert format_formula(64) == "64 B"
    assert format_formula(8192 * b * s + 64) == "8 KiB*batch*sequence + 64 B"
    assert format_formula(sympy.Rational(3, 2) * 1024 * b) == "1.5 KiB*batch"


@pytest.mark.slow
def test_totals(compilations):
    cost = Cost(compilations("mixtral", "dp=4,ep=2,tp=2", layers=3))
    found = {(t.phase, t.op, t.axes): t for t in cost.totals()}
    batch, sequence = (
        sympy.Symbol("batch", integer=True, positive=True),
        sympy.Symbol("sequence", integer=True, positive=True),
    )
    tokens = batch * sequence

    rows = found["forward", ALL_TO_ALL, ("ep",)]  # there and back, per layer: tokens x k rows of 32 floats
    assert (
        rows.count == 6
        and rows.payload == 6 * tokens * 2 * 32 * 4
        and rows.wire == rows.payload / 2
        and rows.ragged
    )
    assert found["backward", ALL_TO_ALL, ("ep",)].payload == rows.payload
    counts = found["forward", ALL_GATHER, ("ep",)]  # one exchange of 4 int64 per layer, none in backward
    assert (
        counts.count == 3 and counts.payload == 3 * 4 * 8 and ("backward", ALL_GATHER, ("ep",)) not in found
    )
    # two all-reduces per layer, one of the embedding, two of the cross-entropy (1 and 2 floats per row)
    reduces = found["forward", ALL_REDUCE, ("tp",)]
    assert reduces.count == 9 and sympy.expand(reduces.payload - (7 * tokens * 32 * 4 + 3 * tokens * 4)) == 0
    assert found["forward", ALL_GATHER, ("tp",)].payload == tokens * 32 * 4  # the logits; nothing in backward
    # experts over dp, the others over dp and ep
    layer = {"expert": (2 * 2 * 24 + 24 * 2) * 32, "rest": (16 + 8 + 8 + 16) * 32 + 4 * 32 + 2 * 32}
    both = [i for i in cost.items if i.node == "(gradients)"]
    assert sum(i.payload for i in both if i.axes == ("dp",)) == 3 * layer["expert"] * 4
    assert (
        sum(i.payload for i in both if i.axes == ("dp", "ep")) == (3 * layer["rest"] + 2 * 32 * 32 + 32) * 4
    )
    one = cost.totals(by_op=False)
    assert sum(t.count for t in one) == len(cost.items) and {t.phase for t in one} == {
        "forward",
        "backward",
        "boundary",
    }
    assert (
        cost.number(rows.payload, {"batch": 2, "sequence": 10}) == 6 * 20 * 2 * 32 * 4
        and cost.number(rows.payload, {}) is None
    )


@pytest.mark.slow
def test_redundant_rows_are_found(compilations):
    """Plain TED sends every row once per tensor rank: half of it is redundant over two. Each saving removes
    all of it."""
    cost = Cost(compilations("mixtral", "dp=4,ep=2,tp=2", layers=3))
    (lint,) = cost.redundant()
    rows = sum(i.payload for i in cost.items if i.op == ALL_TO_ALL)
    assert (lint.axes, lint.copies) == (("ep",), ("tp",)) and sympy.expand(lint.payload - rows / 2) == 0
    for saving in ("dedup", "sequence_parallel"):
        less = Cost(compilations("mixtral", "dp=4,ep=2,tp=2", layers=3, **{saving: True}))
        assert (
            less.redundant() == []
            and sympy.expand(sum(i.payload for i in less.items if i.op == ALL_TO_ALL) - rows / 2) == 0
        )
    assert Cost(compilations("mixtral", "dp=4,ep=4", layers=3)).redundant() == []


def test_nothing_to_communicate():
    assert Cost(compile_toy("dp=1")).items == []
