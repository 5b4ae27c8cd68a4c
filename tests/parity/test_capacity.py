"""Mixtures with a capacity on every kind of mesh: which tokens are dropped is decided over the global batch,
as on a single device."""

import functools
from collections import Counter

import pytest

from tedfx.ops import count_collectives
from tedfx.verification.batches import split_batch
from tests.marks import slow
from tests.models_scatter import LAYERS
from tests.parity.cases import case, on_ranks, on_single, verified
from tests.parity.pairwise import cover, pairs_of

MESHES = {
    "dp2": ("dp=2", {}),
    "ep2": ("ep=2", {}),
    "tp2": ("tp=2", {}),
    "dp2 ep2": ("dp=2,ep=2", {}),
    "ep2 tp2": ("ep=2,tp=2", {}),
    "tp2 ppmoe": ("tp=2", {"expert": "tp"}),
    "dp2 tp2 ppmoe": ("dp=2,tp=2", {"expert": "tp"}),
    "ep2 tp2 folded": ("ep=2,tp=2", {"expert": ("ep", "tp")}),
    "ep2 tp2 unsplit": ("ep=2,tp=2", {"expert_tensor": ()}),
}
CHOICES = {
    "model": ["switch", "gshard", "signed", "compared", "selected", "grouped", "modules"],
    "mesh": list(MESHES),
    # whose tokens ask for an expert's places: all, or those of each batch coordinate (tests/parity/cases.py,
    # `by_chunk`, is the reference). Slots where a group of tokens is whole on a rank, else rows with a tail.
    "capacity": ["global", "local"],
    "checkpoint": ["none", "comm", "full"],
    "dedup": [True, False],
    "sequence_parallel": [True, False],
    "algebra": [True, False],
    "routing": ["", "ties", "one_expert"],
    "batch": ["all_labels", "odd", "one_token_in_second_half"],
    "zero": [0, 3],
}


def allowed(row) -> bool:
    mesh = MESHES[row["mesh"]][0]
    return ("tp" in mesh or row["sequence_parallel"]) and (mesh != "tp=2" or not row["zero"])


ASPECTS = {name: (lambda row, name=name: row[name]) for name in CHOICES} | {
    "roles": lambda row: str(MESHES[row["mesh"]][1]),
    "data": lambda row: "dp" in row["mesh"] or "ep" in row["mesh"],
    "experts": lambda row: "ep" in row["mesh"],
    "once": lambda row: True,
}
SWITCHES = [name for name in CHOICES if name not in ("model", "mesh")]
PAIRS = [(a, b) for i, a in enumerate(SWITCHES) for b in SWITCHES[i + 1 :]]
DATA = ("routing", "batch")
FAST = [pair for pair in PAIRS if not {*pair} & {*DATA}] + [
    (what, "once") for what in ("model", "roles", "data", "experts", *DATA)
]
WANTED = [
    *PAIRS,
    ("mesh", "capacity"),
    ("model", "capacity"),
    *(("mesh", what) for what in ("routing", "sequence_parallel")),
    *(("model", what) for what in ("data", "experts", "routing")),
    ("roles", "checkpoint"),
]


@functools.cache
def rows():
    """Those of `make test` (every pair of switches, and each model, kind of roles, routing and batch once),
    the others, and the pairs that all of them cover."""
    fast, _ = cover(CHOICES, ASPECTS, FAST, allowed)
    more, pairs = cover(CHOICES, ASPECTS, WANTED, allowed, fast)
    return fast, more, pairs


def made(row):
    mesh, roles = MESHES[row["mesh"]]
    default = {"capacity": "global", "checkpoint": "none", "zero": 0}
    return case(
        f"capacity_{row['model']}",
        mesh,
        roles=roles,
        overrides={"layers": 1} | ({"expert": "normed"} if row["model"] == "modules" else {}),
        change=row["routing"],
        batch=row["batch"],
        # tied scores: after a step, rounding decides which expert is first
        steps=1 if row["routing"] == "ties" else 2,
        sharded={"tile": None},
        **{
            name: row[name]
            for name in ("capacity", "checkpoint", "zero", "dedup", "sequence_parallel", "algebra")
            if row[name] != default.get(name, True)
        },
    )


