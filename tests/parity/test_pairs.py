"""Models, meshes, savings, stages and batches: every pair of choices against the single device, in loss,
gradient norm, gradients, buffers, parameters after two steps, and replicas bit by bit.

`make test` has every pair of switches, and every model, mesh and batch once; `make test-slow` the pairs of
models, meshes and batches with each other and with the switches. The rows are made by
`tests/parity/pairwise.py`, so a new choice is one entry here. The full products are `make parity`. Labels are
spread unevenly over the ranks, and the router's auxiliary loss is on.
"""

import dataclasses
import functools

import pytest
import torch

from tests.marks import slow
from tests.parity.cases import case, on_single, verified
from tests.parity.pairwise import cover, pairs_of

PPMOE, FOLDED, UNSPLIT = {"expert": "tp"}, {"expert": ("ep", "tp")}, {"expert_tensor": ()}
MESHES = {
    "dp2": ("dp=2", {}),
    "tp2": ("tp=2", {}),
    "ep2": ("ep=2", {}),
    "tp4": ("tp=4", {}),
    "dp2 tp2": ("dp=2,tp=2", {}),
    "dp2 ep2": ("dp=2,ep=2", {}),
    "ep2 tp2": ("ep=2,tp=2", {}),
    "tp2 ep2": ("tp=2,ep=2", {}),  # another order of the axes
    "dp1 ep2 tp2": ("dp=1,ep=2,tp=2", {}),  # an axis of size 1
    "dp2 ep2 tp2": ("dp=2,ep=2,tp=2", {}),
    "tp2 ppmoe": ("tp=2", PPMOE),
    "ep2 tp2 folded": ("ep=2,tp=2", FOLDED),
    "ep2 tp2 unsplit": ("ep=2,tp=2", UNSPLIT),
}
ONE = {"num_hidden_layers": 1}
MODELS = {
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", ONE),
    "qwen2_moe": ("qwen2_moe", ONE),
    "olmoe": ("olmoe", ONE),
    "deepseek_v3": ("deepseek_v3", {}),  # a dense layer and one with experts
    "gpt_oss": ("gpt_oss", {}),  # a layer with a window and one without
    "llama": ("llama", ONE),
    "llama tied": ("llama", ONE | {"tie_word_embeddings": True}),
    "plain": ("plain", {"layers": 1}),
    "plain_boolean": ("plain_boolean", {"layers": 1}),
    "plain_stacked": ("plain_stacked", {"layers": 1}),
    "plain_normed": ("plain_normed", {"layers": 1}),
}
DENSE = ("llama", "llama tied")
CHOICES = {
    "model": list(MODELS),
    "mesh": list(MESHES),
    "zero": [0, 1, 2, 3],
    "checkpoint": ["none", "comm", "full", "selective"],
    "dedup": [True, False],
    "sequence_parallel": [True, False],
    "algebra": [True, False],
    "batch": [
        "uneven_labels",
        "odd",
        "shorter_than_ranks",
        "one_token",
        "one_token_in_second_half",
        "no_labels_in_second_half",
        "longer",
    ],
    # torch's own AdamW, or tedfx's: tiles of 500 elements, which cut parameters, or whole ones
    "optimizer": ["tiled", "whole", "torch"],
    "dtype": ["float64", "float32"],
}


def mesh_of(row):
    return MESHES[row["mesh"]]


def allowed(row) -> bool:
    mesh, roles = mesh_of(row)
    tensor, data = "tp" in mesh, any(axis in mesh for axis in ("dp=2", "ep=2"))
    plain = row["model"].startswith("plain")
    return (
        not (row["model"] in DENSE and (roles or "ep" in mesh))
        and (tensor or row["sequence_parallel"])  # off is what it is there
        and (data or not row["zero"])  # refused
        and (row["optimizer"] != "torch" or row["zero"] in (0, 3))  # refused
        # DTensor tries every placement on every axis: on three, a step of eight ranks costs it a minute.
        and (row["optimizer"] != "torch" or mesh.count("=") < 3)
        # Of equal tokens, or of two, the gradients of queries and keys cancel: in float32 they are noise.
        and (row["batch"] not in ("one_token", "shorter_than_ranks") or row["dtype"] == "float64")
        # An expert without tokens has no gradient in a loop over experts, and zeros here; two positions are
        # refused.
        and (row["batch"] not in ("one_token", "shorter_than_ranks") or not plain)
        and (row["dtype"] == "float64" or row["model"] in ("mixtral", "llama"))
        # gpt_oss has parts in float32, and Adam's first steps make of a gradient that is rounding a step
        and (row["batch"] != "odd" or row["model"] != "gpt_oss")
        # eight ranks take as long as four cases
        and (mesh.count("2") < 3 or row["model"] in ("deepseek_v3", "mixtral"))
    )


