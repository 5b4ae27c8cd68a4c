"""The benchmark of DeepSpeed-TED's counts, on its smallest worlds: what ran, what was predicted and the
formulas are the same."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "communication.py"


@pytest.fixture(scope="module")
def printed():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *"--experts 4 --degrees 1 2 --top-k 2 --gloo 1".split()],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_counts_are_those_of_the_paper(printed):
    lines = {
        cells[5]: cells
        for line in printed.splitlines()
        if len(cells := [c.strip() for c in line.split("|")]) > 10 and cells[3] == "2"
    }
    assert lines["full recompute"][6:9] == ["6 / 9", "6 / 12", "-"] and lines["+ CAC"][6:9] == [
        "4 / 6",
        "4 / 8",
        "-",
    ]
    assert lines["+ DTD"][6:9] == ["6 / 9", "6 / 6", "6 / 6"] and lines["+ both"][6:9] == [
        "4 / 6",
        "4 / 4",
        "4 / 4",
    ]
    assert "9 of 9 rows are as the formula, 9 as predicted." in printed and "(fake)" in printed


def test_a_wrong_formula_is_found():
    spec = importlib.util.spec_from_file_location("communication", SCRIPT)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    from collections import Counter

    key = ("forward", benchmark.ALL_TO_ALL, ("ep",), 512)
    ran = [Counter(), Counter({key: 4})]
    row = benchmark.Row("", "", 4, 1, 1, 2, ran, ran, benchmark._ted(1, False), 4, True)
    assert row.as_formula and row.exact
    assert not benchmark.Row(
        "", "", 4, 1, 1, 2, [Counter(), Counter({key: 5})], ran, benchmark._ted(1, False), 4, True
    ).as_formula
