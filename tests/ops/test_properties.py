"""What ops say they are, against what they are."""

import inspect

import torch

from tedfx import ops
from tedfx.analysis.sends import OTHER
from tedfx.graph.aliases import may_alias, returns_alias
from tedfx.ops.properties import described


def test_every_op_of_a_local_graph_says_what_it_is():
    """The single-device forms are operators of torch's; all other functions are in a local graph."""
    single = {ops.combine, ops.dispatch, ops.expert_rows, ops.grouped_linear}
    context = {ops.count_collectives, ops.count_events, ops.current, ops.totals, ops.use}
    functions = {f for f in vars(ops).values() if inspect.isfunction(f)} - single - context
    said = described()
    assert functions <= said.keys(), functions - said.keys()
    assert {t for t in said if isinstance(t, torch._ops.OpOverload)} == {
        getattr(torch.ops.tedfx, f.__name__).default for f in single - {ops.dispatch}
    }


def test_an_amount_that_is_no_operands_has_a_formula():
    other = {
        target
        for target, what in described().items()
        if any(moves is not None and moves.operand == "other" for moves in (what.forward, what.backward))
    }
    assert other == OTHER.keys()


def test_what_a_collective_depends_on_is_an_argument():
    for target, what in described().items():
        for moves in (what.forward, what.backward):
            if moves is not None:
                names = inspect.signature(target).parameters
                assert {"axes", *moves.when} <= names.keys(), target


def test_views_are_those_of_the_schemas():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    aten = torch.ops.aten
    call = lambda target, *args: graph.call_function(target, (x, *args))
    for view in (aten.view.default, aten.unsqueeze.default, aten.view_as_complex.default, aten.real.default):
        assert returns_alias(view) and may_alias(call(view)), view
    assert may_alias(call(aten._unsafe_view.default)) and may_alias(call(ops.sum_gradient))
    assert not any(may_alias(call(f)) for f in (aten.clone.default, aten.add.Tensor, ops.all_reduce, len))