MORE = [
    slow(
        case(f"capacity_{name}", mesh, roles=roles, overrides={"layers": 1}, steps=2, sharded={"tile": None})
    )
    for name in ("marked", "from_one", "padded", "straight", "nested")
    for mesh, roles in (MESHES["ep2 tp2"], MESHES["dp2 ep2"], MESHES["tp2 ppmoe"])
]
MORE += [
    slow(case(f"capacity_{name}", mesh, overrides={"layers": 1}, steps=1, **options))
    for name in ("padded", "straight", "nested")
    for mesh, options in (
        ("ep=2", {"compile": "aot_eager"}),
        ("dp=2,ep=2", {"zero": 3, "batch": "odd", "change": "one_expert"}),
        ("ep=2,tp=2", {"change": "ties", "checkpoint": "full"}),
    )
]

MORE += [
    slow(case(f"capacity_{name}", mesh, overrides={"layers": 2, "tied": True}, steps=2))
    for name, mesh in (("modules", "ep=2,tp=2"), ("gshard", "dp=2,ep=2"), ("padded", "ep=2"))
]


ONE = {"layers": 1}
ADDRESSES = [
    case("scatter_kept", "ep=2,tp=2", overrides=ONE, steps=2, batch="one_token_in_second_half"),
    slow(case("scatter_kept", "ep=2", overrides=ONE, steps=1, compile="aot_eager")),
    slow(case("scatter_trash", "dp=2,ep=2", overrides=ONE, steps=2, capacity="local")),
    slow(
        case("scatter_added", "dp=2,tp=2", overrides=ONE, steps=2, capacity="local", roles={"expert": "tp"})
    ),
    slow(case("scatter_overflow", "ep=2,tp=2", overrides=ONE, steps=2, change="one_expert", zero=3)),
    slow(case("scatter_trash", "ep=2,tp=2", overrides=ONE, steps=1, change="ties", checkpoint="full")),
    *(
        slow(case(f"scatter_{name}", mesh, roles=roles, overrides=ONE, steps=2, batch="odd"))
        for name in LAYERS
        for mesh, roles in (MESHES["ep2 tp2"], MESHES["dp2 ep2"], MESHES["tp2 ppmoe"])
    ),
]


@pytest.mark.parametrize(
    "case", [*ADDRESSES, *map(made, rows()[0]), *(slow(made(row)) for row in rows()[1]), *MORE], ids=str
)
def test_matches_the_single_device(case):
    result = verified(case)
    print(result)
    assert result.ok, f"\n{result}"


def test_every_pair_is_there():
    fast, more, pairs = rows()
    assert set().union(*(pairs_of(row, ASPECTS, WANTED) for row in fast + more)) == pairs
    count = lambda a, b: len({pair for pair in pairs if (pair[0][0], pair[1][0]) == (a, b)})
    assert count("mesh", "capacity") == 2 * len(MESHES) and count("model", "routing") == 3 * 7


# ---- what is sent ------------------------------------------------------------------------------------------


def kept(model, batch):
    """How many assignments the model's own dispatch mask lets through."""
    from tests import models_capacity

    found, gating = [], models_capacity.top2gating

    def watched(logits, capacity):
        out = gating(logits, capacity)
        found.append(int(out[2].sum()))
        return out

    models_capacity.top2gating = watched
    try:
        model(**batch)
    finally:
        models_capacity.top2gating = gating
    return found


def rows_sent(pm, batch, rank):
    with count_collectives() as log:
        pm(**split_batch(batch, *pm.batch_coordinate)).loss.backward()
    return [c.shape[0] for c in log if c.op == "all_to_all"]


@pytest.mark.parametrize("change", ["", slow("ties")])
def test_only_what_is_kept_is_sent(change):
    this = case("capacity_gshard", "ep=2", overrides={"layers": 1}, batch="all_labels", change=change)
    ((total,), ranks) = on_single(this, kept), on_ranks(this, rows_sent)
    there, back, again, home = (sum(calls) for calls in zip(*ranks))
    assert there == back == again == home == total < 8 * 12 * 2


@pytest.mark.slow
def test_rows_at_addresses_travel_there_and_back():
    for log in on_ranks(case("scatter_trash", "ep=2", overrides={"layers": 1}), rows_sent_and_gathers):
        assert log == {("all_to_all", "forward"): 2, ("all_to_all", "backward"): 2, "counts": 1}


def rows_sent_and_gathers(pm, batch, rank):
    with count_collectives() as log:
        pm(**split_batch(batch, *pm.batch_coordinate)).loss.backward()
    rows = Counter((c.op, c.phase) for c in log if c.op == "all_to_all")
    gathers = [c for c in log if c.op == "all_gather" and c.phase == "forward" and c.axes == ("ep",)]
    # One more: the places of the global batch, whose running counts are numbers of each rank's tokens.
    return {**rows, "counts": len(gathers) - 1}
