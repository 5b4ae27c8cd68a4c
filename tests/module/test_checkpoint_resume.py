"""Checkpointer: a run that is saved and resumed, on its own mesh and on others; writers that are killed; what
is refused."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn

import tedfx
from tedfx.saving.checkpoint import _pieces
from tedfx.saving.checksums import sum_of, write_checksums
from tedfx.saving.folder import Folder, read_metadata, tiles
from tests.module import toy
from tests.pool import context

ROOT = Path(__file__).parents[2]
MESHES = {
    "ep4": ((4,), ("ep",)),
    "ep2 tp2": ((2, 2), ("ep", "tp")),
    "dp2 tp2": ((2, 2), ("dp", "tp")),
    "tp2": ((2,), ("tp",)),
}


class MoE(nn.Module):
    """A looped mixture: gate and up fused and stacked, down one module per expert; a tied head, a dropout, a
    buffer that is saved."""

    def __init__(self, vocabulary=32, width=16, hidden=24, experts=4):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.router, self.norm = nn.Linear(width, experts, bias=False), nn.LayerNorm(width)
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * hidden, width) / 4)
        self.down = nn.ModuleList(nn.Linear(hidden, width) for _ in range(experts))
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, input_ids, labels):
        x = F.dropout(self.norm(self.embed(input_ids)).flatten(0, 1), 0.2, self.training)
        weights, ids = self.router(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for e, down in enumerate(self.down):
            token, slot = torch.where(ids == e)
            gate, up = F.linear(x[token], self.gate_up[e]).chunk(2, -1)
            out.index_add_(0, token, down(F.silu(gate) * up) * weights[token, slot, None])
        return F.cross_entropy(self.head(x + out * self.scale), labels.flatten())


def two_groups(parameters, **options):
    return [
        {"params": parameters[1::2], "lr": torch.tensor(3e-3) if options else 3e-3},
        {"params": parameters[::2]},
    ]


OPTIMIZERS = {
    "adamw": lambda parameters, lr: torch.optim.AdamW(two_groups(parameters), lr=lr),
    "sgd": lambda parameters, lr: torch.optim.SGD(two_groups(parameters), lr=lr, momentum=0.9, dampening=0.5),
    "tensor_lr": lambda parameters, lr: torch.optim.Adam(
        two_groups(parameters, tensor=True), lr=torch.tensor(lr), amsgrad=True, foreach=False
    ),
}


def losses_of(mesh_name, folder, first, last, save_at, resume=None):
    """Steps [first, last) of a run in which everything that a checkpoint holds matters. `resume`: what `load`
    is given."""
    shape, names = MESHES[mesh_name]
    mesh = context(shape, names).device_mesh
    torch.manual_seed(5 if resume is None else 77 + dist.get_rank())  # a new process has another state
    pm = tedfx.parallelize(MoE(), mesh)
    is_small = lambda name: "norm" in name or "router" in name
    groups = [
        {"params": [p for n, p in pm.named_parameters() if not is_small(n)], "weight_decay": 0.1},
        {"params": [p for n, p in pm.named_parameters() if is_small(n)], "lr": 3e-3},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 4))
    draw = torch.Generator().manual_seed(3 if resume is None else 99)
    checkpoints = tedfx.Checkpointer(folder, pm, optimizer, scheduler=scheduler, extra={"draw": draw})
    if resume is not None:
        resumed = checkpoints.load(resume)
        assert (resumed.step, resumed.position) == (first, {"rows": 8 * first})
    index, count = pm.batch_coordinate
    losses = []
    for step in range(first, last):
        rows = torch.randint(32, (8, 9), generator=draw).chunk(count)[index]
        loss = pm(input_ids=rows[:, :-1], labels=rows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pm.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step + 1 in save_at:
            checkpoints.save(step + 1, {"rows": 8 * (step + 1)}, asynchronous=True)
    checkpoints.wait()
    return losses


def test_other_meshes_continue(ranks, tmp_path):
    """ep4 -> ep2 x tp2 -> dp2 x tp2: the losses of the run that was never interrupted, dropout included."""
    whole = ranks(4).run(losses_of, "ep4", tmp_path, 0, 6, (2,))[0]
    parts = whole[:2]
    for first, mesh_name in ((2, "ep2 tp2"), (4, "dp2 tp2")):
        found = ranks(4).run(losses_of, mesh_name, tmp_path, first, first + 2, (first + 2,), "auto")
        assert all(each == found[0] for each in found)
        parts += found[0]
    assert (tmp_path / "latest").read_text().split() == ["step-00000006", "step-00000004"]
    assert torch.allclose(torch.tensor(parts), torch.tensor(whole), rtol=1e-5, atol=0), (parts, whole)
    plain = MoE()
    state = plain.state_dict()
    dcp.load(
        {"model": state}, checkpoint_id=tmp_path / "step-00000006", no_dist=True
    )  # the single device reads it as well
    plain.load_state_dict(state)


def held(pm, optimizer):
    """Every local number of a run, in order."""
    found = [p.to_local() for p in pm.parameters()] + list(pm.buffers())
    for p in pm.parameters():
        found += [
            v.to_local() if hasattr(v, "to_local") else torch.as_tensor(v)
            for _, v in sorted(optimizer.state.get(p, {}).items())
        ]
    return [t.detach().clone() for t in found]


# ---- a toy without a compiler: saves and folders -----------------------------------------------------------


def make(seed=0, mesh_name="dp2 tp2", optimizer=torch.optim.AdamW, model=None):
    shape, names = MESHES[mesh_name]
    pm = toy.parallel(context(shape, names).device_mesh, model, seed)
    return pm, optimizer([p for p in pm.parameters() if p.requires_grad], lr=0.05)


def step(pm, optimizer, number):
    x, labels = toy.shard(pm, *toy.data(number))
    loss = pm(x, labels=labels)["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def bitwise(folder, name, asynchronous):
    pm, optimizer = make(optimizer=OPTIMIZERS[name])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)
    checkpoints = tedfx.Checkpointer(folder, pm, optimizer, scheduler=schedule)
    for number in (0, 1):
        step(pm, optimizer, number)
        schedule.step()
    checkpoints.save(2, asynchronous=asynchronous)
    loss = step(pm, optimizer, 2)
    checkpoints.wait()
    pm_2, optimizer_2 = make(seed=3, optimizer=OPTIMIZERS[name])
    schedule_2 = torch.optim.lr_scheduler.StepLR(optimizer_2, 1, 0.7)
    assert tedfx.Checkpointer(folder, pm_2, optimizer_2, scheduler=schedule_2).load().step == 2
    assert step(pm_2, optimizer_2, 2) == loss and schedule.state_dict() == schedule_2.state_dict()
    ours, theirs = held(pm, optimizer), held(pm_2, optimizer_2)
    assert len(ours) == len(theirs) > len(list(pm.parameters())) + 2 and all(
        torch.equal(a, b) for a, b in zip(ours, theirs)
    )
    options = [
        [{k: v for k, v in group.items() if k != "params"} for group in each.param_groups]
        for each in (optimizer, optimizer_2)
    ]
    assert options[0] == options[1] and len(options[0]) == 2 and options[0][0]["lr"] != options[0][1]["lr"]


@pytest.mark.parametrize(
    "name,asynchronous", [("adamw", False), ("adamw", True), ("sgd", True), ("tensor_lr", False)]
)
def test_same_mesh_is_bitwise(ranks, tmp_path, name, asynchronous):
    ranks(4).run(bitwise, tmp_path, name, asynchronous)


class Own:
    """An optimizer that says its own state, as one does that shards it."""

    def __init__(self, pm, parameters):
        self.inner, self.pm, self.scale = torch.optim.AdamW(parameters, lr=0.05), pm, {"scale": 8.0}
        self.states = {}

    def create_state(self):
        for name, placed in self.pm._placed.items():
            parameter = self.pm._parameter(name)
            if parameter.requires_grad and name not in self.states:
                self.states[name] = {
                    "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                    "step": torch.tensor(0.0),
                    "count": 0,
                }

    def named_state(self):
        return self.states

    def states_changed(self):
        self.told = True

    def hyperparameters(self):
        return [{"names": list(self.states), "lr": self.inner.param_groups[0]["lr"]}]

    def load_hyperparameters(self, groups):
        self.inner.param_groups[0]["lr"] = groups[0]["lr"]

    def scaler_state(self):
        return dict(self.scale)

    def load_scaler_state(self, state):
        self.scale = dict(state)


def own_state(folder):
    pm, _ = make()
    own = Own(pm, list(pm.parameters()))
    own.create_state()
    for number, values in enumerate(own.states.values()):
        values["exp_avg"].to_local().copy_(
            torch.randn(values["exp_avg"].to_local().shape, generator=torch.Generator().manual_seed(number))
        )
        values["step"].fill_(3 + number)
        values["count"] = number
    own.inner.param_groups[0]["lr"], own.scale = 0.25, {"scale": 4.0}
    tedfx.Checkpointer(folder, pm, own).save(3)
    pm_2, _ = make(seed=2)
    other = Own(pm_2, list(pm_2.parameters()))
    other.create_state()
    tedfx.Checkpointer(folder, pm_2, other).load()
    assert other.told and other.scale == {"scale": 4.0} and other.inner.param_groups[0]["lr"] == 0.25
    for name, values in own.states.items():
        found = other.states[name]
        assert (
            torch.equal(found["exp_avg"].to_local(), values["exp_avg"].to_local())
            and found["step"] == values["step"]
            and found["count"] == values["count"]
        ), name


def test_an_optimizer_that_says_its_own_state(ranks, tmp_path):
    ranks(4).run(own_state, tmp_path)


def before_the_first_step(folder):
    """No state yet: it is saved and loaded as none, and the parameters are what they were."""
    pm, optimizer = make()
    before = held(pm, optimizer)
    checkpoints = tedfx.Checkpointer(folder, pm, optimizer)
    assert checkpoints.load() is None
    checkpoints.save(0)
    assert all(torch.equal(a, b) for a, b in zip(held(pm, optimizer), before)) and not optimizer.state
    pm_2, optimizer_2 = make(seed=4)
    step(pm_2, optimizer_2, 5)  # its state goes
    assert tedfx.Checkpointer(folder, pm_2, optimizer_2).load().step == 0
    assert not optimizer_2.state and all(torch.equal(a, b) for a, b in zip(held(pm_2, optimizer_2), before))


def test_before_the_first_step(ranks, tmp_path):
    ranks(4).run(before_the_first_step, tmp_path)


def overlapping(folder):
    """An asynchronous save has the values of its moment; the next one joins it; `keep` are kept, and a step
    saved twice has two names."""
    pm, optimizer = make()
    checkpoints = tedfx.Checkpointer(folder, pm, optimizer, keep=2)
    moments = {}
    for number in (1, 2, 3):
        step(pm, optimizer, number)
        moments[number] = held(pm, optimizer)
        checkpoints.save(number, asynchronous=True)
    step(pm, optimizer, 4)
    checkpoints.wait()
    names = sorted(os.listdir(folder))
    checkpoints.load(Path(folder) / "step-00000002")
    assert all(torch.equal(a, b) for a, b in zip(held(pm, optimizer), moments[2]))
    step(pm, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(held(pm, optimizer), moments[3]))
    checkpoints.save(3)
    assert checkpoints.load().path.name == "step-00000003-2"
    return names, sorted(os.listdir(folder))


def test_asynchronous_saves(ranks, tmp_path):
    first, second = ranks(4).run(overlapping, tmp_path)[0]
    assert first == ["latest", "owner", "step-00000002", "step-00000003"]
    assert second == ["latest", "owner", "step-00000003", "step-00000003-2"]


def replicas_once(folder):
    pm, optimizer = make()
    step(pm, optimizer, 0)
    tedfx.Checkpointer(folder, pm, optimizer).save(1)
    metadata = read_metadata(Path(folder) / "step-00000001")
    return sum(
        torch.Size(c.sizes).numel()
        for k, e in metadata.state_dict_metadata.items()
        if hasattr(e, "chunks")
        for c in e.chunks
    ), sorted(metadata.state_dict_metadata)


def test_every_number_is_written_once(ranks, tmp_path):
    written, keys = ranks(4).run(replicas_once, tmp_path)[0]
    model = toy.Mlp()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert written == sum(t.numel() for t in model.state_dict().values()) + 2 * trained
    assert (
        "optimizer/scales.1.weight/exp_avg" in keys
        and "optimizer/mlp.gate_up/exp_avg_sq" in keys
        and "tedfx" in keys
        and not any("*" in k for k in keys)
    )


# ---- refused, with nothing changed -------------------------------------------------------------------------


class Wider(toy.Mlp):
    def __init__(self):
        super().__init__()
        self.register_buffer("more", torch.zeros(3))


def saved_toy(folder):
    pm, optimizer = make()
    step(pm, optimizer, 0)
    checkpoints = tedfx.Checkpointer(folder, pm, optimizer)
    checkpoints.save(1)
    step(pm, optimizer, 1)
    checkpoints.save(2)


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
        os.remove(path / "__2_0.distcp")
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


def refused(folder, how, path="auto"):
    """The line with which `load` ends; nothing may have changed."""
    kind = torch.optim.SGD if how == "optimizer" else torch.optim.AdamW
    pm, optimizer = make(seed=3, optimizer=kind, model=Wider() if how == "model" else None)
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
        checkpoints.load(path)
    assert all(torch.equal(a, b) for a, b in zip(held(pm, optimizer), before)) and pm.rng_state == rng
    return str(error.value)


LINES = {
    "no metadata": "is damaged, has no .metadata: its writers did not finish; whole: step-00000001; load('",
    "torn metadata": "is damaged, .metadata has 100 of ",
    "short": "is damaged, __1_0.distcp has 100 of ",
    "gone": "is damaged, __2_0.distcp is not there; whole: step-00000001; load('",
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
    "options": "parameter group 0 and the checkpoint's do not have the same options: nesterov",
}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    from tests.pool import pool

    folder = tmp_path_factory.mktemp("template")
    pool(4).run(saved_toy, folder)
    return folder


@pytest.mark.parametrize("how", LINES)
def test_refuses(ranks, template, tmp_path, how):
    shutil.copytree(template, tmp_path / "run")
    if how not in ("optimizer", "model", "scheduler", "extra", "groups", "fewer", "options"):
        spoil(tmp_path / "run" / "step-00000002", how)
    lines = ranks(4).run(refused, tmp_path / "run", how)
    assert len(set(lines)) == 1 and LINES[how] in lines[0] and "\n" not in lines[0], lines


def test_refuses_what_is_not_there(ranks, tmp_path):
    lines = ranks(4).run(refused, tmp_path, "path", tmp_path / "nowhere")
    assert len(set(lines)) == 1 and lines[0].startswith(f"there is no checkpoint at {tmp_path / 'nowhere'}")


class Rows(torch.optim.SGD):
    """Keeps a state that is in no parameter's shape."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["row"] = torch.zeros(3)


