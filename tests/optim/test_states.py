"""State in and out: round trips, other meshes and tiles, states before the first step, what does not fit."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from tedfx.optim import ShardedOptimizer
from tedfx.runtime.state_dict import StateError
from tedfx.state.pieces import PiecedTensor
from tests.marks import slow
from tests.module import toy
from tests.optim.training import (
    OPTIMIZERS,
    assert_replicas_equal,
    loss_of,
    module,
    parameters,
    sharded,
    single,
    train,
)


def full(value):
    return value.full_tensor() if isinstance(value, (DTensor, PiecedTensor)) else value


def whole(state_dict):
    """The state with full tensors."""
    state = {
        name: {key: full(value).clone() for key, value in entries.items()}
        for name, entries in state_dict["state"].items()
    }
    return {"state": state, "param_groups": state_dict["param_groups"]}


def resume(name, zero, other, dtype):
    """Two steps, state to another module (stage, tile, mesh), two more: as four steps on end."""
    first = module((2, 2), ("dp", "tp"), zero, dtype=dtype)
    optimizer = sharded(first, name, tile=7, max_norm=0.5)
    train(first, optimizer, 2)
    saved, weights = whole(optimizer.state_dict()), first.gather_parameters(buffers=True)
    aside = optimizer.state_dict()
    shape, names, stage, tile = other
    second = module(shape, names, stage, dtype=dtype)
    second.load_state_dict(weights)
    again = sharded(second, name, tile=tile, max_norm=0.5, lr=123.0)
    if (shape, names, stage) == ((2, 2), ("dp", "tp"), zero):
        again.load_state_dict(
            {
                "state": {
                    n: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in e.items()}
                    for n, e in aside["state"].items()
                },
                "param_groups": aside["param_groups"],
            }
        )
    else:
        again.load_state_dict(saved)
    assert again.param_groups[0]["lr"] == OPTIMIZERS[name][1]["lr"]
    for key, value in whole(again.state_dict())["state"].items():
        assert value.keys() == saved["state"][key].keys() and all(
            torch.equal(value[k], saved["state"][key][k]) for k in value
        ), key
    train(first, optimizer, 2, start=2)
    train(second, again, 2, start=2)
    assert toy.worst(second.gather_parameters(), first.gather_parameters()) < (
        1e-12 if dtype == torch.float64 else 2e-2
    )
    if dtype == torch.float64:
        assert toy.worst(second.gather_parameters(), parameters(single(name, 4)[0])) < 1e-12
    assert_replicas_equal(second)


@pytest.mark.parametrize(
    "other", [((2, 2), ("dp", "tp"), 2, 5), ((2, 2), ("dp", "ep"), 1, None), ((2, 2), ("tp", "dp"), 0, 100)]
)
@pytest.mark.parametrize("name", ["AdamW", slow("SGD"), slow("Adagrad")])
def test_state_goes_to_any_mesh(ranks, name, other):
    ranks(4).run(resume, name, 2, other, torch.float64)


def test_masters_go_along(ranks):
    ranks(4).run(resume, "AdamW", 1, ((2, 2), ("dp", "ep"), 2, 6), torch.bfloat16)


def created(name):
    """Created states have the shapes and first values of torch's, change no parameter, and no result."""
    pm = module((2, 2), ("dp", "tp"), 2)
    before = {n: p.clone() for n, p in pm.gather_parameters().items()}
    optimizer = sharded(pm, name, tile=7, max_norm=0.5)
    optimizer.create_state()
    assert all(torch.equal(p, before[n]) for n, p in pm.gather_parameters().items())
    cls, options = OPTIMIZERS[name]
    for layout, state in optimizer.named_state().items():
        assert ("step" not in state) or float(state["step"]) == 0
        for key, value in state.items():
            if key != "step":
                first = options.get("initial_accumulator_value", 0)
                assert value.placements == pm.placed[layout].share.placements and bool(
                    (value.to_local() == first).all()
                ), (layout, key)
    shapes = {
        (n, k): v.shape
        for n, state in optimizer.state_dict()["state"].items()
        for k, v in state.items()
        if k != "step"
    }
    optimizer.create_state()
    train(pm, optimizer, 3)
    assert shapes == {
        (n, k): v.shape
        for n, state in optimizer.state_dict()["state"].items()
        for k, v in state.items()
        if k != "step"
    }
    assert toy.worst(pm.gather_parameters(), parameters(single(name, 3)[0])) < 1e-12


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_created_states_change_nothing(ranks, name):
    ranks(4).run(created, name)


