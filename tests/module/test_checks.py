"""What is said when ranks disagree, or a call makes no sense."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tedfx.errors import ConfigError, TedfxError
from tedfx.ranks.call_check import CallCheck, checksums
from tedfx.ranks.failures import RanksDisagree
from tedfx.ranks.meeting import Meeting
from tests.module import toy
from tests.pool import context


def line_of(call, kind=RanksDisagree):
    with pytest.raises(kind) as error:
        call()
    return str(error.value)


def disagreements():
    rank = dist.get_rank()
    pm = toy.parallel(context((2, 2), ("dp", "tp")).device_mesh, check_timeout=20)
    x, labels = toy.shard(pm, *toy.data(0))
    lines = {}
    short = slice(0, 2 if rank == 3 else 4)
    lines["shapes"] = line_of(lambda: pm(x[short], labels[short]))
    lines["signature"] = line_of(lambda: pm(x, labels) if rank != 1 else pm(x))
    lines["mode"] = line_of(lambda: pm.train(rank > 1)(x, labels))
    pm.train()
    other = x.clone()
    other[0, 0] += 1e-9 * (rank == 2)
    lines["data"] = line_of(lambda: pm(other, labels))
    lines["rows"] = line_of(lambda: pm(x if rank != 2 else x.flip(0), labels))
    lines["scalar"] = line_of(lambda: pm(x, torch.tensor(1.5 + rank // 2)))
    pm(x, labels)["loss"].backward()  # and all is well after
    return lines


def test_disagreements(ranks):
    every = ranks(4).run(disagreements)
    assert every == [every[0]] * 4
    lines = every[0]
    assert all("\n" not in line for line in lines.values())
    assert (
        "ranks 0, 1, 2: forward(labels: float64[2], x: float64[2]) train with labels float64[4, 6]"
        in lines["shapes"]
    )
    assert "rank 3: forward" in lines["shapes"] and "x float64[2, 6]" in lines["shapes"]
    assert "rank 1: forward(x: float64[2]) train" in lines["signature"]
    assert "ranks 0, 1: " in lines["mode"] and " eval" in lines["mode"] and " train" in lines["mode"]
    for word in ("data", "rows"):
        assert lines[word].startswith(
            "ranks 2, 3 have the same batch coordinate but were given different data"
        )
        assert "batch_coordinate" in lines[word]
    assert "ranks 0, 1: labels=1.5; ranks 2, 3: labels=2.5" in lines["scalar"]


def unchecked():
    """check_inputs=False: nothing is compared; shapes may differ between ranks of a program that allows
    it."""
    pm = toy.parallel(context((2,), ("dp",)).device_mesh, check_inputs=False)
    x, _ = toy.shard(pm, *toy.data(0))
    return pm(x[: 1 + dist.get_rank()])["y"].shape[0]


def test_checks_can_be_switched_off(ranks):
    assert ranks(2).run(unchecked) == [1, 2]


def missing(seconds):
    mesh = context((4,), ("dp",)).device_mesh
    meeting = Meeting(mesh, timeout=seconds)
    check = CallCheck(meeting, ("dp",))
    check("forward()", {"x": torch.ones(2)})
    if dist.get_rank() == 2:
        time.sleep(seconds + 3)
        return None
    start = time.monotonic()
    line = line_of(lambda: check("forward()", {"x": torch.ones(2)}))
    return line, time.monotonic() - start


def test_rank_that_does_not_come(ranks):
    every = ranks(4).run(missing, 3.0)
    ranks(4).close()  # its groups are of no use any more
    for line, waited in (answer for answer in every if answer):
        assert "rank 2 did not come within 3 s while ranks 0, 1, 3 waited" in line and "\n" not in line
        assert 2.5 < waited < 60  # not the ten minutes of the group


def died():
    meeting = Meeting(context((2,), ("dp",)).device_mesh, timeout=20)
    check = CallCheck(meeting, ("dp",))
    check("forward()", {"x": torch.ones(2)})
    if dist.get_rank() == 1:
        os._exit(3)
    line = line_of(lambda: check("forward()", {"x": torch.ones(2)}))
    assert "a rank ended while this one waited" in line and "\n" not in line, line
    raise SystemError("the line was right")


def test_rank_that_ends(ranks):
    with pytest.raises(AssertionError) as error:
        ranks(2).run(died)
    assert "the line was right" in str(error.value) or "died without a word" in str(error.value)
    ranks(2).close()


def bad_calls():
    pm = toy.parallel(context((2,), ("dp",)).device_mesh)
    x, labels = toy.shard(pm, *toy.data(0))
    lines = [
        line_of(lambda: pm(x, use_cache=True), ConfigError),  # Mlp has no such argument
        line_of(lambda: pm(x, labels, labels), ConfigError),
        line_of(lambda: pm(x, x=x), ConfigError),
        line_of(lambda: pm(x, object()), ConfigError),
        line_of(lambda: pm(x.to("meta")), TedfxError),
        line_of(lambda: pm.graph, TedfxError),
        line_of(lambda: pm.generate(x), AttributeError),
        line_of(lambda: pm.state_dict(keep_vars=True), TedfxError),
    ]
    pm._var_keyword = True
    lines.append(line_of(lambda: pm(x, use_cache=True), TedfxError))
    lines.append(line_of(lambda: pm(x, past_key_values=[x]), TedfxError))
    pm(x=x, labels=None, use_cache=False)
    assert [str(s) for s in pm.graphs] == ["forward(x: float64[2]) train"] and pm.history == ["by hand"]
    with torch.no_grad():
        pm.eval()(x)
    assert [str(s) for s in pm.graphs][1:] == ["forward(x: float64[2]) eval no_grad"]
    assert pm.graph is list(pm.graphs.values())[1]
    assert pm.batch_coordinate == (dist.get_rank(), 2)
    return lines


def test_bad_calls(ranks):
    lines = ranks(2).run(bad_calls)[0]
    assert all("\n" not in line for line in lines)
    for line, word in zip(
        lines,
        [
            "no argument 'use_cache'",
            "takes 2 positional arguments",
            "'x' twice",
            "was given a object",
            "x is on meta",
            "call the module once",
            "gather_parameters",
            "keep_vars",
            "gather_parameters",
            "gather_parameters",
        ],
    ):
        assert word in line, line


def test_checksums():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (4, 8), generator=g)
    base = checksums({"a": ids, "b": ids + 1})
    assert base == checksums({"a": ids.clone(), "b": ids + 1})
    assert base != checksums({"a": ids + 1, "b": ids})  # exchanged
    assert base != checksums({"a": ids.flip(0), "b": ids + 1})
    assert base != checksums({"a": ids.t().reshape(4, 8), "b": ids + 1})
    for dtype in (torch.bool, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.uint8):
        one = checksums({"a": ids.to(dtype)})
        changed = ids.to(dtype).clone()
        changed[-1, -1] = changed[-1, -1] == 0
        assert one != checksums({"a": changed}), dtype
    scalars, data = checksums({"n": torch.tensor(3.5)})
    assert data == 0 and scalars != checksums({"n": torch.tensor(4.5)})[0]
    assert checksums({}) == (0, 0) and checksums({"a": torch.empty(0, 3)})[1] == 0
    large = torch.zeros(3 * 2**20 + 1)
    assert checksums({"a": large}) != checksums({"a": large + 1})


def signatures():
    """A program per signature; parameters are shared; seeds advance in training only and are equal on all
    ranks."""
    log = []
    pm = toy.parallel(context((2,), ("dp",)).device_mesh, log=log, number_inputs=["labels"])
    x, labels = toy.shard(pm, *toy.data(0))
    for _ in range(2):
        pm(x, labels), pm(x), pm(x[:1], labels[:1])
    pm.eval()
    pm(x)
    assert log == [
        "forward(labels: float64[2], x: float64[2]) train",
        "forward(x: float64[2]) train",
        "forward(x: float64[2]) eval",
    ]
    seeds = (pm.rng_state, pm._seed())
    pm.rng_state = (5, 7)
    assert pm.rng_state == (5, 7)
    numbers = pm._inputs((x, 3), {})[("labels",)]
    assert torch.is_tensor(numbers) and numbers.dtype == torch.int64
    return seeds


def test_signatures_and_seeds(ranks):
    first, second = ranks(2).run(signatures)
    assert first == second and first[0][1] == 6
    assert 0 <= first[1] < 2**63
