"""Checkpointer: writers that are killed, and the run that goes on."""

import contextlib
import json
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import tedfx
from tedfx.saving.folder import Folder, Writer
from tests.module import killed_pretrain, toy
from tests.module.killed_pretrain import KILLED, SAVED, STOPPED
from tests.module.saving import make, step
from tests.pool import RankError


def test_killed_between_rename_and_name(tmp_path):
    """Renamed but not named: the one before is the latest, and the next of that name takes its place."""
    folder = Folder(tmp_path, 2)
    for name in ("step-00000001", "step-00000002"):
        folder.begin(name)
        (folder.temporary(name) / "x").write_text("whole")
        folder.end(name)
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000004.tmp").mkdir()
    assert [path.name for path in folder.find("auto")[0]] == ["step-00000002", "step-00000001"]
    folder.begin("step-00000003")
    folder.end("step-00000003")
    assert sorted(os.listdir(tmp_path)) == [
        "latest",
        "owner",
        "step-00000002",
        "step-00000003",
    ] and not os.listdir(tmp_path / "step-00000003")


def killed_while_saving(folder, told):
    """Step 1 is saved; while step 2 is written, rank 1 dies in the middle of its file. The line of rank 0
    goes to `told`."""
    pm, optimizer = make(mesh_name="tp2")
    checkpoints = tedfx.Checkpointer(folder, pm, optimizer)
    step(pm, optimizer, 0)
    checkpoints.save(1)
    step(pm, optimizer, 1)
    write = Writer.write_data

    def write_and_die(self, plan, planner):
        write(self, plan, planner)
        for path in self.path.glob("__1_*"):
            os.truncate(path, 1000)
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == 1:
        Writer.write_data = write_and_die
    checkpoints.save(2, asynchronous=True)
    start = time.monotonic()
    try:
        checkpoints.wait()
    except tedfx.CheckpointError as error:
        told.write_text(f"{error} after {time.monotonic() - start:.1f} s")


def after_the_kill(folder):
    pm, optimizer = make(seed=6, mesh_name="tp2")
    checkpoints = tedfx.Checkpointer(folder, pm, optimizer)
    assert checkpoints.load().step == 1
    loss = step(pm, optimizer, 1)
    checkpoints.save(2)
    return loss, sorted(os.listdir(folder))


def test_killed_while_saving(ranks, tmp_path, monkeypatch):
    folder, told = tmp_path / "run", tmp_path / "told"
    monkeypatch.setattr("tests.pool.GRACE", 60.0)  # for rank 0 to see it
    with pytest.raises(RankError, match="rank 1 of 2 failed .*\n.*died without a word"):
        ranks(2).run(killed_while_saving, folder, told)
    assert sorted(os.listdir(folder)) == ["latest", "owner", "step-00000001", "step-00000002.tmp"]
    assert told.read_text().startswith("save of step 2: a rank ended, or did not come in time")
    loss, names = ranks(2).run(after_the_kill, folder)[0]
    assert names == ["latest", "owner", "step-00000001", "step-00000002"]
    expected = toy.Mlp()
    optimizer = torch.optim.AdamW([p for p in expected.parameters() if p.requires_grad], lr=0.05)
    for number in (0, 1):
        wanted = expected(*toy.data(number))["loss"]
        optimizer.zero_grad()
        wanted.backward()
        optimizer.step()
    assert abs(loss / wanted.item() - 1) < 1e-12


PRETRAIN = (
    *("--mesh", "ep=2", "--batch-size", "4", "--sequence-length", "16", "--warmup", "2", "--steps", "50"),
    *("--eval-every", str(KILLED), "--eval-sequences", "4", "--no-check", "--check-capture", "none"),
    *("--save-every", str(SAVED), "--resume", "auto"),
    *("--set", "hidden_size=32", "head_dim=8", "intermediate_size=48"),
    *("num_hidden_layers=1", "num_local_experts=4"),
)


@pytest.mark.slow
def test_pretrain_restarts_and_stops(ranks, tmp_path):
    """A rank is killed at step 8: torchrun's agent starts all again, they go on from the checkpoint of step 5
    with the losses that they had. Then one rank is told to stop at step 9: all stop after it, with a
    checkpoint, one line and exit code 0."""
    ranks(2)  # its server of processes has everything imported
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=1,
        start_method="forkserver",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(tmp_path / "logs"), redirects=Std.ALL),
    )
    with handlers_put_back():
        elastic_launch(config, killed_pretrain.main)([*PRETRAIN, "--out", str(tmp_path)])
    said = "".join(log.read_text() for log in (tmp_path / "logs").glob("*/attempt_1/*/stdout.log"))
    checkpoints = tmp_path / "checkpoints"
    assert f"resumed from {checkpoints}/step-{SAVED:08d}, step {SAVED}\n" in said
    before, after = (losses_of(tmp_path / name) for name in ("first_life.jsonl", "log.jsonl"))
    assert list(before) == list(range(1, KILLED)) and list(after) == list(range(1, STOPPED + 1))
    assert all(abs(after[number] / loss - 1) < 1e-5 for number, loss in before.items()), (before, after)
    line = f"SIGTERM: stopped after step {STOPPED} of 50; saved to {checkpoints}: --resume auto goes on"
    assert said.splitlines().count(f"{line} from there") == 1, said
    assert (checkpoints / "latest").read_text().split() == [f"step-{STOPPED:08d}", f"step-{SAVED:08d}"]


@contextlib.contextmanager
def handlers_put_back():
    """The agent leaves handlers of its own."""
    before = {
        which: signal.getsignal(which)
        for which in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    }
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def losses_of(log):
    fields = [json.loads(line) for line in log.read_text().splitlines()]
    return {each["step"]: each["loss"] for each in fields if "loss" in each}
