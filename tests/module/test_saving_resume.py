"""Checkpointer: a run that is saved and resumed, on its own mesh and on others."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn

import tedfx
from tedfx.saving.folder import read_metadata, tiles
from tedfx.saving.host_copy import pieces_of
from tests.module import saving, toy
from tests.module.saving import MESHES, OPTIMIZERS, held, make, step


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


def losses_of(mesh_name, folder, first, last, save_at, resume=None, sizes=()):
    """Steps [first, last) of a run in which everything that a checkpoint holds matters. `resume`: what `load`
    is given."""
    mesh = saving.context(*MESHES[mesh_name]).device_mesh
    torch.manual_seed(5 if resume is None else 77 + dist.get_rank())  # a new process has another state
    pm = tedfx.parallelize(MoE(**dict(sizes)), mesh, check="none")
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
    for number in range(first, last):
        rows = torch.randint(32, (8, 9), generator=draw).chunk(count)[index]
        loss = pm(input_ids=rows[:, :-1], labels=rows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pm.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if number + 1 in save_at:
            checkpoints.save(number + 1, {"rows": 8 * (number + 1)}, asynchronous=True)
    checkpoints.wait()
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [{}, {"experts": 3}, {"experts": 3, "hidden": 23, "vocabulary": 33}], ids=str
)
def test_other_meshes_continue(ranks, tmp_path, sizes):
    """ep2 -> ep2 x tp2 -> tp2: the losses of the run that was never interrupted, dropout included."""
    whole = ranks(2).run(losses_of, "ep2", tmp_path, 0, 6, (2,), None, sizes)[0]
    parts = whole[:2]
    for first, mesh_name, world in ((2, "ep2 tp2", 4), (4, "tp2", 2)):
        found = ranks(world).run(
            losses_of, mesh_name, tmp_path, first, first + 2, (first + 2,), "auto", sizes
        )
        assert all(each == found[0] for each in found)
        parts += found[0]
    assert (tmp_path / "latest").read_text().split() == ["step-00000006", "step-00000004"]
    assert torch.allclose(torch.tensor(parts), torch.tensor(whole), rtol=1e-5, atol=0), (parts, whole)
    plain = MoE(**sizes)
    state = plain.state_dict()
    dcp.load(
        {"model": state}, checkpoint_id=tmp_path / "step-00000006", no_dist=True
    )  # the single device reads it as well
    plain.load_state_dict(state)


# ---- a toy without a compiler ----


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
        for name, placed in self.pm.placed.items():
            parameter = self.pm.get_parameter(name)
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


def test_pieces_are_those_of_the_state_dict(ranks):
    ranks(4).run(pieces_tile)


def pieces_tile():
    pm, _ = make()
    for name, entry in pm.state_dict().items():
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, [(offsets, tuple(piece.shape)) for offsets, piece in pieces_of(entry)])
        assert tiles(tuple(entry.shape), {box for boxes in every for box in boxes}), name


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
