"""Models made on the meta device: folders of weights in and out, bit by bit the single device's."""

import itertools
import json
import os

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import tedfx
from tedfx.runtime.pretrained import Pretrained
from tedfx.runtime.weights import NoWeights
from tedfx.state.hf_folder import Folder, nodes_of
from tests.marks import slow
from tests.module.meta import (
    CASES,
    HF,
    MORE,
    batch,
    library,
    load_all,
    make,
    on_meta,
    refused,
    same,
    single,
    world,
    write_plain,
)


def loaded(name, mesh, folder, out):
    pm = on_meta(name, mesh)
    pm.load_pretrained(folder)
    if name in HF:
        expected = library(name).from_pretrained(folder, dtype=torch.float32)
        assert (type(pm.config), pm.dtype, pm.device) == (
            type(expected.config),
            expected.dtype,
            expected.device,
        )
    else:
        expected = make(name)
        expected.load_state_dict(load_all(folder))
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
    pm = on_meta("plain", "ep2", single("plain"))
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


@pytest.mark.slow
def test_overwrite(ranks, tmp_path):
    folder, other = tmp_path / "here" / "out", tmp_path / "other"
    ranks(2).run(write_plain, "plain", "ep2", str(folder))
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


@pytest.mark.parametrize("mesh, name", [*(slow(*each) for each in CASES), *MORE])
def test_folders(ranks, tmp_path, name, mesh):
    model, folder, out = single(name), str(tmp_path / "in"), str(tmp_path / "out")
    if name in HF:
        model.save_pretrained(folder, max_shard_size="20KB")
    else:
        ranks(2).run(write_plain, name, mesh, folder)
    assert len([f for f in os.listdir(folder) if f.endswith(".safetensors")]) > 3
    ranks(world(mesh)).run(loaded, name, mesh, folder, out)
    if name in HF:
        assert sorted(load_all(folder)) == sorted(load_all(out))  # the library's own names
        back, info = library(name).from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        configs = [
            dict(library(name).from_pretrained(f).config.to_dict(), _name_or_path="") for f in (out, folder)
        ]
        assert configs[0] == configs[1]
        assert os.path.exists(f"{out}/generation_config.json")
    else:
        back = make(name)
        back.load_state_dict(load_all(out))
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key


def cast(folder, out):
    pm = on_meta("mixtral", "tp2")
    pm.load_pretrained(folder)  # bfloat16 in the file, float32 in the module
    same(pm, library("mixtral").from_pretrained(folder, dtype=torch.float32))
    dcp.save({"model": pm.state_dict()}, checkpoint_id=out)
    other = on_meta("mixtral", "tp2")
    state = {"model": other.state_dict(to_fill=True)}
    dcp.load(state, checkpoint_id=out)
    other.load_state_dict(state["model"])
    same(other, library("mixtral").from_pretrained(folder, dtype=torch.float32))
    third = on_meta("mixtral", "tp2")
    assert third.load_state_dict(
        {"lm_head.weight": pm.gather_parameters()["lm_head.weight"]}, strict=False
    ).missing_keys
    refused(NoWeights, third.state_dict)
    third.load_state_dict(pm.gather_parameters(buffers=True))
    third(**batch(third)).loss.backward()


@pytest.mark.slow
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


WRONG = {
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


def write_wrong(tmp_path):
    """A good folder and those of `WRONG`."""
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


def test_wrong_folders(tmp_path):
    """A line for each of them before any is read, and none for the good one."""
    write_wrong(tmp_path)
    with torch.device("meta"):
        model = make("mixtral")
    wanted = model.state_dict()
    look = lambda name: nodes_of(model, Folder(tmp_path / name), wanted, [(key,) for key in wanted])
    assert look("good")[0].keys() == wanted.keys()
    for name, words in WRONG.items():
        assert words in refused(tedfx.TedfxError, look, name), name


@pytest.mark.slow
def test_refusals(ranks, tmp_path):
    write_wrong(tmp_path)
    folders = {name: str(tmp_path / name) for name in ("good", *WRONG)}
    for lines in ranks(2).run(wrong, folders):
        for what, line in lines.items():
            assert WRONG[what] in line, (what, line)


def torn(folder, other):
    """A failure while reading, on one rank: the module has no weights, on all."""
    pm = on_meta("mixtral", "tp2")
    fill, calls = Pretrained._fill, []

    def failing(self, *args):
        calls.append(1)
        if dist.get_rank() == 1 and len(calls) == 9:
            raise OSError("the disk went away")
        return fill(self, *args)

    Pretrained._fill = failing
    try:
        assert "disk went away" in refused(Exception, pm.load_pretrained, folder)
    finally:
        Pretrained._fill = fill
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


@pytest.mark.slow
def test_failures_half_way(ranks, tmp_path):
    single("mixtral").save_pretrained(tmp_path / "in", max_shard_size="20KB")
    ranks(2).run(torn, str(tmp_path / "in"), str(tmp_path / "out"))


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
