"""`annotate`: factors of every dim, barriers where two factorisations do not agree."""

import pytest
import torch

from tedfx.placement.factors import dim_size, leaves
from tests.passes import models as m
from tests.passes.helpers import find, placeholder, upto


def sizes(node):
    return [tuple(f.size for f in leaves(d)) for d in node.meta["dims"]]


@pytest.mark.parametrize("degree, barriers", [(1, 0), (2, 0), (4, 2)])
def test_grouped_heads_stay_heads_where_their_parts_would_not_divide(degree, barriers):
    """k[b, 2, s, 4] -> [:, :, None] -> expand 2 -> reshape to 4 heads -> attention with q[b, 4, s, 4].

    The heads of q become (2, 2) on one or two ranks. On four they stay 4 heads: keys and values pass a
    barrier each and are whole there.
    """
    program, result = upto(m.make(m.Attention, 4, 2), f"tp={degree}", m.inputs(), "annotate")
    assert result.changes == barriers == len(find(program, "regroup_barrier"))
    heads = sizes(placeholder(program, "q.weight"))[0]
    assert heads == ((4, 4) if degree == 4 else (2, 2, 4))
    for node in find(program, "regroup_barrier"):
        (whole,) = node.meta["relation"].whole.values()
        assert dim_size(whole) == 4 and node.meta["relation"].created


@pytest.mark.parametrize("interleaved, expected", [(False, (2, 4)), (True, (4, 2))])
def test_a_fused_projection_is_refined_where_a_later_op_cuts_it(interleaved, expected):
    """linear -> chunk(2) or [::2], [1::2]: the weight's dim 0 is (2, F) or (F, 2), and F is that of down's
    dim 1."""
    program, _ = upto(m.make(m.GateUp, interleaved=interleaved), "tp=2", m.inputs(), "annotate")
    assert sizes(placeholder(program, "gate_up.weight")) == [expected, (8,)]
    inner = leaves(placeholder(program, "gate_up.weight").meta["dims"][0])[1 - interleaved]
    assert leaves(placeholder(program, "down.weight").meta["dims"][1]) == (inner,)
    assert (
        placeholder(program, "gate_up.weight").meta["dims"][1][0].root()
        is placeholder(program, "down.weight").meta["dims"][0][0].root()
    )


def test_the_batch_is_one_factor_everywhere():
    """x[B, S, 8] -> flatten -> router, dispatch: N is (B, S), rows are ragged, experts tie weights."""
    program, _ = upto(m.make(m.MoE), "dp=2", m.inputs(), "annotate")
    x = placeholder(program, "x")
    assert x.meta["dims"][0] == (program.batch_factor,) and program.batch_factor.name == "B"
    (dispatch,) = find(program, "dispatch")
    rows, counts, order = dispatch.meta["dims_of"]
    assert leaves(dispatch.args[0].meta["dims"][0])[0] is program.batch_factor
    assert rows[0][0].ragged and leaves(rows[0]) == leaves(order[0])
    experts = leaves(counts[0])
    assert (
        experts
        == leaves(placeholder(program, "up").meta["dims"][0])
        == leaves(placeholder(program, "down_bias").meta["dims"][0])
    )
    assert experts != leaves(placeholder(program, "router").meta["dims"][0])


def test_differentiable_follows_parameters_and_stops_at_integers_and_detach():
    model = m.Fn(
        lambda s, x: ((x * 2 + s.w).detach() * s.w).argmax(-1).sum() * (x * x).sum() + (x * s.w).sum(), w=(8,)
    )
    program, _ = upto(model, "dp=2", m.inputs(), "annotate")
    flag = {
        n.name: n.meta["differentiable"]
        for n in program.graph_module.graph.nodes
        if "differentiable" in n.meta
    }
    (detached,) = find(program, "detach")
    assert (
        flag["p_w"]
        and not flag["x"]
        and flag["add"]
        and not flag[detached.name]
        and flag["mul_1"]
        and not flag["argmax"]
        and not flag["sum_1"]
    )


def test_an_op_without_a_rule_is_replicated_and_noted():
    program, result = upto(
        m.Fn(lambda s, x: torch.linalg.svdvals(x * s.w).sum(), w=(8,)), "tp=2", m.inputs(), "annotate"
    )
    assert any("svdvals" in note and "has no rule" in note for note in result.notes)
    relation = find(program, "linalg_svdvals")[0].meta["relation"]
    assert len(relation.whole[0]) == 3
