"""Recompute on ranks: what a step repeats, counted and as predicted. The numbers under each policy:
test_pairs."""

from collections import Counter

import pytest
import torch

from tedfx.analysis.communication import COUNTED
from tedfx.analysis.cost import Cost
from tedfx.ops import count_collectives, count_events
from tedfx.verification.batches import split_batch
from tedfx.verification.errors import errors, relative
from tests.marks import slow, slow_but
from tests.parity.cases import case, on_ranks, on_single

PPMOE = {"expert": "tp"}
ONE = {"num_hidden_layers": 1}

# ---- what a step repeats -----------------------------------------------------------------------------------


def counted(pm, batch, rank):
    """(collectives that ran, collectives predicted, routings and host copies, top-k calls in backward)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Choices(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Choices.found += func.name() in ("aten::topk", "aten::sort.stable", "aten::argsort.stable")
            return func(*args, **(kwargs or {}))

    local = split_batch(batch, *pm.batch_coordinate)
    with count_collectives() as log, count_events() as events:
        loss = pm(**local).loss
        with Choices():
            loss.backward()
    items = [i for i in Cost(next(reversed(pm.programs.values())).compilation).items if i.phase != "boundary"]
    ran = Counter((c.phase, COUNTED[c.op], c.axes) for c in log)
    return (
        ran,
        Counter((i.phase, i.op, i.axes) for i in items),
        Counter((e.phase, e.what) for e in events),
        Choices.found,
    )


@pytest.mark.parametrize("mesh, roles", [slow("ep=2,tp=2", {}), ("tp=2", PPMOE)], ids=["ep=2,tp=2", "ppmoe"])
def test_comm_repeats_nothing_that_communicates_or_decides(mesh, roles):
    this = case("mixtral", mesh, roles=roles, dtype="float32", overrides=ONE, checkpoint="comm")
    for ran, predicted, events, choices in on_ranks(this, counted):
        assert ran == predicted and not any(phase == "recompute" for phase, *_ in ran)
        assert events == {("forward", "route"): 1, ("forward", "host copy"): 1}
        assert choices == 0


def test_full_repeats_what_is_predicted():
    """Per MoE layer: both exchanges of rows, the exchange of counts, attention's sum. The sum that ends the
    layer comes after the last saved tensor, where recompute stops."""
    this = case("mixtral", "ep=2,tp=2", dtype="float32", overrides=ONE, checkpoint="full")
    for ran, predicted, *_ in on_ranks(this, counted):  # with tokens cut: the gathers as well
        assert ran == predicted
    for ran, predicted, events, choices in on_ranks(
        this.asking(dedup=False, sequence_parallel=False), counted
    ):
        assert ran == predicted
        again = {key[1:]: n for key, n in ran.items() if key[0] == "recompute"}
        assert again == {
            ("all_to_all_single", ("ep",)): 2,
            ("all_gather_into_tensor", ("ep",)): 1,
            ("all_reduce", ("tp",)): 1,
        }
        assert events == {
            (phase, what): 1 for phase in ("forward", "recompute") for what in ("route", "host copy")
        }
        assert choices > 0


# ---- draws and buffers -------------------------------------------------------------------------------------


def gradients_with_dropout(pm, batch, rank):
    assert pm.rng_state[1] == 0
    loss = pm(**split_batch(batch, *pm.batch_coordinate)).loss
    loss.backward()
    return float(loss.detach()), pm.gather_gradients()


@pytest.mark.parametrize(
    "model, mesh, overrides, policies",
    [
        slow("llama", "tp=2", {"attention_dropout": 0.3}, ["comm", "selective"]),
        slow("plain_test", "ep=2", {"dropout": 0.3}, ["comm", "full"]),
    ],
    ids=["attention", "experts"],
)
def test_recompute_draws_the_same_dropout(model, mesh, overrides, policies):
    results = {
        policy: on_ranks(case(model, mesh, overrides=overrides, checkpoint=policy), gradients_with_dropout)
        for policy in ("none", *policies)
    }
    for policy in policies:
        for (loss, got), (expected_loss, expected) in zip(results[policy], results["none"]):
            assert loss == expected_loss
            assert all(torch.equal(got[name], expected[name]) for name in expected), policy


def loads(module, batch):
    for _ in range(2):
        module.zero_grad()
        module(**batch).loss.backward()
    return {name: b.clone() for name, b in module.named_buffers()}


def loads_on_rank(pm, batch, rank):
    return loads(pm, split_batch(batch, *pm.batch_coordinate)), pm.gather_gradients()


def loads_on_single(model, batch):
    return loads(model, batch), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("policy", slow_but([], ["comm", "full"]))
def test_buffers_advance_once(policy):
    """A count of the tokens per expert, which routing reads: recompute neither advances it nor reads the
    advanced one."""
    this = case("plain_balanced", "ep=2,tp=2", checkpoint=policy)
    expected, grads = on_single(this, loads_on_single)
    assert (
        sum(float(b.sum()) for name, b in expected.items()) == 2 * 2 * 8 * 12 * 2
    )  # calls x layers x tokens x choices
    for found, got in on_ranks(this, loads_on_rank):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert max(errors(got, grads).values()) < 1e-5


# ---- compiled ----------------------------------------------------------------------------------------------


def compiled(pm, batch, rank):
    """(loss, gradients, graph breaks, names of the ops of the backward graphs)."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.utils import counters
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    backward = []

    def watch(module, inputs):
        backward.extend(str(n.target) for n in module.graph.nodes if n.op == "call_function")
        return make_boxed_func(module.forward)

    plain = lambda module, inputs: make_boxed_func(module.forward)
    backend = aot_autograd(
        fw_compiler=plain, bw_compiler=watch, partition_fn=min_cut_rematerialization_partition
    )
    pm._options = pm._programs.options = pm._options.replace(compile={"backend": backend})
    pm._programs.forget()
    loss = pm(**split_batch(batch, *pm.batch_coordinate)).loss
    loss.backward()
    return float(loss.detach()), pm.gather_gradients(), sum(counters["graph_break"].values()), backward