def unsavable(folder):
    rank, lines = dist.get_rank(), []
    pm, optimizer = make(optimizer=Rows)
    step(pm, optimizer, 0)
    pm_2, adamw = make()
    other = torch.optim.AdamW([*pm.parameters(), nn.Parameter(torch.zeros(1))])
    blocked = Path(folder) / "file"
    if rank == 0:
        blocked.write_text("not a folder")
    for at, given, number in (
        (folder, optimizer, 1),
        (folder, other, 1),
        (blocked / "x", adamw, 1),
        (folder, adamw, rank // 2),
    ):
        with pytest.raises(tedfx.CheckpointError) as error:
            tedfx.Checkpointer(at, pm_2 if given is adamw else pm, given).save(number)
        lines.append(str(error.value))
    with pytest.raises(tedfx.CheckpointError, match="keep=0"):
        tedfx.Checkpointer(folder, pm, adamw, keep=0)
    return lines


def test_refuses_to_save(ranks, tmp_path):
    state, foreign, place, steps = ranks(4).run(unsavable, tmp_path)[0]
    assert (
        "Rows keeps row of " in state
        and "of shape (3,), neither a number nor in the parameter's shape" in state
    )
    assert "AdamW holds a parameter that is not the module's" in foreign
    assert place.startswith("NotADirectoryError") and place.endswith("(rank 0, of 1 that failed)")
    assert steps == "ranks save different steps: rank 0 step 0, rank 1 step 0, rank 2 step 1, rank 3 step 1"
    assert not (tmp_path / "latest").exists()


@pytest.mark.parametrize(
    "shape,boxes,fine",
    [
        ((4, 6), [((0, 0), (4, 6))], True),
        ((4, 6), [((0, 0), (4, 2)), ((0, 2), (1, 4)), ((1, 2), (3, 4))], True),
        ((4, 6), [((0, 0), (4, 2))], False),
        ((4, 6), [((0, 0), (4, 6)), ((0, 0), (1, 1))], False),
        ((4, 6), [((0, 0), (2, 6)), ((1, 0), (2, 6))], False),
        ((4, 6), [((0, 0), (2, 6)), ((3, 0), (2, 6))], False),
        ((4, 6), [((0, 0), (4, 6)), ((2, 0), (0, 6))], True),
        ((), [((), ())], True),
        ((), [], False),
        ((), [((), ()), ((), ())], False),
        ((0, 3), [], True),
        ((4,), [((0, 0), (4, 1))], False),
    ],
)
def test_tiles(shape, boxes, fine):
    assert tiles(shape, boxes) is fine


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


# ---- killed ------------------------------------------------------------------------------------------------


def torchrun(*args, ranks_count, restarts=0, **environment):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": "lo",
        **environment,
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks_count),
        "--max-restarts",
        str(restarts),
        *args,
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


