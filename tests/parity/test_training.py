"""What surrounds a step: frozen parameters, chosen outputs, other signatures and sizes, losses made outside,
micro-batches, dropout, replicas after many steps."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tedfx.verification.batches import split_batch
from tedfx.verification.errors import errors, relative
from tests.marks import slow, slow_but
from tests.parity import data
from tests.parity.cases import case, on_ranks, on_single, verified

ONE = {"num_hidden_layers": 1}
EP_TP = case("mixtral", "ep=2,tp=2")


def worst(actual, expected):
    found = errors(actual, expected)
    return max(found.items(), key=lambda item: item[1])


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def mine(pm, batch):
    return split_batch(batch, *pm.batch_coordinate)


# ---- frozen ------------------------------------------------------------------------------------------------


def frozen_gradients(pm, batch, rank):
    pm(**mine(pm, batch)).loss.backward()
    return sorted(n for n, p in pm.named_parameters() if p.requires_grad), sorted(pm.gather_gradients())


@pytest.mark.slow
def test_frozen_parameters_stay_frozen():
    frozen = dataclasses.replace(EP_TP, change="freeze")
    result = verified(frozen)
    assert result.ok, f"\n{result}"
    trainable, got = on_ranks(frozen, frozen_gradients)[0]
    assert (
        got == trainable
        and not any("norm" in n or "embed" in n for n in got)
        and "model.layers.1.mlp.experts.down_proj" in got
    )
    still = {p.name: p.parameter for p in result.parameters if "norm" in p.name or "embed" in p.name}
    assert still and set(still.values()) == {0.0}


# ---- outputs -----------------------------------------------------------------------------------------------


def logits_made(pm, batch, rank):
    """(loss, whether logits came out, the largest number of float elements of any tensor made in forward with
    a dim of the vocabulary)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    local, vocabulary, largest = mine(pm, batch), 64, 0
    tokens = local["input_ids"].numel()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if (
                isinstance(out, torch.Tensor)
                and out.is_floating_point()
                and out.dim()
                and out.shape[-1] == vocabulary
            ):
                largest = max(largest, out.numel())
            return out

    with Watch():
        out = pm(**local)
    out.loss.backward()
    return float(out.loss), out.logits is not None, largest >= tokens * vocabulary, pm.gather_gradients()


@pytest.mark.slow
def test_loss_alone_never_makes_the_full_logits():
    this = case("mixtral", "tp=2", overrides=ONE)
    full = on_ranks(this, logits_made)
    alone = on_ranks(this.asking(outputs=("loss",)), logits_made)
    assert all(has and made for _, has, made, _ in full)
    assert not any(has or made for _, has, made, _ in alone)
    assert relative(alone[0][0], full[0][0]) < 1e-6
    assert worst(alone[0][3], full[0][3])[1] < 1e-6


# ---- signatures and sizes ----------------------------------------------------------------------------------

CALLS = ((True, ("input_ids", "labels")), (False, ("input_ids",)), (False, ("input_ids", "labels")))


def several_signatures(pm, batch, rank):
    from tedfx import api

    def never(*args, **kwargs):
        raise AssertionError("traced again")

    api.trace = never
    local = mine(pm, batch)
    optimizer = torch.optim.SGD(pm.parameters(), lr=0.5)
    pm(**local).loss.backward()
    optimizer.step()
    pm.eval()
    with torch.no_grad():
        logits = pm(input_ids=local["input_ids"]).logits
        loss = float(pm(**local).loss)
    pm.train()
    longer = mine(pm, data.longer(_vocabulary_of_64()))
    optimizer.zero_grad()
    out = pm(**longer)
    out.loss.backward()
    return pm.batch_coordinate[0], logits, loss, float(out.loss), pm.gather_gradients(), len(pm.graphs)


class _vocabulary_of_64(torch.nn.Module):
    """What `data` needs to know of the model."""

    def forward(self, input_ids, labels=None): ...

    def get_input_embeddings(self):
        return torch.nn.Embedding(64, 1)


def several_calls(model, batch):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(**batch).loss.backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        logits, loss = model(input_ids=batch["input_ids"]).logits, float(model(**batch).loss)
    model.train()
    optimizer.zero_grad()
    out = model(**data.longer(_vocabulary_of_64()))
    out.loss.backward()
    return logits, loss, float(out.loss), gradients(model)


@pytest.mark.slow
def test_signatures_share_parameters_and_sizes_are_free():
    this = case("mixtral", "ep=2,tp=2", overrides=ONE, calls=CALLS)
    logits, loss, longer, grads = on_single(this, several_calls)
    for index, got_logits, got_loss, got_longer, got_grads, programs in on_ranks(this, several_signatures):
        expected = logits.chunk(2)[index]
        assert got_logits.shape == expected.shape
        assert (got_logits - expected).norm() / expected.norm() < 1e-6
        assert relative(got_loss, loss) < 1e-6 and relative(got_longer, longer) < 1e-6
        assert worst(got_grads, grads)[1] < 1e-5
        assert programs == 3


# ---- a loss made outside -----------------------------------------------------------------------------------


def outside(pm, batch, rank):
    local = mine(pm, batch)
    logits = pm(input_ids=local["input_ids"]).logits
    loss = F.cross_entropy(
        logits.flatten(0, 1).double(), local["labels"].flatten(), ignore_index=-100, reduction="sum"
    )
    loss.backward()
    return pm.batch_coordinate[0], float(loss), pm.gather_gradients()


