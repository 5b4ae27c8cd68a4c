"""What users of torch.optim expect: groups, schedulers, missing gradients, clipping by hand, refusals."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tedfx.errors import ConfigError, TedfxError
from tedfx.optim import LossScale, ShardedOptimizer
from tests.module import toy
from tests.optim.training import assert_replicas_equal, loss_of, module, parameters, sharded, single, train


def split_groups(named):
    first = [p for n, p in named.items() if "scales" in n or n == "head"]
    rest = [p for p in named.values() if not any(p is q for q in first)]
    return [dict(params=first, lr=0.2, weight_decay=0.0), dict(params=rest)]


def halve(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.5**step, lambda step: 1 / (1 + step)])


def groups_and_schedule(zero):
    model, norms = single("AdamW", 4, groups=split_groups, schedule=halve)
    pm = module((2, 2), ("dp", "tp"), zero)
    groups = split_groups(dict(pm.named_parameters()))
    optimizer = ShardedOptimizer(groups[:1], torch.optim.AdamW, module=pm, lr=0.05, tile=10, max_norm=0.5)
    optimizer.add_param_group(groups[1])
    assert (
        isinstance(optimizer, torch.optim.Optimizer)
        and optimizer.param_groups[1]["params"][0] is groups[1]["params"][0]
    )
    scheduler = halve(optimizer)
    for step in range(4):
        train(pm, optimizer, 1, start=step)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.2 * 0.5**4
    assert toy.worst(pm.gather_parameters(), parameters(model)) < 1e-12


@pytest.mark.parametrize("zero", [0, 2])
def test_two_groups_and_a_schedule(ranks, zero):
    ranks(4).run(groups_and_schedule, zero)


def no_gradient(zero):
    """`head` is used in the first and third step only: its state and its step count stand still, as in
    torch."""
    model = toy.Mlp()
    reference = torch.optim.AdamW(model.parameters(), lr=0.05)
    pm = module((2, 2), ("dp", "ep"), zero, bucket_bytes=150)
    optimizer = sharded(pm, "AdamW", tile=5)
    for step in range(3):
        reference.zero_grad()
        optimizer.zero_grad()
        x, labels = toy.data(step)
        (model(x, labels)["loss"] if step != 1 else model(x)["y"].square().sum()).backward()
        mine, target = toy.shard(pm, x, labels)
        (pm(mine, labels=target)["loss"] if step != 1 else pm(mine)["y"].square().sum()).backward()
        assert step != 1 or pm.get_parameter("head").grad is None
        reference.step()
        optimizer.step()
        assert optimizer.grad_norm is None
    assert toy.worst(pm.gather_parameters(), parameters(model)) < 1e-12
    assert_replicas_equal(pm)
    steps = {name: float(state["step"]) for name, state in optimizer.named_state().items() if state}
    assert steps["head"] == 2 and steps["mlp.bias"] == 3 and "frozen" not in steps


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_parameters_without_a_gradient(ranks, zero):
    ranks(4).run(no_gradient, zero)


def shares_only(zero):
    """What a rank keeps: two states of its share, and no copy of float64 parameters."""
    pm = module((2, 2), ("dp", "tp"), zero)
    optimizer = sharded(pm, "AdamW", tile=7)
    train(pm, optimizer, 1)
    ranks = 1 if zero == 0 else 2
    want = {
        "mlp.gate_up": 48 // ranks,
        "mlp.down": 24 // ranks,
        "mlp.bias": 6 // ranks,
        "scales.*.weight": 12 // ranks,
        "head": 6 // ranks,
    }
    for name, state in optimizer.named_state().items():
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        for key in ("exp_avg", "exp_avg_sq"):
            held, placed = state[key], pm.placed[name]
            assert (
                isinstance(held, DTensor)
                and held.placements == placed.share.placements
                and held.shape == torch.Size(placed.held)
            )
            assert held.to_local().untyped_storage().nbytes() == 8 * want[name], (name, key)
            assert (
                optimizer.state[pm.get_parameter(name)][key].to_local().data_ptr()
                == held.to_local().data_ptr()
            )
        assert optimizer._shares[name].master is None
    views = {
        tile.state["exp_avg"].untyped_storage().data_ptr() for tile in optimizer._shares["mlp.gate_up"].tiles
    }
    assert len(views) == 1 and len(optimizer._shares["mlp.gate_up"].tiles) == -(-want["mlp.gate_up"] // 7)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_rank_keeps_states_of_its_share(ranks, zero):
    ranks(4).run(shares_only, zero)


def uneven():
    """Six elements over four ranks: 2, 2, 2 and 0. The rank without a share takes part in every gather."""
    pm = module((4,), ("dp",), 2)
    optimizer = sharded(pm, "AdamW", tile=2, max_norm=0.5)
    train(pm, optimizer, 5)
    assert toy.worst(pm.gather_parameters(), parameters(single("AdamW", 5)[0])) < 1e-12
    assert_replicas_equal(pm)
    return {name: state["exp_avg"].to_local().numel() for name, state in optimizer.named_state().items()}


def test_uneven_and_empty_shares(ranks):
    found = ranks(4).run(uneven)
    assert [each["mlp.bias"] for each in found] == [2, 2, 2, 0] and [each["head"] for each in found] == [
        2,
        2,
        2,
        0,
    ]


def clip_by_hand(zero):
    """clip_grad_norm_ before step() is what max_norm does; without clipping nothing is measured; max_norm=inf
    measures only."""
    model, norms = single("AdamW", 2)
    pm, third = module((2, 2), ("dp", "tp"), zero), module((2, 2), ("dp", "tp"), zero)
    optimizer, other = sharded(pm, "AdamW", tile=9), sharded(third, "AdamW", tile=9)
    for step in range(2):
        other.zero_grad()
        loss_of(third, step).backward()
        torch.nn.utils.clip_grad_norm_(third.parameters(), 0.5)
        other.step()
        optimizer.zero_grad(set_to_none=step == 0)
        loss_of(pm, step).backward()
        norm = optimizer.clip_grad_norm_(0.5)
        assert abs(float(norm) - norms[step]) < 1e-12 * norms[step] and norm.shape == ()
        optimizer.step()
        assert optimizer.grad_norm is norm and other.grad_norm is None
    for each in (pm, third):
        assert toy.worst(each.gather_parameters(), parameters(model)) < 1e-12
    free, wide = single("SGD", 1, max_norm=float("inf"))[0], module((2, 2), ("dp", "tp"), zero)
    found = train(wide, sharded(wide, "SGD", max_norm=float("inf")), 1)
    assert abs(found[0] - norms[0]) < 1e-12 * norms[0]
    assert toy.worst(wide.gather_parameters(), parameters(free)) < 1e-12


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_clipping_by_hand(ranks, zero):
    ranks(4).run(clip_by_hand, zero)


def refused():
    pm = module((2,), ("dp",), 1)
    make = lambda cls=torch.optim.AdamW, source=pm, **options: ShardedOptimizer(source, cls, **options)
    for message, options in {
        "tile=0: a number of elements, at least 1": dict(tile=0),
        "tile=True": dict(tile=True),
        "takes an optimizer class such as torch.optim.AdamW": dict(cls="AdamW"),
        "evaluates the model inside its step": dict(cls=torch.optim.LBFGS),
        "Adafactor is not elementwise .*cannot be tiled": dict(cls=torch.optim.Adafactor),
        "Adafactor is not elementwise .*is cut to": dict(cls=torch.optim.Adafactor, tile=None),
        "SparseAdam is not elementwise": dict(cls=torch.optim.SparseAdam),
        "max_norm=-1": dict(max_norm=-1),
        "loss_scale='yes'": dict(loss_scale="yes"),
        "needs a scale > 0": dict(loss_scale=-1.0),
        'offload="disk"|offload=.disk.': dict(offload="disk"),
        "a floating-point dtype": dict(master_dtype=torch.int32),
        "Invalid learning rate": dict(lr=-1.0),
        "unexpected keyword argument 'momentum'": dict(momentum=0.1),
        "needs the ParallelModule that the parameters are of": dict(source=list(pm.parameters())),
        "parameter 1 of group 0, of shape .*is not the module's": dict(
            source=[pm.get_parameter("head"), torch.nn.Parameter(torch.zeros(3))], module=pm
        ),
    }.items():
        with pytest.raises(ConfigError, match=message) as error:
            make(**options)
        assert "\n" not in str(error.value)
    optimizer = make()
    with pytest.raises(TedfxError, match="the closure would run forward and backward inside the step"):
        optimizer.step(lambda: None)
    with pm.no_sync():
        loss_of(pm, 0).backward()
    with pytest.raises(TedfxError, match="is not summed over .*outside of no_sync"):
        optimizer.step()
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [pm.get_parameter("head")]})
    assert len(optimizer.param_groups) == 1
    LossScale(init_scale=2.0)


def test_refusals(ranks):
    ranks(2).run(refused)


def whole_parameters():
    """With tile=None, and whole parameters on every rank, an optimizer need not be elementwise."""
    pm = module((2,), ("dp",), 0)
    model = toy.Mlp()
    named = dict(pm.named_parameters())
    optimizer = ShardedOptimizer(
        [named["mlp.gate_up"], named["mlp.down"]], torch.optim.Adafactor, module=pm, tile=None, lr=0.05
    )
    reference = torch.optim.Adafactor([model.mlp.gate_up, model.mlp.down], lr=0.05)
    for step in range(3):
        model.zero_grad(), pm.zero_grad()
        model(*toy.data(step))["loss"].backward()
        loss_of(pm, step).backward()
        reference.step(), optimizer.step()
    assert toy.worst(pm.gather_parameters(), parameters(model)) < 1e-12
    saved = optimizer.state_dict()
    assert set(saved["state"]) == {"mlp.gate_up", "mlp.down"} and saved["state"]["mlp.down"][
        "row_var"
    ].shape == (6, 1)
    optimizer.load_state_dict(saved)
    with pytest.raises(ConfigError, match="scales.* is a stack|a stack"):
        ShardedOptimizer(
            [named["scales.*.weight"]]
            if "scales.*.weight" in named
            else [pm.get_parameter("scales.*.weight")],
            torch.optim.Adafactor,
            module=pm,
            tile=None,
        )


def test_optimizers_of_whole_parameters(ranks):
    ranks(2).run(whole_parameters)


def probed(_=None):
    """What the probe says about every optimizer of this torch."""
    found = {}
    from tedfx.optim.probe import check_class, elementwise

    for name, cls in vars(torch.optim).items():
        if (
            isinstance(cls, type)
            and issubclass(cls, torch.optim.Optimizer)
            and cls is not torch.optim.Optimizer
        ):
            try:
                check_class(cls)
            except ConfigError:
                found[name] = False
                continue
            found[name] = elementwise(lambda tensors: cls(tensors, lr=0.1), "cpu") is None
    return found


def test_the_probe_knows_torchs_optimizers():
    found = probed()
    want = {
        "Adadelta",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "ASGD",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
    }
    assert (
        {name for name, good in found.items() if good} == want
        and not found["LBFGS"]
        and not found["Adafactor"]
    )


def gradients_stay():
    """A step leaves gradients as they were, clipped or not."""
    pm = module((2,), ("dp",), 2)
    optimizer = sharded(pm, "SGD", max_norm=0.01, tile=4)
    loss_of(pm, 0).backward()
    before = {name: p.grad.to_local().clone() for name, p in pm.named_parameters() if p.grad is not None}
    optimizer.step()
    assert all(
        torch.equal(pm.get_parameter(name).grad.to_local(), grad)
        for name, grad in before.items()
        if name in pm.placed
    )
    assert dist.get_world_size() == 2 and before


def test_gradients_are_left_alone(ranks):
    ranks(2).run(gradients_stay)
