"""`tedfx.Options`: what it refuses, how it is read from a command line, and that nobody changes passes after
they are made."""

import argparse
import dataclasses
import importlib.util
import inspect
import pickle
from pathlib import Path

import pytest
import torch

import tedfx
from tedfx import Options
from tedfx.compiler import pipeline
from tedfx.errors import ConfigError
from tedfx.placement.roles import MeshShape, Roles

OTHERS = {  # a value of each field that is not its default, as a command line has it and as it is
    "checkpoint": ("full", "full"),
    "compile": (None, True),
    "outputs": ("loss,logits", ("loss", "logits")),
    "dedup": (None, False),
    "sequence_parallel": (None, False),
    "algebra": (None, False),
    "capacity": ("local", "local"),
    "zero": ("3", 3),
    "precision": ("bf16", "bf16"),
    "gradient_dtype": ("fp32", torch.float32),
    "bucket_bytes": ("7", 7),
    "gather_bytes": ("9", 9),
    "prefetch": ("0", 0),
    "check": ("none", "none"),
    "check_inputs": (None, False),
    "check_timeout": ("1.5", 1.5),
    "progress": (None, False),
}


def parsed(argv, **keywords):
    parser = argparse.ArgumentParser()
    Options.add_arguments(parser, **keywords)
    return parser, Options.from_arguments(parser.parse_args(argv))


def test_a_command_line_of_all_fields():
    argv = []
    for name, (text, value) in OTHERS.items():
        flag = {"check": "check-capture"}.get(name, name.replace("_", "-"))
        argv += [f"--{flag}", text] if text is not None else [f"--{'' if value else 'no-'}{flag}"]
    parser, found = parsed(argv)
    assert {name: getattr(found, name) for name in OTHERS} == {n: value for n, (_, value) in OTHERS.items()}
    assert {*OTHERS, "passes"} == {*Options.names()}
    assert parsed([])[1] == Options() and not parsed([])[1].given
    assert "(default: 26214400)" in parser.format_help() and "(default: yes)" in parser.format_help()
    assert "--zero" not in parsed([], only=["dedup"])[0].format_help()


def test_each_field_is_documented():
    for name in Options.names():
        assert f"\n    {name} " in Options.__doc__, name


def test_what_was_asked_for_is_known():
    asked = Options(zero=3, dedup=True, capacity=None)
    assert asked.given == {"zero", "dedup"} and asked == Options(zero=3) and repr(asked) == "Options(zero=3)"
    assert asked.replace(zero=None) == Options() and asked.replace(algebra=False).given == {
        "zero",
        "dedup",
        "algebra",
    }
    assert str(asked.replace(checkpoint="full", dedup=False)) == "checkpoint full, dedup no, zero 3"
    again = pickle.loads(pickle.dumps(asked))
    assert again == asked and again.given == asked.given
    with pytest.raises(dataclasses.FrozenInstanceError):
        asked.zero = 1


@pytest.mark.parametrize(
    "given, line",
    [
        ({"chekpoint": "full"}, "chekpoint=: there is no such option; did you mean checkpoint"),
        ({"whatever": 1}, "there are passes, checkpoint, compile"),
        ({"capacity": "rank"}, "capacity='rank': one of global, local"),
        ({"check": "all"}, "check='all': one of none, forward, full"),
        ({"zero": 4}, "zero=4: a stage of ZeRO is 0, 1, 2 or 3"),
        ({"zero": True}, "zero=True: a stage of ZeRO is 0, 1, 2 or 3"),
        ({"dedup": "no"}, "dedup='no': True or False"),
        ({"compile": "inductor"}, "compile='inductor': True or False, or a mapping"),
        ({"outputs": "loss"}, "outputs='loss': pass a tuple of names"),
        ({"gather_bytes": 8}, "gather_bytes=8 with zero=0: a whole number of bytes"),
        ({"bucket_bytes": 0}, "bucket_bytes=0: a whole number, at least 1"),
        ({"prefetch": -1}, "prefetch=-1: a whole number, at least 0"),
        ({"gradient_dtype": torch.int8}, "gradient_dtype=torch.int8: a floating-point torch.dtype"),
        ({"check_timeout": 0}, "check_timeout=0: seconds, more than 0"),
        ({"passes": [], "check": "full"}, "passes= and check= together"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_refused(given, line):
    """By the object, before anything is traced, and so by whoever takes it."""
    for take in (
        Options,
        lambda **given: tedfx.parallelize(torch.nn.Linear(2, 2), None, **given),
        lambda **given: tedfx.verify(None, "dp=2", **given),
    ):
        with pytest.raises(ConfigError) as refused:
            take(**given)
        assert line.split("; there are")[0] in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="options=3: a tedfx.Options"):
        tedfx.default_passes(3)


def test_the_nearest_name_may_be_the_functions_own():
    with pytest.raises(ConfigError, match="did you mean example_inputs"):
        tedfx.parallelize(torch.nn.Linear(2, 2), None, exmaple_inputs={})


def test_passes_are_made_with_their_options():
    """And a list of the user's own is taken as it is, or refused where it was made for another kind of
    graph."""
    roles = Roles.resolve(MeshShape.of("dp=2"))
    asked = Options(checkpoint="full", zero=3, gather_bytes=9, compile=True)
    *_, policy, gathers = pipeline(asked, roles)
    assert (policy.policy, policy.decide_again) == ("full", False)
    assert (gathers.bucket_bytes, gathers.compiled) == (9, True)
    assert (
        tedfx.default_passes(asked)
        == pipeline(asked, roles)
        == tedfx.default_passes(**{name: getattr(asked, name) for name in asked.given})
    )
    mine = tedfx.default_passes(asked)
    assert all(a is b for a, b in zip(pipeline(Options(passes=mine, compile=True), roles), mine, strict=True))
    with pytest.raises(ConfigError, match="Checkpoint.* that decides again"):
        pipeline(Options(passes=tedfx.default_passes(checkpoint="full"), compile=True), roles)
    for compiled in (True, False):
        passes = tedfx.default_passes(zero=3, compile=not compiled)
        with pytest.raises(ConfigError, match=f"compile={compiled} and passes= with GatherParameters"):
            pipeline(Options(passes=passes, compile=compiled), roles)


def test_defaults_stand_in_one_place():
    """No function that takes options repeats a field of them."""
    for function in (tedfx.parallelize, tedfx.verify, tedfx.default_passes):
        assert not {*inspect.signature(function).parameters} & {*Options.names()}


def test_the_example_has_them_too():
    pytest.importorskip("transformers")
    path = Path(__file__).parents[1] / "examples" / "pretrain.py"
    spec = importlib.util.spec_from_file_location("pretrain", path)
    pretrain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pretrain)
    args = pretrain.parse_args(["--zero", "1", "--no-check", "--check-capture", "forward", "--prefetch", "3"])
    assert (
        Options.from_arguments(args) == Options(zero=1, check="forward", prefetch=3) and args.check is False
    )
