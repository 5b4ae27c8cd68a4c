"""`check_types` accepts what `place` made, and refuses every single fault put into it."""

import functools
from dataclasses import replace

import pytest
from torch import fx

from tedfx.errors import TypeCheckError
from tedfx.passes.check_types import check_types
from tedfx.passes.place import convert
from tedfx.placement.types import I, P, R, Shard
from tests.passes import models as m
from tests.passes.helpers import upto

GRAPHS = {
    "lm": (m.LM, m.tokens, "dp=2,tp=2", None),
    "attention": (m.Attention, m.inputs, "dp=2,tp=2", None),
    "moe": (m.MoE, m.inputs, "dp=2,ep=2,tp=2", None),
    "ppmoe": (m.MoE, m.inputs, "tp=2", {"expert": ("tp",)}),
    "folded": (m.MoE, m.inputs, "ep=2,tp=2", {"expert": ("ep", "tp")}),
}


@functools.cache
def _placed(name):
    kind, call, mesh, roles = GRAPHS[name]
    return upto(m.make(kind), mesh, call(), "place", roles)[0]


def placed(name):
    """A copy to operate on: graph and types; the factors are shared."""
    program, graph = _placed(name), fx.Graph()
    graph.output(graph.graph_copy(program.graph_module.graph, {}))
    return replace(program, trace=replace(program.trace, graph_module=fx.GraphModule({}, graph)))


def faults(name, make):
    """Apply `make(program, k-th conversion)` to a fresh program for every k; the conversions whose fault was
    not seen."""
    number = len([n for n in placed(name).graph_module.graph.nodes if n.target is convert])
    assert number
    unseen = []
    for k in range(number):
        program = placed(name)
        node = [n for n in program.graph_module.graph.nodes if n.target is convert][k]
        what = (
            f"{node.name} {node.meta['conversion']} of {node.args[0].name} for {[u.name for u in node.users]}"
        )
        if make(program, node) is False:
            continue
        try:
            check_types(program)
            unseen.append(what)
        except TypeCheckError:
            pass
    assert not unseen, "\n".join(unseen)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_placed_graph_passes(name):
    assert check_types(placed(name)) > 10


@pytest.mark.parametrize("name", GRAPHS)
def test_a_dropped_conversion_is_seen(name):
    def drop(program, node):
        node.replace_all_uses_with(node.args[0])
        program.graph_module.graph.erase_node(node)

    faults(name, drop)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_doubled_conversion_is_seen(name):
    def double(program, node):
        with program.graph_module.graph.inserting_after(node):
            again = program.graph_module.graph.call_function(convert, (node, *node.args[1:]))
        again.meta.update(node.meta)
        node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)

    faults(name, double)


@pytest.mark.parametrize("name", [n for n in GRAPHS if n != "ppmoe"])
def test_a_conversion_on_another_axis_is_seen(name):
    def swap(program, node):
        (axis,), source, target = node.meta["conversion"]
        other = next(a for a in program.plan.axes if a != axis)
        node.meta["conversion"] = ((other,), source, target)

    faults(name, swap)


@pytest.mark.parametrize("name", GRAPHS)
def test_another_target_is_seen(name):
    def retarget(program, node):
        (axis,), source, target = node.meta["conversion"]
        new = {R: I, I: R, P: I}.get(target, R)
        if not node.meta["differentiable"] and {new, target} <= {R, I}:
            return False
        node.meta["conversion"] = ((axis,), source, new)
        node.meta["type"] = {**node.meta["type"], axis: new}

    faults(name, retarget)


def test_the_message_names_the_node_the_axis_and_the_line():
    program = placed("lm")
    node = next(
        n
        for n in program.graph_module.graph.nodes
        if n.target is convert and n.meta["conversion"] == (("tp",), I, R)
    )
    node.replace_all_uses_with(node.args[0])
    with pytest.raises(TypeCheckError, match=r"after surgery: \w+ on axis tp: .*models\.py:\d+\)"):
        check_types(program, "surgery")


def test_what_was_fine_is_looked_at_again_when_it_changed():
    program, fine = placed("lm"), {}
    assert check_types(program, "", fine) == check_types(program, "", fine) > len(fine) > 5
    node = next(n for n in fine if isinstance(n.meta["type"]["tp"], Shard))
    node.meta["type"]["tp"] = P
    with pytest.raises(TypeCheckError, match="on axis tp"):
        check_types(program, "", fine)


@pytest.mark.parametrize("source, target", [(P, R), (R, I), ("S", P), ("S", "S")])
def test_there_are_conversions_without_an_op(source, target):
    program = placed("attention")
    node = next(n for n in program.graph_module.graph.nodes if n.target is convert)
    axes = node.meta["conversion"][0]
    factor = Shard(program.batch_factor)
    node.meta["conversion"] = (axes, *(factor if p == "S" else p for p in (source, target)))
    with pytest.raises(TypeCheckError, match="there is no conversion"):
        check_types(program)
