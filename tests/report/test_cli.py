"""The command line, in process."""

from __future__ import annotations

import json
import re

import pytest

import tedfx
from tedfx.arguments import parse_overrides, parse_roles
from tedfx.cli import main
from tedfx.errors import ConfigError
from tedfx.verification import command

TOY = "tests.report.toy:make"
TINY = (
    "hidden_size=32 intermediate_size=48 vocab_size=64 num_attention_heads=4 num_key_value_heads=2 "
    "num_local_experts=4"
).split()


def run(capsys, *argv):
    status = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.slow
def test_explain_a_model_type(capsys):
    status, out, err = run(
        capsys,
        "explain",
        "mixtral",
        "--mesh",
        "dp=4,ep=4,tp=2",
        "--layers",
        1,
        "--set",
        *TINY,
        "--batch",
        2,
        "--sequence",
        8,
        "--timings",
    )
    assert status == 0, err
    assert out.startswith("MixtralForCausalLM on mesh dp=4,ep=4,tp=2 (32 ranks)")
    assert "aux_loss" in out and "\n-- model.layers.0\n" in out and "all_to_all_single ep" in out
    assert "trace" in out and "passes together" in out and "peak memory" in out


def test_explain_a_factory(capsys):
    status, out, _ = run(capsys, "explain", TOY, "--mesh", "dp=2,tp=2", "--set", "layers=3", "width=8")
    assert (
        status == 0
        and out.startswith("Stack on mesh dp=2,tp=2")
        and "-- blocks.0  x3" in out
        and "[batch, sequence, 8]" in out
    )
    status, out, _ = run(capsys, "explain", "tests.report.toy:flat", "--mesh", "dp=2", "--eval")
    assert status == 0 and "forward(x: float32[3]) eval" in out


def test_json(capsys):
    status, out, _ = run(
        capsys,
        "explain",
        TOY,
        "--mesh",
        "dp=2,tp=2",
        "--format",
        "json",
        "--outputs",
        "loss",
        "--no-sequence-parallel",
        "--no-fold",
    )
    data = json.loads(out)
    assert status == 0 and data["mesh"] == {"dp": 2, "tp": 2} and data["stages"]["trace"] > 0
    # without the logits nothing gathers them
    assert not any(t["collective"] == "all_gather_into_tensor" for t in data["totals"])
    assert [s["count"] for s in data["layers"] if s["path"]] == [1] * 4


@pytest.mark.slow
def test_checkpoint(capsys):
    arguments = ["explain", TOY, "--mesh", "tp=2", "--batch", 2, "--sequence", 8, "--no-sequence-parallel"]
    status, out, _ = run(capsys, *arguments, "--checkpoint", "full")
    assert status == 0 and "+rec" not in out  # the sum that ends a layer comes after its last saved tensor
    assert (
        " region\n" in out
        and "-- blocks.0  x4: layers 0-3" in out
        and "full: 4 regions; at batch = 2, sequence = 8 a rank keeps about" in " ".join(out.split())
    )
    status, out, _ = run(capsys, *arguments, "--format", "json", "--checkpoint", "comm")
    nodes = [n for layer in json.loads(out)["layers"] if layer["path"] for n in layer["nodes"]]
    assert {n["region"] for n in nodes if n["op"] == "gelu"} == {0} and {
        n["region"] for n in nodes if n["op"] == "all_reduce"
    } == {None}
    assert " region\n" not in run(capsys, *arguments)[1]
    for policy, line in (
        ("some", "'some': one of none"),
        ("budget=1", "take a larger budget, fewer rows per rank"),
    ):
        status, out, err = run(capsys, *arguments, "--checkpoint", policy)
        assert (status, out, err.count("\n")) == (2, "", 1) and line in err


def test_before(capsys):
    status, out, _ = run(
        capsys, "explain", TOY, "--mesh", "tp=2", "--before", "blocks.1", "--no-sequence-parallel"
    )
    assert (
        status == 0
        and "blocks.1, the single-device graph" in out
        and "blocks.1, the graph of one rank of tp=2" in out
    )
    assert "linear(sum_gradient_1, up.weight" in out


