"""Bad input gets one clear line that names the cause and the fix, before any collective runs; a failing rank
gets one as well."""

import os
import signal
import time

import pytest
import torch

import tedfx
from tedfx.errors import ConfigError
from tedfx.verification.batches import split_batch
from tedfx.verification.models import factory
from tedfx.verification.processes import RankFailure, _death
from tedfx.verification.verify import verify
from tests.marks import slow
from tests.parity.cases import case, on_ranks
from tests.parity.nursery import nursery

EP_TP = case("mixtral", "ep=2,tp=2", overrides={"num_hidden_layers": 1})


def attempt(model, mesh, kwargs, overrides):
    try:
        result = verify(
            factory(model, overrides) if isinstance(model, str) else model,
            mesh,
            **{"timeout": 100.0, "steps": 1, **kwargs},
        )
        return None, str(result), result.ok
    except tedfx.TedfxError as error:
        return type(error).__name__, str(error), False


def refused(kind, words, model, mesh, overrides=(), **kwargs):
    got, line, _ = nursery().call(attempt, model, mesh, kwargs, dict(overrides))
    assert got == kind, line
    assert "\n" not in line.strip() and len(line) < 600
    for word in words:
        assert word in line, line
    return line


# ---- the mesh and its roles --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mesh, kwargs, words",
    [
        ("dp=4", dict(batch=6), ["batch of 6", "dp=4", "multiple of 4", "8"]),
        ("dp=2,ep=2", dict(batch=2), ["batch of 2", "dp=2, ep=2", "multiple of 4"]),
        ("dp=2,xp=2", {}, ["'xp'", "roles="]),
        ("dp=2", dict(roles={"expert": ("tp",)}), ["expert", "'tp'", "('dp',)"]),
        ("dp=2", dict(roles={"experts": ("dp",)}), ["'experts'", "expert_tensor"]),
        ("dp=2,tp=2", dict(roles={"batch": ("dp", "tp")}), ["batch", "tensor", "'tp'", "disjoint"]),
        (
            "ep=2,tp=2",
            dict(roles={"expert": ("tp",), "expert_tensor": ("tp",)}),
            ["expert", "expert_tensor", "'tp'"],
        ),
        ("dp=2,pp=2", {}, ["'pp'", "not built yet"]),
        ("cp=2", {}, ["'cp'", "not built yet"]),
        ("dp=two", {}, ["dp=two", "axis=size"]),
        ("dp=2,dp=2", {}, ["'dp'", "twice"]),
        ("dp=2", dict(dtype=torch.int64), ["dtype", "float64"]),
    ],
    ids=lambda x: x.replace(",", "x") if isinstance(x, str) else "",
)
def test_meshes(mesh, kwargs, words):
    refused("ConfigError", words, "mixtral", mesh, {"num_hidden_layers": 1}, **kwargs)


def test_expert_axes_without_an_moe_layer():
    refused("CaptureError", ["no MoE layer", "'ep'"], "llama", "ep=2", {"num_hidden_layers": 1})


@pytest.mark.parametrize(
    "mesh, overrides",
    [
        slow("tp=2", {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 24, "head_dim": 8}),
        slow("tp=4", {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48, "head_dim": 8}),
        slow("tp=4", {"num_attention_heads": 4, "num_key_value_heads": 2}),
        slow("tp=4", {"num_attention_heads": 4, "num_key_value_heads": 1}),
        slow("tp=2", {"vocab_size": 63}),
        ("tp=2", {"intermediate_size": 47}),
        ("tp=4", {"hidden_size": 34}),
    ],
    ids=str,
)
def test_sizes_that_do_not_divide_are_right_or_refused(mesh, overrides):
    """Never wrong: padded, replicated, or refused with a line."""
    kind, line, ok = nursery().call(attempt, "llama", mesh, {}, {**overrides, "num_hidden_layers": 1})
    print(kind, line)
    assert ok or (
        kind == "ConfigError" and "\n" not in line and any(str(v) in line for v in overrides.values())
    ), line


# ---- the model ---------------------------------------------------------------------------------------------


class DataDependent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(16, 8)

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        if x.sum() > 0:  # the line that cannot be traced
            x = x * 2
        return x


class NoTokens(torch.nn.Linear):
    def __init__(self):
        super().__init__(4, 4)


def not_a_module():
    return {"a": 1}


def test_an_op_that_cannot_be_traced_names_the_users_line():
    with open(__file__) as source:
        number = next(i for i, text in enumerate(source, 1) if "the line that cannot be traced" in text)
    refused("TraceError", [f"{os.path.basename(__file__)}:{number}"], DataDependent, "dp=2")


def test_models_that_cannot_be_verified():
    refused("ConfigError", ["input_ids", "batch="], NoTokens, "dp=2")
    refused("ConfigError", ["dict", "torch.nn.Module"], not_a_module, "dp=2")
    refused("ConfigError", ["'mixtrul'", "mixtral"], "mixtrul", "dp=2")
    refused("ConfigError", ["hiden_size", "hidden_size"], "mixtral", "dp=2", {"hiden_size": 3})
    refused("ConfigError", ["nowhere:thing"], "nowhere:thing", "dp=2")


