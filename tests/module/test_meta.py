"""Models made on the meta device: their own initialisation, folders of weights in and out, bit by bit the
single device's."""

import itertools
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers as tf
from safetensors.torch import load_file
from torch import nn

import tedfx
from tedfx.runtime.weights import NoWeights
from tests.models import BASE
from tests.models_plain import Config, PlainMoELM
from tests.pool import context

MESHES = {"ep2 tp2": ((2, 2), ("ep", "tp")), "tp2": ((2,), ("tp",))}
HF = {
    "mixtral": (
        tf.MixtralForCausalLM,
        tf.MixtralConfig,
        dict(intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True),
    ),
    "tied": (
        tf.MixtralForCausalLM,
        tf.MixtralConfig,
        dict(
            intermediate_size=48,
            num_local_experts=4,
            num_experts_per_tok=2,
            tie_word_embeddings=True,
            pad_token_id=3,
        ),
    ),
    "deepseek_v3": (
        tf.DeepseekV3ForCausalLM,
        tf.DeepseekV3Config,
        dict(
            intermediate_size=48,
            moe_intermediate_size=24,
            num_key_value_heads=4,
            n_routed_experts=8,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=4,
            topk_group=2,
            first_k_dense_replace=1,
            q_lora_rank=20,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=12,
            v_head_dim=10,
        ),
    ),
    "gpt_oss": (
        tf.GptOssForCausalLM,
        tf.GptOssConfig,
        dict(
            intermediate_size=24,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=6,
            output_router_logits=True,
        ),
    ),
}
CASES = [
    *(("ep2 tp2", name) for name in ("mixtral", "deepseek_v3", "gpt_oss", "plain")),
    *(("tp2", name) for name in ("mixtral", "tied", "gpt_oss", "plain_tied")),
]


def library(name):
    model_class, config_class, entries = HF[name]
    return model_class(config_class(**{**BASE, "num_hidden_layers": 1 + (name == "deepseek_v3"), **entries}))


def plain(tied: bool):
    model = PlainMoELM(Config(norm="layer", expert="gelu", layers=1))
    if tied:
        model.lm_head.weight = model.embed.weight
    return model


def make(name):
    return library(name) if name in HF else plain(name == "plain_tied")


_COMPILED = {}  # (model, mesh) -> its compilations: this file is not about compiling


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


# ---- initialisation ----------------------------------------------------------------------------------------


def initialised(name, mesh):
    pm = on_meta(name, mesh)
    assert any("on the meta device" in note for record in pm.history for note in record.result.notes)
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


@pytest.mark.parametrize("mesh, name", CASES)
def test_own_initialisation(ranks, name, mesh):
    ranks(torch.Size(MESHES[mesh][0]).numel()).run(initialised, name, mesh)


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


def test_own_function(ranks):
    ranks(2).run(hand_made, "tp2")


# ---- folders -----------------------------------------------------------------------------------------------


def loaded(name, mesh, folder, out):
    pm = on_meta(name, mesh)
    pm.load_pretrained(folder)
    if name in HF:
        expected = HF[name][0].from_pretrained(folder, dtype=torch.float32)
        assert (type(pm.config), pm.dtype, pm.device) == (
            type(expected.config),
            expected.dtype,
            expected.device,
        )
    else:
        expected = make(name)
        expected.load_state_dict(
            {
                k: v
                for f in sorted(os.listdir(folder))
                if f.endswith("safetensors")
                for k, v in load_file(f"{folder}/{f}").items()
            }
        )
    same(pm, expected)
    pm(**batch(pm)).loss.backward()
    pm.save_pretrained(out, max_shard_size="20KB")
    assert sorted(os.listdir(os.path.dirname(out))).count(os.path.basename(out)) == 1 and not [
        f for f in os.listdir(os.path.dirname(out)) if "unfinished" in f
    ]
    assert "not an empty folder" in str(refused(tedfx.TedfxError, pm.save_pretrained, out))


def replaced(folder, other):
    """A folder of other weights, in more shards, beside a tokenizer; a failure in the last rename leaves it
    as it was."""
    pm = on_meta("plain", "tp2", single("plain"))
    before = load_all(folder)
    from tedfx.state import shards

    rename = os.rename
    shards.os.rename = lambda a, b: (
        (_ for _ in ()).throw(OSError("disk full")) if "unfinished" in a else rename(a, b)
    )
    try:
        assert "disk full" in refused(Exception, pm.save_pretrained, folder, overwrite=True)
    finally:
        shards.os.rename = rename
    assert all(torch.equal(value, before[name]) for name, value in load_all(folder).items())
    assert "is not a folder of weights, it holds neither model.safetensors nor" in refused(
        tedfx.TedfxError, pm.save_pretrained, other, overwrite=True
    )
    assert "not an empty folder" in refused(tedfx.TedfxError, pm.save_pretrained, folder, dry_run=True)
    pm.save_pretrained(folder, overwrite=True, dry_run=True)
    pm.save_pretrained(f"{folder}-new", dry_run=True)
    assert not [
        name
        for name in os.listdir(os.path.dirname(folder))
        if name.startswith(f"{os.path.basename(folder)}-new")
    ]
    assert all(torch.equal(value, before[name]) for name, value in load_all(folder).items())
    dist.barrier()
    pm.save_pretrained(folder, overwrite=True)


