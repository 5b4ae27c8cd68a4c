"""Mixtures with a capacity on every kind of mesh: which tokens are dropped is decided over the global batch,
as on a single device."""

import pytest

from tedfx.ops import count_collectives
from tedfx.verification.run import errors, relative, split_batch
from tests.parity.cases import case, on_ranks, on_single, verified

PPMOE = {"expert": "tp"}
FOLDED = {"expert": ("ep", "tp")}


def one(model, mesh, **options):
    return case(
        model,
        mesh,
        overrides={"layers": 1, **options.pop("overrides", {})},
        batch=options.pop("batch", "all_labels"),
        **options,
    )


CASES = [
    one("capacity_switch", "dp=2"),
    one("capacity_switch", "ep=2"),
    one("capacity_switch", "ep=2,tp=2"),
    *(one(f"capacity_{name}", "ep=2,tp=2") for name in ("signed", "compared", "selected")),
    one("capacity_switch", "tp=2", roles=PPMOE),
    one("capacity_gshard", "ep=2"),
    one("capacity_gshard", "tp=2"),
    one("capacity_gshard", "tp=2", roles=PPMOE),
    one("capacity_gshard", "dp=2,ep=2"),
    one("capacity_gshard", "ep=2,tp=2", roles=FOLDED),
]
# Dropped assignments are not sent: rows are lanes of tensor ranks, slices, owned; experts overflow, or have
# nothing to do.
TAILS = [
    one("capacity_gshard", "ep=2,tp=2", sequence_parallel=False),
    one("capacity_gshard", "ep=2,tp=2", sequence_parallel=False, dedup=False),
    one("capacity_gshard", "ep=2,tp=2", roles=FOLDED, sequence_parallel=False, dedup=False),
    one("capacity_gshard", "ep=2,tp=2", change="ties", batch="odd", steps=1),
    one("capacity_gshard", "ep=2,tp=2", change="one_expert"),
    one("capacity_gshard", "dp=2", change="ties", steps=1),
    one("capacity_gshard", "ep=2,tp=2", checkpoint="comm", steps=1),
    one("capacity_gshard", "ep=2,tp=2", checkpoint="full", steps=1, batch="odd"),
    one("capacity_gshard", "dp=2", checkpoint="full", steps=1),
    one("capacity_gshard", "dp=2,tp=2", roles=PPMOE),
]
# A capacity of each batch coordinate's own; the reference is `tests.parity.cases.by_chunk`.
LOCAL = [
    one("capacity_gshard", "dp=2", capacity="local"),
    one("capacity_gshard", "ep=2,tp=2", capacity="local"),
    one("capacity_gshard", "ep=2,tp=2", capacity="local", sequence_parallel=False, batch="odd"),
    one("capacity_gshard", "dp=2,ep=2", capacity="local", change="one_expert"),
    one("capacity_gshard", "ep=2", capacity="local", change="ties", steps=1),
    one("capacity_gshard", "ep=2,tp=2", capacity="local", checkpoint="comm", steps=1, batch="odd"),
    one("capacity_gshard", "ep=2", capacity="local", checkpoint="full", steps=1),
    one("capacity_switch", "ep=2,tp=2", capacity="local", batch="one_token_in_second_half"),
    one("capacity_compared", "ep=2,tp=2", capacity="local"),
    one(
        "capacity_switch", "tp=2", roles=PPMOE, capacity="local"
    ),  # one batch coordinate: the global function
]
# Rows in slots, where a group of tokens is whole on a rank: as most of the above, and a capacity per
# sequence.
SLOTS = [
    one("capacity_gshard", "ep=2,tp=2", capacity="local", sequence_parallel=False, dedup=False),
    one("capacity_gshard", "ep=2,tp=2", capacity="local", roles=FOLDED, batch="odd"),
    one("capacity_modules", "ep=2,tp=2", capacity="local", overrides={"expert": "normed"}),
    one("capacity_grouped", "ep=2,tp=2", batch="odd"),
    one("capacity_grouped", "ep=2,tp=2", roles={"expert_tensor": ()}, change="one_expert"),
    one("capacity_grouped", "dp=2,tp=2", roles=PPMOE, change="one_expert", checkpoint="comm", steps=1),
    one("capacity_grouped", "dp=2,ep=2", checkpoint="full", steps=1, change="ties"),
]


@pytest.mark.parametrize("case", [*CASES, *TAILS, *LOCAL, *SLOTS], ids=str)
def test_matches_the_single_device(case):
    result = verified(case)
    print(result)
    assert result.ok, f"\n{result}"


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


@pytest.mark.parametrize("change", ["", "ties"])
def test_only_what_is_kept_is_sent(change):
    this = one("capacity_gshard", "ep=2", change=change)
    ((total,), ranks) = on_single(this, kept), on_ranks(this, rows_sent)
    there, back, again, home = (sum(calls) for calls in zip(*ranks))
    assert there == back == again == home == total < 8 * 12 * 2


# ---- compiled ----------------------------------------------------------------------------------------------


def gradients(model, batch):
    loss = model(**batch).loss
    loss.backward()
    return float(loss), {name: p.grad.clone() for name, p in model.named_parameters()}


def gradients_compiled(pm, batch, rank):
    from torch._dynamo.utils import counters

    loss = pm(**split_batch(batch, *pm.batch_coordinate)).loss
    loss.backward()
    return float(loss.detach()), pm.gather_gradients(), sum(counters["graph_break"].values())


@pytest.mark.parametrize("model, mesh", [("gshard", "ep=2"), ("gshard", "dp=2"), ("grouped", "ep=2,tp=2")])
def test_compiles(model, mesh):
    this = one(f"capacity_{model}", mesh, compile="aot_eager", outputs=("loss",))
    expected, grads = on_single(this, gradients)
    for loss, got, breaks in on_ranks(this, gradients_compiled):
        assert breaks == 0 and relative(loss, expected) < 1e-6 and max(errors(got, grads).values()) < 1e-5