def axis(name):
    return lambda row: next((int(w[-1]) for w in mesh_of(row)[0].split(",") if w.startswith(name)), 1)


ASPECTS = {name: (lambda row, name=name: row[name]) for name in CHOICES} | {
    "dp": axis("dp"),
    "ep": axis("ep"),
    "tp": axis("tp"),
    "roles": lambda row: str(mesh_of(row)[1]),
    "once": lambda row: True,
    # what a model or a mesh can get wrong: shares of gradients, shares of parameters; recompute at all
    "stage": lambda row: ("whole", "shares", "shares", "gathered")[row["zero"]],
    "recompute": lambda row: row["checkpoint"] != "none",
    "tensor": lambda row: "tp" in mesh_of(row)[0],
    "experts on tp": lambda row: "tp" in mesh_of(row)[1].get("expert", ()),
}
SWITCHES = ["zero", "checkpoint", "dedup", "sequence_parallel", "algebra", "batch", "optimizer", "dtype"]
PAIRS = [(a, b) for i, a in enumerate(SWITCHES) for b in SWITCHES[i + 1 :]]
FAST = [
    *(pair for pair in PAIRS if "batch" not in pair),
    *((what, "once") for what in ("model", "mesh", "batch")),
]
WANTED = [
    *PAIRS,
    *(("mesh", what) for what in ("stage", "recompute", "dedup", "sequence_parallel", "algebra")),
    *((where, "checkpoint") for where in ("dp", "ep", "tp", "roles")),
    *((where, "batch") for where in ("dp", "ep", "tp", "experts on tp")),
    *(("model", what) for what in ("dp", "ep", "tensor", "experts on tp", "stage", "recompute")),
]


@functools.cache
def rows():
    """Those of `make test`, the others, and the pairs that all of them cover."""
    fast, _ = cover(CHOICES, ASPECTS, FAST, allowed)
    more, pairs = cover(CHOICES, ASPECTS, WANTED, allowed, fast)
    return fast, more, pairs


def made(row):
    model, overrides = MODELS[row["model"]]
    mesh, roles = mesh_of(row)
    return case(
        model,
        mesh,
        roles=roles,
        overrides=overrides,
        batch=row["batch"],
        dtype=row["dtype"],
        steps=2,
        sharded={"torch": None, "tiled": {"tile": 500}, "whole": {"tile": None}}[row["optimizer"]],
        **{
            name: row[name]
            for name in ("zero", "checkpoint", "dedup", "sequence_parallel", "algebra")
            if row[name] != {"zero": 0, "checkpoint": "none"}.get(name, True)
        },
    )


@pytest.mark.parametrize("this", [*map(made, rows()[0]), *(slow(made(row)) for row in rows()[1])], ids=str)
def test_matches_the_single_device(this):
    result = verified(this)
    print(result)
    assert result.ok, f"\n{result}"


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 3])
def test_torchs_adamw_on_three_axes(zero):
    result = verified(case("mixtral", "dp=2,ep=2,tp=2", overrides=ONE, steps=2, sharded=None, zero=zero))
    assert result.ok, f"\n{result}"


def test_every_pair_is_there():
    from tests.models import MODELS as every

    fast, more, pairs = rows()
    assert set().union(*(pairs_of(row, ASPECTS, WANTED) for row in fast + more)) == pairs
    assert {name for name, _ in MODELS.values()} >= set(every)
    # The pairs are counted by hand for two kinds, so that what is left out by `allowed` is what is meant.
    count = lambda a, b: len({pair for pair in pairs if (pair[0][0], pair[1][0]) == (a, b)})
    assert count("mesh", "stage") == len(MESHES) * 3 - 6 and count("zero", "batch") == 4 * 7  # 6: on tp alone
    assert count("model", "dp") == len(MODELS) * 2 and count("model", "ep") == len(MODELS) * 2 - len(DENSE)


# ---- uneven work: experts without tokens, ranks without rows -----------------------------------------------


def counts_by_half(model, batch):
    """Per experts module: assignments per expert of the first and of the second half of the rows."""
    found = []

    def note(module, args):
        halves = args[1].reshape(2, -1)
        found.append([torch.bincount(half, minlength=module.num_experts).tolist() for half in halves])

    for module in model.modules():
        if hasattr(module, "num_experts") and hasattr(module, "down_proj"):
            module.register_forward_pre_hook(note)
    model(**batch)
    return found


def test_the_batches_are_what_their_names_say():
    this = case("mixtral", "ep=2")
    first, second = on_single(dataclasses.replace(this, batch="one_token"), counts_by_half)[0]
    assert first == second and first.count(0) == 2
    assert first[:2] == [0, 0] or first[2:] == [0, 0], "one of two expert ranks shall have no rows at all"
    first, second = on_single(dataclasses.replace(this, batch="one_token_in_second_half"), counts_by_half)[0]
    assert 0 not in first and second.count(0) == 2