def test_overwrite(ranks, tmp_path):
    folder, other = tmp_path / "here" / "out", tmp_path / "other"
    ranks(2).run(write_plain, "plain", str(folder))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text("mine")
    other.mkdir()
    (other / "README").write_text("mine")
    ranks(2).run(replaced, str(folder), str(other))
    assert sorted(os.listdir(folder)) == ["model.safetensors", "sub", "tokenizer.json"] and os.listdir(
        folder / "sub"
    ) == ["file"]
    assert os.listdir(folder.parent) == ["out"] and os.listdir(other) == ["README"]
    state = single("plain").state_dict()
    assert all(torch.equal(value, state[name]) for name, value in load_all(folder).items())


@pytest.mark.parametrize("mesh, name", CASES)
def test_folders(ranks, tmp_path, name, mesh):
    model, folder, out = single(name), str(tmp_path / "in"), str(tmp_path / "out")
    if name in HF:
        model.save_pretrained(folder, max_shard_size="20KB")
    else:
        ranks(2).run(write_plain, name, folder)
    assert len([f for f in os.listdir(folder) if f.endswith(".safetensors")]) > 3
    ranks(torch.Size(MESHES[mesh][0]).numel()).run(loaded, name, mesh, folder, out)
    if name in HF:
        assert sorted(load_all(folder)) == sorted(load_all(out))  # the library's own names
        back, info = HF[name][0].from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        configs = [
            dict(HF[name][0].from_pretrained(f).config.to_dict(), _name_or_path="") for f in (out, folder)
        ]
        assert configs[0] == configs[1]
        assert os.path.exists(f"{out}/generation_config.json")
    else:
        back = make(name)
        back.load_state_dict(load_all(out))
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key


def load_all(folder):
    return {
        k: v
        for f in sorted(os.listdir(folder))
        if f.endswith("safetensors")
        for k, v in load_file(f"{folder}/{f}").items()
    }


def write_plain(name, folder):
    pm = on_meta(name, "tp2", single(name))
    pm.save_pretrained(folder, max_shard_size=20_000)


def cast(folder, out):
    pm = on_meta("mixtral", "tp2")
    pm.load_pretrained(folder)  # bfloat16 in the file, float32 in the module
    same(pm, tf.MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32))
    dcp.save({"model": pm.state_dict()}, checkpoint_id=out)
    other = on_meta("mixtral", "tp2")
    state = {"model": other.state_dict(to_fill=True)}
    dcp.load(state, checkpoint_id=out)
    other.load_state_dict(state["model"])
    same(other, tf.MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32))
    third = on_meta("mixtral", "tp2")
    assert third.load_state_dict(
        {"lm_head.weight": pm.gather_parameters()["lm_head.weight"]}, strict=False
    ).missing_keys
    refused(NoWeights, third.state_dict)
    third.load_state_dict(pm.gather_parameters(buffers=True))
    third(**batch(third)).loss.backward()


def test_other_dtype_and_other_ways(ranks, tmp_path):
    single("mixtral").to(torch.bfloat16).save_pretrained(tmp_path / "in")
    ranks(2).run(cast, str(tmp_path / "in"), str(tmp_path / "dcp"))


def wrong(folders):
    pm = on_meta("mixtral", "tp2")
    lines = {
        what: refused(tedfx.TedfxError, pm.load_pretrained, folder)
        for what, folder in folders.items()
        if what != "good"
    }
    assert not pm.has_weights
    pm.load_pretrained(folders["good"])
    before = pm.gather_parameters()
    for folder in folders.values():
        if folder != folders["good"]:
            refused(tedfx.TedfxError, pm.load_pretrained, folder)
    assert pm.has_weights and all(
        torch.equal(value, before[key]) for key, value in pm.gather_parameters().items()
    )
    return lines


