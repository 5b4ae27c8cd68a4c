"""Predicted communication against what runs on gloo, and the formulas themselves."""

from __future__ import annotations

from collections import Counter

import pytest
import sympy
import torch

import tedfx
from tedfx.cost import ALL_TO_ALL, COUNTED, Communication, Cost, format_bytes, format_formula
from tests.models import MODELS
from tests.pool import context

BATCH, SEQUENCE = 2, 6


def counted(name, shape, names, roles, traced):
    """What one step of a tiny model communicates, and what its compilation predicts, on this rank."""
    mesh = context(shape, names).device_mesh
    pm = tedfx.parallelize(MODELS[name](), mesh, roles=roles, traces=[traced])
    index, count = pm.batch_coordinate
    ids = torch.arange(BATCH * count * SEQUENCE).view(BATCH * count, SEQUENCE) * 7 % 61
    mine = ids[index * BATCH : (index + 1) * BATCH]
    with tedfx.ops.count_collectives() as log:
        pm(input_ids=mine, labels=mine).loss.backward()
    cost = Cost(next(iter(pm.programs.values())).compilation)
    values = {"batch": BATCH, "sequence": SEQUENCE}
    predicted, ran = Counter(), Counter()
    for item in cost.items:
        if item.phase != "boundary":
            predicted[item.phase, item.op, item.axes, -1 if item.ragged else cost.number(item.payload, values)] += 1
    for each in log:
        ran[each.phase, COUNTED[each.op], each.axes, -1 if each.op == "all_to_all" else each.bytes] += 1
    buckets = Counter((r.axes, r.bytes) for r in pm.reductions)
    boundary = Counter((i.axes, cost.number(i.payload, values)) for i in cost.items if i.node == "(gradients)")
    rows = sum(e.bytes for e in log if e.op == "all_to_all" and e.phase == "forward")
    expected = sum(cost.number(i.payload, values) for i in cost.items if i.op == ALL_TO_ALL and i.phase == "forward")
    return predicted, ran, boundary, buckets, rows, expected, str(pm.explain(batch=BATCH, sequence=SEQUENCE))


CASES = [
    ("mixtral", (2, 2), ("ep", "tp"), None),
    ("mixtral", (2, 2), ("dp", "tp"), {"expert": ("tp",)}),
    ("mixtral", (2, 2), ("ep", "tp"), {"expert": ("ep", "tp")}),
    ("llama", (4,), ("tp",), None),
    ("deepseek_v3", (2, 2), ("ep", "tp"), None),
]


@pytest.mark.parametrize("name,shape,names,roles", CASES)
def test_predicted_is_counted(ranks, traces, name, shape, names, roles):
    answers = ranks(4).run(counted, name, shape, names, roles, traces(name))
    for predicted, ran, boundary, buckets, _, _, text in answers:
        assert predicted == ran
        assert boundary == buckets
        assert "communication" not in text or "all_reduce" in text
    # rows differ from rank to rank; what all ranks send together is exactly the balanced prediction
    if any(expected for *_, expected, _ in answers):
        assert sum(a[4] for a in answers) == sum(a[5] for a in answers)


def test_wire():
    make = lambda op, n: Communication("x", op, ("tp",), n, "forward", 12, torch.float32)
    assert [make(op, 4).payload * make(op, 4).factor for op in COUNTED.values()] == [72, 144, 36, 36]


def test_text():
    b, s = sympy.symbols("batch sequence")
    assert format_bytes(1536) == "1.5 KiB" and format_bytes(0) == "0 B" and format_bytes(5 * 2**30) == "5 GiB"
    assert format_formula(sympy.Integer(64)) == "64 B"
    assert format_formula(8192 * b * s + 64) == "8 KiB*batch*sequence + 64 B"
