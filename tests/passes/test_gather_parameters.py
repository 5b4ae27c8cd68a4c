"""`gather_parameters`: which parameters are shares, and where they are gathered."""

import operator

import pytest

from tedfx import ops
from tedfx.compiler import pipeline
from tedfx.errors import ConfigError
from tedfx.options import Options
from tedfx.passes.gather_parameters import GatherParameters
from tedfx.placement.roles import MeshShape, Roles
from tests.passes import models as m
from tests.passes.helpers import calls, find, placeholder, upto


def gathers(program):
    return [
        ([p.name for p in n.args[0]], n.args[1])
        for n in program.graph_module.graph.nodes
        if n.target is ops.gather_parameters
    ]


def test_each_weight_is_gathered_before_its_first_use():
    """up [8, 6], down [6, 8], their biases: outside of indexed layers each use has a gather of its own."""
    program, result = upto(m.make(m.Mlp), "dp=2", m.inputs(), "gather_parameters", zero=3)
    assert result.matches == 4 and result.changes == 4 and {axes for _, axes in gathers(program)} == {("dp",)}
    assert [c for c in calls(program) if c in ("gather_parameters", "linear", "relu")] == [
        "gather_parameters",
        "gather_parameters",
        "linear",
        "relu",
        "gather_parameters",
        "gather_parameters",
        "linear",
    ]
    assert [n.args[3] for n in find(program, "gather_parameters")] == [0, 1, 2, 3]
    up = placeholder(program, "up.weight")
    assert up.meta["local_shape"] == (6, 8) and up.meta["val"].shape == (12, 8)
    assert all(user.target is ops.gather_parameters for user in up.users)


def test_experts_are_cut_over_dp_and_the_rest_over_ep_too():
    program, _ = upto(m.make(m.MoE), "dp=2,ep=2", m.inputs(), "gather_parameters", zero=3)
    axes = {name: axes for names, axes in gathers(program) for name in names}
    router = placeholder(program, "router").name
    assert axes[router] == ("dp", "ep") and set(axes.values()) == {("dp",), ("dp", "ep")}


def test_a_bucket_is_no_larger_than_it_may_be():
    model = m.make(m.Mlp)
    whole, _ = upto(model, "dp=2", m.inputs(), "checkpoint")
    for node in whole.graph_module.graph.nodes:
        node.meta["nn_module_stack"] = {"": ("layers.0", object)}
    GatherParameters()(whole)
    assert [len(names) for names, _ in gathers(whole)] == [4]
    for limit, sizes in (
        (8 * (12 * 8 + 12), [2, 2]),
        (1, [1, 1, 1, 1]),
    ):  # a weight and its bias; a parameter that is larger goes alone
        small, _ = upto(model, "dp=2", m.inputs(), "checkpoint")
        for node in small.graph_module.graph.nodes:
            node.meta["nn_module_stack"] = {"": ("layers.0", object)}
        GatherParameters(bucket_bytes=limit)(small)
        assert [len(names) for names, _ in gathers(small)] == sizes


def test_compiled_gathers_are_regions_of_their_own():
    program, _ = upto(m.make(m.Mlp), "dp=2", m.inputs(), "checkpoint")
    GatherParameters(compiled=True)(program)
    nodes = [n for n in program.graph_module.graph.nodes if n.target is ops.gather_parameters]
    regions = [n.meta["region"] for n in nodes]
    assert sorted(set(regions)) == list(range(len(nodes))) and all(n.meta["in_graph"] for n in nodes)
    for node in nodes:
        assert all(
            item.target is operator.getitem and item.meta["region"] == node.meta["region"]
            for item in node.users
        )


@pytest.mark.parametrize(
    "mesh, stage, message",
    [
        ("tp=2", 3, "zero=3 needs a data axis larger than 1, and mesh tp=2 has none"),
        ("dp=2", 4, "zero=4: a stage of ZeRO is 0, 1, 2 or 3"),
    ],
)
def test_wrong_stages(mesh, stage, message):
    with pytest.raises(ConfigError, match=message):
        pipeline(Options(zero=stage), Roles.resolve(MeshShape.of(mesh)))