def loss_and_gradients(model, batch):
    loss = model(**batch).loss
    loss.backward()
    return float(loss), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.slow
def test_compiled_full_decides_once():
    """Compiled kernels may round otherwise when they recompute: a choice made again could differ from the
    rows that were exchanged by the first."""
    this = case(
        "mixtral",
        "ep=2",
        overrides={"num_hidden_layers": 1},
        outputs=("loss",),
        checkpoint="full",
        compile="aot_eager",
    )
    expected, grads = on_single(this, loss_and_gradients)
    for loss, got, breaks, backward in on_ranks(this, compiled):
        assert relative(loss, expected) < 1e-6 and max(errors(got, grads).values()) < 1e-5
        assert breaks == 0
        count = lambda word: sum(word in op for op in backward)  # noqa: B023, E731
        assert count("topk") == count("sort.") == 0
        assert (
            count("all_to_all_single") == 4 and count("_softmax") >= 1
        )  # the exchanges of rows and the router's scores are recomputed


@pytest.mark.slow
def test_compiled_comm_is_one_graph_that_repeats_no_collective():
    this = case("mixtral", "ep=2", overrides={"num_hidden_layers": 1}, outputs=("loss",), checkpoint="comm")
    expected, grads = on_single(this, loss_and_gradients)
    for loss, got, breaks, backward in on_ranks(this, compiled):
        assert relative(loss, expected) < 1e-6 and max(errors(got, grads).values()) < 1e-5
        assert breaks == 0
        count = lambda word: sum(word in op for op in backward)  # noqa: B023, E731
        assert (
            count("all_to_all_single") == 2 and count("all_gather") == 0
        )  # the adjoints of the rows' exchanges
        assert count("topk") == count("sort") == count("_local_scalar_dense") == 0
        assert count("silu") + count("sigmoid") >= 1 and count("_softmax") >= 1  # recompute is there
