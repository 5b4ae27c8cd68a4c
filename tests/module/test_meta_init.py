"""Models made on the meta device: their own initialisation, bit by bit the single device's."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

import tedfx
from tedfx.runtime.weights import NoWeights
from tests.models_plain import Config, PlainMoELM
from tests.module.meta import CASES, MESHES, MORE, batch, make, on_meta, refused, same, single, world
from tests.pool import context


def initialised(name, mesh):
    pm = on_meta(name, mesh)
    torch.manual_seed(100 + dist.get_rank())
    before = torch.get_rng_state()
    line = refused(NoWeights, pm, **batch(pm))
    assert all(way in line for way in ("init_weights", "load_pretrained", "load_state_dict")), line
    for call in (pm.state_dict, pm.gather_parameters):
        refused(NoWeights, call)
    refused(NoWeights, pm.save_pretrained, "/nowhere")
    pm.init_weights(seed=5 if dist.get_rank() == 0 else 6)  # the first rank's counts
    assert torch.equal(before, torch.get_rng_state())
    expected = single(name)
    same(pm, expected)
    again = on_meta(name, mesh)
    again.init_weights(seed=5)  # the model was left as it was: the same again
    same(again, expected)

    # a step is that of a parallel module of the materialised model
    other = on_meta(name, mesh, expected)
    losses = []
    for each in (pm, other):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2)
        loss = each(**batch(each)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    theirs = other.gather_parameters()
    assert all(torch.equal(value, theirs[key]) for key, value in pm.gather_parameters().items())


@pytest.mark.parametrize("mesh, name", CASES + MORE)
def test_own_initialisation(ranks, name, mesh):
    ranks(world(mesh)).run(initialised, name, mesh)


class Stubborn(nn.Module):
    """In the order of a module list: a mixture between two things that init may forget."""

    def __init__(self):
        super().__init__()
        self.inner = PlainMoELM(Config(norm="layer", layers=1))
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("shift", torch.zeros(1), persistent=False)

    def forward(self, input_ids, labels=None):
        out = self.inner(input_ids, labels)
        out.loss = out.loss * self.scale.sum() + self.shift.sum()
        return out


def by_hand(module, half=False):
    """Reads, views, touches again, temporaries on the parameter's device."""
    if isinstance(module, nn.Linear):
        module.weight.data.normal_(0, 0.1)
        if module.bias is not None:
            module.bias.zero_()
        module.weight.mul_(2).add_(torch.arange(module.in_features, device=module.weight.device) * 1e-3)
        module.weight[0] = module.weight[1].clone()
        assert module.weight.abs().max().item() > 0
        nn.init.orthogonal_(module.weight[:, :4])  # these two leave a meta tensor alone
        nn.init.trunc_normal_(module.weight[:2])
    elif isinstance(module, (nn.Embedding, nn.LayerNorm, nn.RMSNorm)):
        module.reset_parameters()
    elif isinstance(module, Stubborn):
        nn.init.normal_(module.scale)
        module.shift.copy_(torch.full((1,), 0.5))
        first, second = module.inner.embed.weight, module.inner.lm_head.weight
        second[:32] = first[:32] + 1  # both were let go long ago
        if half:
            module.inner.embed.weight = nn.Parameter(torch.zeros(3))


def half_way(module):
    if isinstance(module, nn.Linear):
        module.weight[: module.out_features // 2].normal_()
    else:
        by_hand(module)


def unequal(module):
    if isinstance(module, Stubborn):
        module.scale.fill_(dist.get_rank())
    else:
        by_hand(module)


def hand_made(mesh):
    with torch.device("meta"):
        model = Stubborn()
    pm = on_meta("stubborn", mesh, model)
    assert any("on the meta device" in note for record in pm.history for note in record.result.notes)
    line = refused(tedfx.ConfigError, pm.init_weights)
    assert "nothing gives a value to" in line and "init=" in line, line
    assert "no values" in refused(NoWeights, pm, **batch(pm))
    assert "nothing gives a value to inner.blocks.0" in (
        line := refused(tedfx.ConfigError, pm.init_weights, half_way)
    ), line
    assert "was replaced" in refused(tedfx.ConfigError, pm.init_weights, partial(by_hand, half=True))
    refused(NoWeights, pm.state_dict)
    assert (
        "different values" in refused(tedfx.ConfigError, pm.init_weights, lambda m: (by_hand(m), unequal(m)))
        and not pm.has_weights
    )
    pm.init_weights(by_hand, seed=9)
    expected = Stubborn()
    torch.manual_seed(9)
    with torch.no_grad():
        expected.apply(by_hand)
    same(pm, expected)
    assert all(
        t.is_meta for t in (*model.parameters(), *model.buffers())
    ) and model.inner.embed.weight.shape == (64, 32)


@pytest.mark.slow
def test_own_function(ranks):
    ranks(2).run(hand_made, "tp2")


def mixed():
    mesh = context(*MESHES["tp2"]).device_mesh
    model = make("plain")
    model.embed.to("meta")
    assert "embed.weight is on the meta device and" in refused(
        tedfx.ConfigError, tedfx.parallelize, model, mesh
    )
    pm = on_meta("plain_tied", "tp2", single("plain_tied"))
    assert "had weights" in refused(tedfx.ConfigError, pm.init_weights)


@pytest.mark.slow
def test_half_meta(ranks):
    ranks(2).run(mixed)