@pytest.mark.slow
def test_a_budget_is_for_the_rows_of_one_rank():
    # of the ranks where this process cannot fork any more
    with pytest.raises((ConfigError, RankFailure), match="at batch = 4, sequence = 12 a rank keeps at least"):
        verify(factory("mixtral"), "ep=2", checkpoint="budget=1", batch=8, device="cpu")


def old_release(model, mesh, kwargs, overrides):
    import transformers

    before, transformers.__version__ = transformers.__version__, "5.9.0"
    try:
        return attempt(model, mesh, kwargs, overrides)
    finally:
        transformers.__version__ = before


def test_a_release_of_transformers_that_mutates_routing():
    kind, line, _ = nursery().call(old_release, "mixtral", "dp=2", {}, {})
    assert kind == "ConfigError" and "5.9.0" in line and "5.8.0 to 5.10.0" in line


def plain_model(options):
    from tests import models

    model = models.MODELS["mixtral"]()
    try:
        tedfx.parallelize(model, *options)
    except Exception as error:
        return type(error).__name__, str(error)


class UnnamedMesh:
    mesh_dim_names = None


def test_a_mesh_without_names():
    kind, line = nursery().call(plain_model, (UnnamedMesh(),))
    assert kind == "ConfigError" and "mesh_dim_names" in line


# ---- calls -------------------------------------------------------------------------------------------------


def line_of(function):
    start = time.monotonic()
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return None, "", 0.0


def bad_calls(pm, batch, rank):
    local = split_batch(batch, *pm.batch_coordinate)
    ids = local["input_ids"]
    found = {
        "shapes": line_of(lambda: pm(**{k: v[:, : 6 + rank.index % 2] for k, v in local.items()})),
        "rows": line_of(lambda: pm(**{k: v[: 2 + rank.index // 2] for k, v in local.items()})),
        "signatures": line_of(lambda: pm(**(local if rank.index else {"input_ids": ids}))),
        "data": line_of(lambda: pm(input_ids=(ids + rank.index) % 64, labels=local["labels"])),
        "generate": line_of(lambda: pm.generate(ids)),
        "use_cache": line_of(lambda: pm(**local, use_cache=True)),
        "past_key_values": line_of(lambda: pm(**local, past_key_values=[ids])),
        "unknown argument": line_of(
            lambda: pm(ids, ids, ids, ids, ids, ids, ids, ids, ids, ids, ids, ids, ids)
        ),
    }
    loss = pm(**local).loss  # and after all that the module still works
    return found, float(loss)


def test_bad_calls_are_a_line_on_every_rank():
    results = on_ranks(EP_TP, bad_calls)
    expected = {
        "shapes": ["[4, 6]", "[4, 7]", "rank"],
        "rows": ["[2, 12]", "[3, 12]", "rank"],
        "signatures": ["labels", "rank"],
        "data": ["same batch coordinate", "batch_coordinate"],
        "generate": ["generate()", "gather_parameters"],
        "use_cache": ["use_cache", "gather_parameters"],
        "past_key_values": ["past_key_values", "gather_parameters"],
        "unknown argument": ["positional"],
    }
    for found, loss in results:
        assert loss == results[0][1]
        for name, words in expected.items():
            kind, line, seconds = found[name]
            assert kind is not None, f"{name} was accepted"
            assert "\n" not in line and all(word in line for word in words), (name, line)
            assert seconds < 30


def one_stays_away(pm, batch, rank):
    if rank.index == 2:
        time.sleep(12)
        return None
    return line_of(lambda: pm(**split_batch(batch, *pm.batch_coordinate)))


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named():
    results = nursery().call(_with_timeout, 4.0, one_stays_away)
    for rank, result in enumerate(results):
        if rank != 2:
            kind, line, seconds = result
            assert "rank 2 did not come" in line and seconds < 60, line  # not the group's minutes


def _with_timeout(seconds, body):
    from tests.parity import cases

    return cases._on_ranks(EP_TP.asking(check_timeout=seconds), body, ())


# ---- ranks that fail ---------------------------------------------------------------------------------------


def raises_on_one(rank):
    if rank == 1:
        raise ValueError("a text\nof two lines")


def dies_on_one(rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)


def killed_on_one(rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def hangs_on_one(rank):
    if rank == 1:
        time.sleep(1000)


@pytest.mark.parametrize(
    "before, timeout, words",
    [
        slow(raises_on_one, 60.0, ["rank 1", "ValueError: a text of two lines"]),
        (dies_on_one, 60.0, ["rank 1", "SIGSEGV"]),
        slow(killed_on_one, 60.0, ["rank 1", "died of SIGKILL"]),
        slow(hangs_on_one, 4.0, ["rank", "4 s"]),
    ],
    ids=["raises", "dies", "killed", "hangs"],
)
def test_a_failing_rank_is_one_line_and_no_hang(before, timeout, words):
    start = time.monotonic()
    refused("RankFailure", words, "llama", "tp=2", {"num_hidden_layers": 1}, before=before, timeout=timeout)
    assert time.monotonic() - start < 90


@pytest.mark.parametrize(
    "before, now, words",
    [
        (3, 4, ": the kernel was out of memory"),
        (3, 3, ": not for want of memory"),
        (None, 3, "; out of memory?"),
    ],
)
def test_who_ended_a_rank(before, now, words):
    assert _death(-signal.SIGKILL, before, now) == f"died of SIGKILL{words}"
    assert _death(-signal.SIGABRT, before, now) == "died of SIGABRT"