def killed_while_saving(folder):
    """What each rank of the job below runs: step 1 is saved; while step 2 is written, rank 1 dies in the
    middle of its file."""
    from torch.distributed.device_mesh import init_device_mesh

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the other rank: let it say what it saw
    dist.init_process_group("gloo")
    pm = toy.parallel(init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    optimizer = torch.optim.AdamW([p for p in pm.parameters() if p.requires_grad], lr=0.05)
    checkpoints = tedfx.Checkpointer(folder, pm, optimizer)
    step(pm, optimizer, 0)
    checkpoints.save(1)
    step(pm, optimizer, 1)
    from tedfx.saving.folder import Writer

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
        print(f"LINE {error} AFTER {time.monotonic() - start:.1f}", flush=True)


def after_the_kill(folder):
    pm, optimizer = make(seed=6, mesh_name="tp2")
    checkpoints = tedfx.Checkpointer(folder, pm, optimizer)
    assert checkpoints.load().step == 1
    loss = step(pm, optimizer, 1)
    checkpoints.save(2)
    return loss, sorted(os.listdir(folder))


def test_killed_while_saving(ranks, tmp_path):
    result = torchrun("-m", "tests.module.test_checkpoint_resume", str(tmp_path), ranks_count=2)
    assert result.returncode != 0
    assert sorted(os.listdir(tmp_path)) == ["latest", "owner", "step-00000001", "step-00000002.tmp"], (
        result.stderr[-2000:]
    )
    assert "LINE save of step 2: a rank ended, or did not come in time" in result.stdout, (
        result.stdout + result.stderr[-2000:]
    )
    loss, names = ranks(2).run(after_the_kill, tmp_path)[0]
    assert names == ["latest", "owner", "step-00000001", "step-00000002"]
    expected = toy.Mlp()
    optimizer = torch.optim.AdamW([p for p in expected.parameters() if p.requires_grad], lr=0.05)
    for number in (0, 1):
        wanted = expected(*toy.data(number))["loss"]
        optimizer.zero_grad()
        wanted.backward()
        optimizer.step()
    assert abs(loss / wanted.item() - 1) < 1e-12


TINY = (
    "--mesh",
    "ep=2",
    "--batch-size",
    "4",
    "--sequence-length",
    "16",
    "--eval-sequences",
    "4",
    "--warmup",
    "2",
    "--set",
    "hidden_size=32",
    "head_dim=8",
    "intermediate_size=48",
    "num_hidden_layers=1",
    "num_local_experts=4",
)


def test_pretrain_restarts(tmp_path):
    """A rank is killed at step 12 of 14: torchrun starts all again, they go on from step 10, and the losses
    are those of an undisturbed run."""
    logs = {}
    for name, at, more in (
        ("whole", "0", ("--no-check",)),
        ("killed", "12", ("--save-every", "5", "--resume", "auto")),
    ):
        result = torchrun(
            "-m",
            "tests.module.killed_pretrain",
            *TINY,
            "--steps",
            "14",
            "--out",
            str(tmp_path / name),
            *more,
            ranks_count=2,
            restarts=1,
            KILL_AT=at,
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
        logs[name] = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert ("resumed from" in result.stdout) == (name == "killed") and (
            name == "whole" or "step-00000010, step 10" in result.stdout
        )
    losses = {
        name: {fields["step"]: fields["loss"] for fields in log if "loss" in fields}
        for name, log in logs.items()
    }
    assert list(losses["killed"]) == list(losses["whole"]) == list(range(1, 15))
    assert all(abs(losses["killed"][step] / loss - 1) < 1e-5 for step, loss in losses["whole"].items()), (
        losses
    )
    assert (tmp_path / "killed" / "checkpoints" / "latest").read_text().split() == [
        "step-00000014",
        "step-00000010",
    ]


def test_pretrain_stops_on_sigterm(tmp_path):
    """One rank is told to stop in step 3: all stop after it, with a checkpoint, one line and exit code 0."""
    options = (*TINY, "--steps", "50", "--out", str(tmp_path), "--no-check", "--save-every", "20")
    result = torchrun(
        "-m", "tests.module.killed_pretrain", *options, ranks_count=2, KILL_AT="3", KILL_WITH="SIGTERM"
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    line = (
        f"SIGTERM: stopped after step 3 of 50; saved to {tmp_path / 'checkpoints'}: --resume auto goes "
        "on from there"
    )
    assert result.stdout.splitlines().count(line) == 1, result.stdout
    assert (tmp_path / "checkpoints" / "latest").read_text().split() == ["step-00000003"]


def test_pieces_are_those_of_the_state_dict(ranks):
    ranks(4).run(pieces_tile)


def pieces_tile():
    pm, _ = make()
    for name, entry in pm.state_dict().items():
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, [(offsets, tuple(piece.shape)) for offsets, piece in _pieces(entry)])
        assert tiles(tuple(entry.shape), {box for boxes in every for box in boxes}), name


if __name__ == "__main__":
    killed_while_saving(sys.argv[1])