def test_refusals(ranks, tmp_path):
    import json

    from safetensors.torch import save_file

    good = tmp_path / "good"
    single("mixtral").save_pretrained(good)
    state, config = load_all(good), json.loads((good / "config.json").read_text())

    def write(name, state, **entries):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **entries}))

    key = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    assert key in state
    write("missing", {k: v for k, v in state.items() if k != "model.norm.weight"})
    write("expert", {k: v for k, v in state.items() if k != key})
    write("extra", {**state, "model.layers.7.thing": torch.zeros(2)})
    write("shape", {**state, "model.norm.weight": torch.zeros(31)})
    write("quantized", state, quantization_config={"quant_method": "mxfp4"})
    single("gpt_oss").save_pretrained(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:5000])
    (tmp_path / "shard").mkdir()
    (tmp_path / "shard" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    )
    wanted = {
        "good": "",
        "missing": "missing: model.norm.weight",
        "expert": "model.layers.0.mlp.experts.gate_up_proj",
        "extra": "not in the model: model.layers.7.thing",
        "shape": "model.norm.weight (31,), expected (32,)",
        "quantized": "mxfp4",
        "other": "says gpt_oss, the model is mixtral",
        "empty": "holds neither",
        "torn": "cannot be read",
        "shard": "no such file",
        "nowhere": "no such folder",
    }
    for lines in ranks(2).run(wrong, {name: str(tmp_path / name) for name in wanted}):
        for what, line in lines.items():
            assert wanted[what] in line, (what, line)


def torn(folder, other):
    """A failure while reading, on one rank: the module has no weights, on all."""
    pm = on_meta("mixtral", "tp2")
    import tedfx.runtime.weights as module

    fill, calls = module.WeightAccess._fill, []

    def failing(self, *args):
        calls.append(1)
        if dist.get_rank() == 1 and len(calls) == 9:
            raise OSError("the disk went away")
        return fill(self, *args)

    module.WeightAccess._fill = failing
    try:
        assert "disk went away" in refused(Exception, pm.load_pretrained, folder)
    finally:
        module.WeightAccess._fill = fill
    refused(NoWeights, pm.state_dict)
    pm.load_pretrained(folder)
    from tedfx.state.shards import Writer

    write = Writer.write
    Writer.write = lambda self, name, tensor: (
        (_ for _ in ()).throw(OSError("disk full"))
        if "layers.0.mlp" in name or "experts" in name
        else write(self, name, tensor)
    )
    try:
        assert "disk full" in refused(Exception, pm.save_pretrained, other)
    finally:
        Writer.write = write
    dist.barrier()
    assert not [f for f in os.listdir(os.path.dirname(other)) if f.startswith("out")]


def test_failures_half_way(ranks, tmp_path):
    single("mixtral").save_pretrained(tmp_path / "in", max_shard_size="20KB")
    ranks(2).run(torn, str(tmp_path / "in"), str(tmp_path / "out"))


def mixed():
    mesh = context(*MESHES["tp2"]).device_mesh
    model = make("plain")
    model.embed.to("meta")
    assert "embed.weight is on the meta device and" in refused(
        tedfx.ConfigError, tedfx.parallelize, model, mesh
    )
    pm = on_meta("plain_tied", "tp2", single("plain_tied"))
    assert "had weights" in refused(tedfx.ConfigError, pm.init_weights)


def test_half_meta(ranks):
    ranks(2).run(mixed)


def test_boxes_of_converted_tensors():
    """What is read box by box is what the operations make of the whole: boxes that span parts, too."""
    from tedfx.state.lazy import Cat, Cut, Source, Stack, Swap

    files = {f"{kind}{e}": torch.randn(3, 4) for kind in "gu" for e in range(3)}
    sources = {name: Source(name, (3, 4)) for name in files}
    halves = [Stack(0, [sources[f"{kind}{e}"] for e in range(3)]) for kind in "gu"]
    whole = torch.cat([torch.stack([files[f"{kind}{e}"] for e in range(3)]) for kind in "gu"], 1)
    read = lambda name, box: files[name][box]
    cases = [
        (Cat(1, halves), whole),
        (Swap(1, 2, Cat(1, halves)), whole.transpose(1, 2)),
        (Cut(1, 2, 3, Cat(1, halves)), whole[:, 2:5]),
    ]
    cases.append((Cut(2, 1, 4, Swap(1, 2, Cat(1, halves))), whole.transpose(1, 2)[:, :, 1:5]))
    for node, expected in cases:
        assert node.shape == tuple(expected.shape)
        boxes = [[slice(a, b) for a in range(n) for b in range(a + 1, n + 1)] for n in node.shape]
        for box in itertools.product(*boxes):
            out = torch.full_like(expected[box], float("nan"), dtype=torch.float64)
            node.fill(box, out, read)
            assert torch.equal(out, expected[box].double()), (node, box)