def through_named_state(path):
    """What a checkpoint does: states made, written in place, `states_changed()`; and
    torch.distributed.checkpoint on the user's names."""
    pm = module((2, 2), ("dp", "tp"), 2, dtype=torch.bfloat16)
    optimizer = sharded(pm, "AdamW", tile=7)
    train(pm, optimizer, 2)
    fresh = module((2, 2), ("dp", "tp"), 2, dtype=torch.bfloat16)
    other = sharded(fresh, "AdamW", tile=11, lr=9.0)
    other.create_state()
    source = optimizer.named_state()
    for name, state in other.named_state().items():
        assert state.keys() == source[name].keys() and "master" in state
        for key, value in state.items():
            (value.to_local() if isinstance(value, DTensor) else value).copy_(
                source[name][key].to_local() if isinstance(value, DTensor) else source[name][key]
            )
    other.states_changed()
    other.load_hyperparameters(optimizer.hyperparameters())
    assert all(
        torch.equal(a, b) for a, b in zip(pm.gather_parameters().values(), fresh.gather_parameters().values())
    )
    assert [h["names"] for h in other.hyperparameters()] == [h["names"] for h in optimizer.hyperparameters()]
    train(pm, optimizer, 2, start=2)
    train(fresh, other, 2, start=2)
    assert toy.worst(fresh.gather_parameters(), pm.gather_parameters()) < 2e-2
    assert all(float(tile.state["step"]) == 4 for share in other._shares.values() for tile in share.tiles)
    assert_replicas_equal(fresh)

    saved = whole(optimizer.state_dict())
    dcp.save({"optimizer": optimizer.state_dict()["state"]}, checkpoint_id=path)
    last_module = module((2, 2), ("dp", "ep"), 1, dtype=torch.bfloat16)
    last = sharded(last_module, "AdamW", tile=13)
    last.create_state()
    state = last.state_dict()
    dcp.load({"optimizer": state["state"]}, checkpoint_id=path)
    last.load_state_dict(state)
    found = whole(last.state_dict())["state"]
    assert all(
        torch.equal(found[n][k], saved["state"][n][k]) for n in saved["state"] for k in saved["state"][n]
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(pm.gather_parameters().values(), last_module.gather_parameters().values())
    )


def test_checkpoints(ranks, tmp_path):
    ranks(4).run(through_named_state, str(tmp_path / "checkpoint"))


def misfits():
    pm = module((2,), ("dp",), 1)
    optimizer = sharded(pm, "AdamW", tile=7, loss_scale=2.0)
    train(pm, optimizer, 1)
    good = whole(optimizer.state_dict())
    before = whole(optimizer.state_dict())
    weights = {n: p.clone() for n, p in pm.gather_parameters().items()}

    def changed(change):
        state = {n: dict(e) for n, e in good["state"].items()}
        groups = [dict(g) for g in good["param_groups"]]
        change(state, groups)
        return {"state": state, "param_groups": groups}

    for message, change in {
        "mlp.down has exp_avg, step, expected exp_avg, exp_avg_sq, step": lambda s, g: s["mlp.down"].pop(
            "exp_avg_sq"
        ),
        r"head has exp_avg, exp_avg_sq, more, step, expected": lambda s, g: s["head"].update(more=1),
        r"mlp.bias: exp_avg has shape \(5,\), expected \(6,\)": lambda s, g: s["mlp.bias"].update(
            exp_avg=torch.zeros(5)
        ),
        "unexpected parameter nobody": lambda s, g: s.update(nobody={}),
        "scales.1.weight has no state, but scales.0.weight, which is stacked with it, has": lambda s, g: (
            s.pop("scales.1.weight")
        ),
        "scales.0.weight and what is stacked with it differ in step": lambda s, g: s[
            "scales.1.weight"
        ].update(step=torch.tensor(7.0)),
        r"groups of \[5\] parameters, expected \[6\]": lambda s, g: g[0].update(params=g[0]["params"][1:]),
    }.items():
        with pytest.raises(StateError, match=message) as error:
            optimizer.load_state_dict(changed(change))
        assert "\n" not in str(error.value)
    now = whole(optimizer.state_dict())
    assert all(
        torch.equal(now["state"][n][k], before["state"][n][k]) for n in now["state"] for k in now["state"][n]
    )
    with pytest.raises(StateError, match="the optimizer's groups do not fit"):
        optimizer.load_hyperparameters([{"names": ["head"], "lr": 1.0}])
    with pytest.raises(StateError, match="had no loss scale, this one has one"):
        optimizer.load_scaler_state({})
    optimizer.load_scaler_state({"scale": 4.0, "good": 1, "skipped": 3})
    assert optimizer.loss_scale == 4 and optimizer.skipped == 3
    # a parameter without a saved state has none afterwards, and starts anew
    optimizer.load_state_dict(changed(lambda s, g: s.pop("head")))
    assert optimizer.named_state()["head"] == {} and pm.get_parameter("head") not in optimizer.state
    assert all(torch.equal(p, weights[n]) for n, p in pm.gather_parameters().items())
    train(pm, optimizer, 1, start=1)
    assert (
        float(optimizer.named_state()["head"]["step"]) == 1
        and float(optimizer.named_state()["mlp.bias"]["step"]) == 2
    )
    assert isinstance(optimizer, ShardedOptimizer) and loss_of(pm, 3) is not None


def test_what_does_not_fit(ranks):
    ranks(2).run(misfits)
