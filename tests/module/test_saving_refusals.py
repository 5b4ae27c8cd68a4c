"""Checkpointer: what is not saved and what is not loaded, in one line and with nothing changed."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import tedfx
from tedfx.saving.checksums import sum_of, write_checksums
from tests.module import toy
from tests.module.saving import held, make, saved_toy, step
from tests.pool import pool


class Wider(toy.Mlp):
    def __init__(self):
        super().__init__()
        self.register_buffer("more", torch.zeros(3))


def spoil(path, how):
    """Change the checkpoint at `path`."""
    if how == "no metadata":
        os.remove(path / ".metadata")
    elif how == "torn metadata":
        (path / ".metadata").write_bytes((path / ".metadata").read_bytes()[:100])
    elif how == "no checksums":
        os.remove(path / "checksums.json")
    elif how == "short":
        with open(path / "__1_0.distcp", "r+b") as file:
            file.truncate(100)
    elif how == "gone":
        os.remove(path / "__0_0.distcp")
    elif how == "bit":
        data = bytearray((path / "__1_0.distcp").read_bytes())
        data[len(data) // 2] ^= 4
        (path / "__1_0.distcp").write_bytes(bytes(data))
    else:
        metadata = pickle.loads((path / ".metadata").read_bytes())
        entries = metadata.state_dict_metadata
        if how == "lost piece":
            entries["model.mlp.gate_up"].chunks.pop()
        elif how == "twice":
            entries["optimizer/mlp.down/exp_avg"].chunks[1] = entries["optimizer/mlp.down/exp_avg"].chunks[0]
        elif how == "plain":
            del entries["tedfx"]
        elif how == "dtype":
            entries["model.head"].properties.dtype = torch.float32
        elif how == "no moment":
            del entries["optimizer/scales.1.weight/exp_avg"]
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
        write_checksums(
            path, {file.name: sum_of(file) for file in path.iterdir() if file.name != "checksums.json"}
        )  # written so, not damaged since


def line_of(folder, how, run=None):
    """The line with which `load` ends; nothing may have changed. run: (pm, optimizer), made anew where
    missing."""
    kind = torch.optim.SGD if how == "optimizer" else torch.optim.AdamW
    model = Wider() if how == "model" else None
    pm, optimizer = run or make(seed=3, mesh_name="tp2", optimizer=kind, model=model)
    options = {
        "scheduler": {"scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer)},
        "extra": {"extra": {"draw": torch.Generator()}},
    }.get(how, {})
    step(pm, optimizer, 7)
    if how == "groups":
        optimizer.add_param_group({"params": [pm.frozen]})
    if how == "fewer":
        optimizer.param_groups[0]["params"].pop()
    if how == "options":
        optimizer.param_groups[0]["nesterov"] = True
    before, rng = held(pm, optimizer), pm.rng_state
    checkpoints = tedfx.Checkpointer(folder, pm, optimizer, **options)
    with pytest.raises(tedfx.CheckpointError) as error:
        checkpoints.load(folder if how == "nowhere" else "auto")
    assert all(torch.equal(a, b) for a, b in zip(held(pm, optimizer), before)) and pm.rng_state == rng
    return str(error.value)


def lines_of(folders):
    """{how: line}. What spoils the checkpoint is told to one run; what is another run, to that one."""
    one = make(seed=3, mesh_name="tp2")
    return {
        how: line_of(folder, how, one if how not in OTHER_RUNS else None) for how, folder in folders.items()
    }


OTHER_RUNS = ("optimizer", "model", "scheduler", "extra", "groups", "fewer", "options")
LINES = {
    "no metadata": "is damaged, has no .metadata: its writers did not finish; whole: step-00000001; load('",
    "torn metadata": "is damaged, .metadata has 100 of ",
    "short": "is damaged, __1_0.distcp has 100 of ",
    "gone": "is damaged, __0_0.distcp is not there; whole: step-00000001; load('",
    "bit": "is damaged, __1_0.distcp does not have the checksum with which it was written; whole: "
    "step-00000001; load('",
    "no checksums": "is damaged, checksums.json is not there; load another one",
    "lost piece": "pieces of model.mlp.gate_up (72 elements) do not tile its shape (16, 6): ",
    "twice": "pieces of optimizer/mlp.down/exp_avg (48 elements) do not tile its shape (6, 8): ",
    "plain": "was not written by a Checkpointer",
    "dtype": "is not of this model and optimizer: other dtypes model.head torch.float32, here torch.float64. "
    "Resume with",
    "no moment": "is not of this model and optimizer: it has no optimizer/scales.1.weight/exp_avg. "
    "Resume with",
    "optimizer": "the checkpoint is of the optimizer AdamW, this run has SGD: resume with the same optimizer",
    "model": "is not of this model and optimizer: it has no model.more. Resume with",
    "scheduler": "was saved without a learning-rate scheduler",
    "extra": "holds extra=[], this run has ['draw']",
    "groups": "the optimizer has 2 parameter groups, the checkpoint's has 1",
    "fewer": "parameter group 0 holds 4 parameters, the checkpoint's 6; they differ in ",
    "nowhere": "there is no checkpoint at ",
    "options": "parameter group 0 and the checkpoint's do not have the same options: nesterov",
}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """What two ranks say: {how: line} of each."""
    template, folders = tmp_path_factory.mktemp("template"), {}
    pool(2).run(saved_toy, template)
    for how in LINES:
        folders[how] = tmp_path_factory.mktemp("run") / "run"
        if how == "nowhere":
            continue
        shutil.copytree(template, folders[how])
        if how not in OTHER_RUNS:
            spoil(folders[how] / "step-00000002", how)
    return pool(2).run(lines_of, folders)


@pytest.mark.parametrize("how", LINES)
def test_refuses(lines, how):
    first, second = (each[how] for each in lines)
    assert first == second and LINES[how] in first and "\n" not in first, (first, second)


class Rows(torch.optim.SGD):
    """Keeps a state that is in no parameter's shape."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["row"] = torch.zeros(3)


def unsavable(folder):
    rank, lines = dist.get_rank(), []
    pm, optimizer = make(mesh_name="tp2", optimizer=Rows)
    step(pm, optimizer, 0)
    pm_2, adamw = make(mesh_name="tp2")
    other = torch.optim.AdamW([*pm.parameters(), nn.Parameter(torch.zeros(1))])
    blocked = Path(folder) / "file"
    if rank == 0:
        blocked.write_text("not a folder")
    for at, given, number in (
        (folder, optimizer, 1),
        (folder, other, 1),
        (blocked / "x", adamw, 1),
        (folder, adamw, rank),
    ):
        with pytest.raises(tedfx.CheckpointError) as error:
            tedfx.Checkpointer(at, pm_2 if given is adamw else pm, given).save(number)
        lines.append(str(error.value))
    with pytest.raises(tedfx.CheckpointError, match="keep=0"):
        tedfx.Checkpointer(folder, pm, adamw, keep=0)
    return lines


def test_refuses_to_save(ranks, tmp_path):
    state, foreign, place, steps = ranks(2).run(unsavable, tmp_path)[0]
    assert (
        "Rows keeps row of " in state
        and "of shape (3,), neither a number nor in the parameter's shape" in state
    )
    assert "AdamW holds a parameter that is not the module's" in foreign
    assert place.startswith("NotADirectoryError") and place.endswith("(rank 0, of 1 that failed)")
    assert steps == "ranks save different steps: rank 0 step 0, rank 1 step 1"
    assert not (tmp_path / "latest").exists()
