"""Models made on the meta device, and what a single device makes of them: what the tests of weights share."""

import os
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import tedfx
from tests import models
from tests.marks import slow
from tests.models_plain import Config, PlainMoELM
from tests.pool import context

MESHES = {"ep2 tp2": ((2, 2), ("ep", "tp")), "ep2": ((2,), ("ep",)), "tp2": ((2,), ("tp",))}
HF = {
    "mixtral": partial(models.mixtral, num_hidden_layers=1),
    "tied": partial(models.mixtral, num_hidden_layers=1, tie_word_embeddings=True, pad_token_id=3),
    "deepseek_v3": models.deepseek_v3,
    "gpt_oss": partial(models.gpt_oss, num_hidden_layers=1),
}
CASES = [("ep2", "mixtral")]
MORE = [
    slow(*case)
    for case in (
        ("ep2", "deepseek_v3"),
        ("tp2", "mixtral"),
        ("tp2", "plain_tied"),
        ("tp2", "tied"),
        ("ep2", "plain"),
        ("ep2 tp2", "gpt_oss"),
    )
]


def library(name):
    """The library's class of a model."""
    with torch.device("meta"):
        return type(make(name))


def plain(tied: bool):
    model = PlainMoELM(Config(norm="layer", expert="gelu", layers=1))
    if tied:
        model.lm_head.weight = model.embed.weight
    return model


def make(name):
    return HF[name]() if name in HF else plain(name == "plain_tied")


_COMPILED = {}  # (model, mesh) -> its compilations: these tests are not about compiling


def world(mesh):
    return torch.Size(MESHES[mesh][0]).numel()


def on_meta(name, mesh, model=None):
    """A parallel module of the model made on the meta device, or of a given one."""
    if model is None:
        with torch.device("meta"):
            model = make(name)
    shape, names = MESHES[mesh]
    pm = tedfx.parallelize(model, context(shape, names).device_mesh, traces=_COMPILED.get((name, mesh), ()))
    _COMPILED[name, mesh] = [program.compilation for program in pm.programs.values()]
    return pm


def single(name, seed=5):
    """What one device gives: the issue's oracle."""
    with torch.device("meta"):
        model = make(name)
    tied = model.lm_head.weight is model.embed.weight if name not in HF else False
    model.to_empty(device="cpu")
    for p in (*model.parameters(), *model.buffers()):
        p.data.fill_(7)
    torch.manual_seed(seed)
    if name in HF:
        model.init_weights()
        return model
    if tied:  # `to_empty` parts what was tied
        model.lm_head.weight = model.embed.weight
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def same(pm, model):
    found, expected = pm.gather_parameters(buffers=True), model.state_dict()
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(
            found[key].view(torch.uint8), value.view(torch.uint8)
        ), key
    for key, value in model.named_buffers():
        assert torch.equal(pm.get_buffer(key), value), key


def refused(error, call, *args, **kwargs) -> str:
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def batch(pm, vocabulary=64):
    ids = torch.randint(vocabulary, (4, 8), generator=torch.Generator().manual_seed(1))
    index, count = pm.batch_coordinate
    return dict(input_ids=ids.chunk(count)[index], labels=ids.chunk(count)[index])


def load_all(folder):
    return {
        k: v
        for f in sorted(os.listdir(folder))
        if f.endswith("safetensors")
        for k, v in load_file(f"{folder}/{f}").items()
    }


def write_plain(name, mesh, folder):
    pm = on_meta(name, mesh, single(name))
    pm.save_pretrained(folder, max_shard_size=20_000)
