"""benchmarks/memory.py at tiny sizes, on real tensors: what is measured is what the ledger and the formulas
say, and where it would not be, it shows."""

import functools
import importlib.util
import math
import sys
from pathlib import Path

import pytest

from tedfx.analysis import activations

_SPEC = importlib.util.spec_from_file_location(
    "benchmarks_memory", Path(__file__).parents[2] / "benchmarks" / "memory.py"
)
memory = sys.modules[_SPEC.name] = importlib.util.module_from_spec(_SPEC)  # dataclasses look their module up
_SPEC.loader.exec_module(memory)

GPT = memory.Shape("gpt", hidden=64, heads=8, sequence=32, batch=2)
MIXTRAL = memory.Shape(
    "mixtral", hidden=64, heads=8, kv_heads=4, inner=224, experts=4, top_k=2, sequence=32, batch=2
)
STATISTICS = 8 / GPT.hidden  # two norms' mean and scale per token: in no formula
SCORES = 5 * GPT.heads * GPT.sequence / GPT.hidden
MESHES = [("tp=1", False), ("tp=2", False), ("tp=2", True), ("tp=4", True)]


@functools.cache
def measured(policy, mesh="tp=1", sequence_parallel=False, shape=GPT, dedup=True, real=True):
    """(measured, ledger) in units of sbh."""
    return tuple(
        x / shape.unit for x in memory.per_layer(shape, policy, mesh, sequence_parallel, dedup, real)
    )


@pytest.mark.parametrize("policy", ["none", "selective", "comm", "full"])
@pytest.mark.parametrize("mesh, sequence_parallel", MESHES)
def test_the_ledger_is_within_a_tenth(mesh, sequence_parallel, policy):
    kept, ledger = measured(policy, mesh, sequence_parallel)
    assert abs(kept - ledger) < 0.1 * kept


def test_without_its_masks_the_ledger_is_not(monkeypatch):
    monkeypatch.setattr(activations, "hidden", lambda node, elements: 0)
    kept, ledger = measured.__wrapped__("none")
    assert abs(kept - ledger) > 0.1 * kept


@pytest.mark.parametrize("mesh", ["tp=1", "tp=2"])
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_tensor_parallelism_keeps_what_the_formula_says(mesh, policy):
    kept, _ = measured(policy, mesh)
    assert kept == pytest.approx(
        memory.megatron(GPT, policy, memory.degree(mesh), False) / GPT.unit, abs=STATISTICS
    )


@pytest.mark.parametrize("mesh, sequence_parallel", MESHES)
def test_policies(mesh, sequence_parallel):
    t = memory.degree(mesh)
    none, selective, full = (
        measured(policy, mesh, sequence_parallel)[0] for policy in ("none", "selective", "full")
    )
    assert none - selective == pytest.approx(SCORES / t)
    assert full == pytest.approx(2 / t if sequence_parallel else 2)
    if (
        sequence_parallel
    ):  # a t-th, beside the inputs of the two column-parallel linears, which are kept gathered
        assert selective - 4 * (1 - 1 / t) == pytest.approx(34 / t, abs=STATISTICS)


@pytest.mark.slow
def test_fake_tensors_keep_the_same():
    assert measured("selective", "tp=2", True, real=False) == measured("selective", "tp=2", True)
    for policy in ("none", "comm"):
        assert measured(policy, "ep=2,tp=2", shape=MIXTRAL, real=False) == measured(
            policy, "ep=2,tp=2", shape=MIXTRAL
        )


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel, dedup", [(False, False), (False, True), (True, True)])
def test_a_mixture(sequence_parallel, dedup):
    kept = {}
    for policy in ("none", "comm", "full"):
        kept[policy], ledger = measured(policy, "ep=2,tp=2", sequence_parallel, MIXTRAL, dedup)
        assert abs(kept[policy] - ledger) < 0.1 * kept[policy]
        # the router's results, index vectors, norms' scales and attention's log-sum-exp are in no formula:
        # some 110 bytes per token
        assert (
            0
            <= kept[policy] - memory.mixture(MIXTRAL, policy, 2, sequence_parallel, dedup) / MIXTRAL.unit
            < 120 / MIXTRAL.hidden
        )
    assert kept["full"] < kept["comm"] < kept["none"]
    if not sequence_parallel:
        assert kept["comm"] - kept["full"] < memory.ted(MIXTRAL, 2, dedup) / MIXTRAL.unit


@pytest.mark.parametrize("policy", ["none", "selective"])
def test_the_detail_adds_up(policy):
    program = memory.compiled(GPT, 2, "tp=2")
    memory.annotate(program, policy)
    listed = memory.detail(program, "blocks.0", real=True)
    assert math.fsum(s.bytes for s in listed) / GPT.unit == measured(policy, "tp=2", True)[0]
    masks = [s for s in listed if s.node.startswith("dropout") and s.dtype.itemsize == 1]
    assert len(masks) == {"none": 3, "selective": 2}[policy] and all(s.readers == [s.node] for s in masks)