@pytest.mark.slow
def test_picture_says_where(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "layer.svg"
    for before in ((), ("--before", "blocks.1")):
        status, out, _ = run(capsys, "explain", TOY, "--mesh", "tp=2", "--picture", file, *before)
        assert (
            status == 0
            and out.splitlines()[-1] == f"{before[1] if before else 'blocks.0'}: drawn to {file}"
            and ("local shapes" in out) == bool(before)
        )


def test_passes(capsys):
    status, out, _ = run(capsys, "passes")
    assert status == 0
    assert [line.split()[1] for line in out.splitlines() if line[:2].strip().isdigit()] == [
        p.name for p in tedfx.default_passes()
    ]
    summaries = [
        " ".join(block.split("      (")[0].split("\n")[1:]) for block in re.split(r"\n(?=[ \d]\d  )", out)
    ]
    assert len(summaries) == len(tedfx.default_passes()) and all(
        text.split() and text.rstrip().endswith(".") for text in summaries
    )
    assert "Give every value a type" in out and "requires tensor_plan; provides types" in out


def test_version_and_help(capsys):
    status, out, _ = run(capsys, "--version")
    assert status == 0 and out.strip() == f"tedfx {tedfx.__version__}"
    status, out, _ = run(capsys, "--help")
    assert status == 0 and all(f"\n    {word}" in out for word in ("explain", "passes", "verify"))
    status, out, _ = run(capsys, "explain", "--help")
    assert status == 0 and "tedfx explain mixtral --mesh dp=4,ep=8,tp=4" in out
    assert run(capsys)[0] == 2


@pytest.mark.parametrize(
    "argv,says",
    [
        (
            ["mixtrol", "--mesh", "dp=2"],
            "'mixtrol' is not a model type of transformers, nor package.module:factory; did you mean mixtral",
        ),
        (["mixtral", "--mesh", "dp=two"], "expected axis=size pairs"),
        (["mixtral", "--mesh", "dp=2,pp=2"], "not built yet"),
        (["mixtral", "--mesh", "zz=2"], "mesh axis 'zz' has no role"),
        (
            ["mixtral", "--mesh", "dp=2", "--roles", "expert=tp"],
            "names axis 'tp', but the mesh has axes ('dp',)",
        ),
        (["mixtral", "--mesh", "dp=2", "--roles", "experts=dp"], "unknown role 'experts'"),
        (["mixtral", "--mesh", "dp=2", "--roles", "tp"], "expected role=axis,axis"),
        (["mixtral", "--mesh", "dp=2", "--set", "hidden_size"], "expected key=value"),
        (["mixtral", "--mesh", "dp=2", "--set", "hiddensize=8"], "no such entry; did you mean hidden_size"),
        (
            ["mixtral", "--mesh", "dp=2", "--set", "hidden_size=wide"],
            "--set hidden_size=wide: expected a value like 4096",
        ),
        (
            ["mixtral", "--mesh", "dp=2", "--set", "hidden_size=8.5"],
            "--set hidden_size=8.5: expected a value like 4096",
        ),
        (["mixtral", "--mesh", "dp=2", "--dtype", "int8"], "no floating dtype"),
        (
            ["mixtral", "--mesh", "dp=2"] + ["--set", "hidden_act=nosuch", "num_hidden_layers=1"],
            "mixtral with {",
        ),
        (
            ["tests.report.nowhere:make", "--mesh", "dp=2"],
            "No module named 'tests.report.nowhere'; modules are looked for in the working directory",
        ),
        (
            ["tests.report.nowhere:make", "--mesh", "dp=2", "--picture", "x.docx"],
            "--picture x.docx: write to a name that ends in .svg, .png or .pdf",
        ),
        (["tests.report.toy:nothing", "--mesh", "dp=2"], "has no attribute 'nothing'"),
        (["tests.report.toy:fails", "--mesh", "dp=2"], "raised RuntimeError: no such thing"),
        (["tests.report.toy:a_string", "--mesh", "dp=2"], "returned a str, not a torch.nn.Module"),
        ([TOY, "--mesh", "ep=2"], "no MoE layer was found"),
        ([TOY, "--mesh", "dp=2", "--outputs", "losses"], "the model's outputs are loss, logits"),
        ([TOY, "--mesh", "dp=2", "--set", "depth=3"], "unexpected keyword argument 'depth'"),
    ],
)
def test_refused(capsys, argv, says):
    status, out, err = run(capsys, "explain", *argv)
    assert status == 2 and out == ""
    assert says in err and err.startswith("tedfx: ") and err.count("\n") == 1


def test_arguments():
    assert parse_roles(["expert=ep,tp"]) == {"expert": ("ep", "tp")}
    assert (
        parse_roles(["expert=ep+tp,batch=dp"])
        == parse_roles(["expert=ep,tp", "batch=dp"])
        == {"expert": ("ep", "tp"), "batch": ("dp",)}
    )
    assert parse_roles(["expert_tensor="]) == {"expert_tensor": ()}
    assert parse_overrides(["a=1", "b.c=true", "b.d=[1, 2]", "e=silu", "f=1e-3", "g=None"]) == {
        "a": 1,
        "b": {"c": True, "d": [1, 2]},
        "e": "silu",
        "f": 1e-3,
        "g": None,
    }
    with pytest.raises(ConfigError, match="has a value already"):
        parse_overrides(["a=1", "a.b=2"])
    with pytest.raises(ConfigError, match="'silu'"):
        parse_overrides(["silu"])


def test_verify_is_handed_on(monkeypatch):
    monkeypatch.setattr(command, "run", lambda options: 1 if options.model == "bad" else 0)
    asked = [["verify", name, "--mesh", "dp=2"] for name in ("good", "bad")]
    assert [*map(main, asked), main(["verify", "good"])] == [0, 1, 2]


@pytest.mark.slow
def test_memory(capsys):
    """What a rank holds is told in one line; where that is too much, in two."""
    arguments = ["explain", TOY, "--mesh", "dp=2", "--batch", 2, "--sequence", 8]
    held = r"\nmemory +~[\d.]+ KiB at the peak of a training step: parameters [\d.]+ KiB, gradients"
    for limit, warned in (("1MiB", False), ("10kB", False), ("10KB", True)):
        status, out, err = run(capsys, *arguments, "--memory", limit)
        if limit == "10kB":  # no unit
            assert (status, out) == (2, "") and "--memory '10kB': a number of bytes, such as 80GiB" in err
            continue
        assert status == 0 and re.search(held, out)
        assert (
            bool(re.search(r"\nwarning +that is ~[\d.]+ KiB more than the 9.766 KiB that a rank has\n", out))
            == warned
        )
    status, out, _ = run(capsys, *arguments, "--format", "json")
    memory = json.loads(out)["memory"]
    assert memory["peak"] == sum(value for name, value in memory.items() if name != "peak")