def outside_single(model, batch):
    logits = model(input_ids=batch["input_ids"]).logits
    loss = F.cross_entropy(
        logits.flatten(0, 1).double(), batch["labels"].flatten(), ignore_index=-100, reduction="sum"
    )
    loss.backward()
    return float(loss), gradients(model)


@pytest.mark.parametrize("mesh", ["ep=2,tp=2", slow("dp=2")])
def test_a_loss_from_logits_gets_the_gradient_of_the_sum_of_local_losses(mesh):
    this = case("mixtral", mesh, overrides=ONE, calls=((True, ("input_ids",)),))
    total, expected = on_single(this, outside_single)
    results = on_ranks(this, outside)
    assert relative(sum({index: loss for index, loss, _ in results}.values()), total) < 1e-6
    for *_, grads in results:
        name, error = worst(grads, expected)
        assert error < 1e-5, name


# ---- micro-batches -----------------------------------------------------------------------------------------

COUNTED = ((True, ("input_ids", "labels", "num_items_in_batch")),)


def micro_batches(pm, batch, rank, split):
    losses, reduced = [], []
    local = mine(pm, batch)
    parts = [split_batch(local, i, split) for i in range(split)]
    with pm.no_sync():
        for part in parts[:-1]:
            losses.append(pm(**part).loss)
            losses[-1].backward()
            reduced.append(len(pm.reductions))
    losses.append(pm(**parts[-1]).loss)
    losses[-1].backward()
    return float(sum(losses)), pm.gather_gradients(), reduced, len(pm.reductions)


def large_batch(model, batch):
    loss = model(**batch).loss
    loss.backward()
    return float(loss), gradients(model)


@pytest.mark.parametrize("mesh", slow_but(["dp=2"], ["ep=2,tp=2", "dp=2"]))
def test_micro_batches_without_sync_equal_one_large_batch(mesh):
    # The auxiliary loss is a mean over the batch it sees, so it is left out: it does not add up.
    this = case(
        "mixtral", mesh, batch="counted", calls=COUNTED, overrides={"router_aux_loss_coef": 0.0} | ONE
    )
    loss, expected = on_single(this, large_batch)
    for total, grads, early, late in on_ranks(this, micro_batches, 2):
        assert relative(total, loss) < 1e-6
        name, error = worst(grads, expected)
        assert error < 1e-5, name
        assert early == [0] and late > 0


# ---- dropout -----------------------------------------------------------------------------------------------


def with_dropout(pm, batch, rank):
    local, state = mine(pm, batch), pm.rng_state
    out = pm(**local)
    out.loss.backward()
    grads = pm.gather_gradients()
    again = float(pm(**local).loss)  # other draws
    pm.rng_state = state
    return float(out.loss), grads, again, float(pm(**local).loss)


@pytest.mark.parametrize("model", slow_but([], ["llama", "mixtral"]))
def test_dropout_draws_do_not_depend_on_the_mesh(model):
    overrides = {"attention_dropout": 0.3} | ONE
    meshes = ["tp=1", "tp=2", "dp=2"] + ["ep=2"] * (model != "llama")
    loss, grads, again, replay = on_ranks(case(model, meshes[0], overrides=overrides), with_dropout)[0]
    assert relative(again, loss) > 1e-4, "the second forward has to draw anew"
    assert replay == loss
    for mesh in meshes[1:]:
        for other_loss, other_grads, other_again, other_replay in on_ranks(
            case(model, mesh, overrides=overrides), with_dropout
        ):
            assert relative(other_loss, loss) < 1e-6 and relative(other_again, again) < 1e-6, mesh
            assert other_replay == other_loss
            name, error = worst(other_grads, grads)
            assert error < 1e-5, (mesh, name)


@pytest.mark.slow
def test_dropout_inside_an_expert():
    """A row draws by the number of its assignment in the global batch: the same on any mesh, whatever rank it
    is sent to."""
    overrides = {"dropout": 0.3, "layers": 1}
    first = on_ranks(case("plain_test", "tp=1", overrides=overrides), with_dropout)[0]
    assert relative(first[2], first[0]) > 1e-5, "the second forward has to draw anew"
    for mesh, roles in (("tp=2", {}), ("ep=2,tp=2", {}), ("tp=2", {"expert": "tp"})):
        for loss, grads, _, replay in on_ranks(
            case("plain_test", mesh, overrides=overrides, roles=roles), with_dropout
        ):
            assert loss == replay
            assert relative(loss, first[0]) < 1e-6 and worst(grads, first[1])[1] < 1e-5, (mesh, roles)


@pytest.mark.slow
def test_dropout_draws_do_not_depend_on_how_tokens_are_cut():
    whole = dict(dedup=False, sequence_parallel=False)
    this = case("mixtral", "ep=2,tp=2", overrides={"attention_dropout": 0.3} | ONE, batch="odd", **whole)
    loss, grads, *_ = on_ranks(this, with_dropout)[0]
    other, other_grads, *_ = on_ranks(this.asking(dedup=None, sequence_parallel=None), with_dropout)[0]
    assert abs(other - loss) < 1e-6 * abs(loss) and worst(other_grads, grads)[1] < 1e-5


# ---- many steps --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_replicas_are_bitwise_equal_after_20_steps():
    result = verified(case("mixtral", "ep=2,tp=2", steps=20, overrides=ONE))
    assert result["replicas"].ok and result["loss"].ok, f"\n{result}"
    assert result["parameters"].error < 1e-3, f"\n{result}"
