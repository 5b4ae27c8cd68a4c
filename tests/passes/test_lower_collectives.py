"""`lower_collectives`: the table of conversions, one axis on top of another, and what the ops then
compute."""

import pytest
import torch
from torch import fx
from torch.nn import functional

from tedfx import ops
from tedfx.compiler import compile_graph, default_passes
from tedfx.errors import CaptureError, TypeCheckError
from tedfx.graph.nodes import op_name
from tedfx.passes.lower_collectives import LowerCollectives
from tedfx.passes.place import convert
from tedfx.placement.factors import Factor
from tedfx.placement.types import I, P, R, Shard
from tests.graphs import typed_graph
from tests.passes import models as m
from tests.passes.helpers import find, global_graph, run_ranks, upto
from tests.rules.simulate import Ranks, cotangent, join, noise, same, split

B, O, F = "batch", "outer", "inner"


def chain(mesh: str, start: dict, steps):
    """x[4, 2 x 8] of type `start` through `convert` nodes; steps are (value index, axis, target)."""
    batch, outer, inner = Factor(4, B), Factor(2, O), Factor(8, F)
    factors = {B: Shard(batch), O: Shard(outer), F: Shard(inner)}
    place = lambda p: factors.get(p, p)
    dims = [(batch,), (outer, inner)]
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta.update(
        dims=dims, type={a: place(p) for a, p in start.items()}, val=torch.zeros(4, 16), differentiable=True
    )
    values = [x]
    for index, axis, target in steps:
        value = values[index]
        source, target = value.meta["type"][axis], place(target)
        node = graph.call_function(convert, (value, axis, str(source), str(target)))
        node.meta.update(
            dims=dims,
            type={**value.meta["type"], axis: target},
            conversion=((axis,), source, target),
            val=x.meta["val"],
        )
        values.append(node)
    used = {index for index, _, _ in steps}
    outputs = [v for i, v in enumerate(values) if i not in used]
    graph.output(tuple(outputs))
    return typed_graph(graph, mesh)


def compare(program, mesh: str):
    """Every output on the ranks, and the gradient of x, are those of the identity."""
    graph = program.graph_module.graph
    sizes = dict(zip(program.roles.mesh.names, program.roles.mesh.sizes))
    (x,) = graph.find_nodes(op="placeholder")
    (output,) = graph.find_nodes(op="output")
    outs = list(output.args[0])
    g = torch.Generator().manual_seed(2)
    value = torch.randn(4, 16, dtype=torch.float64, generator=g)
    cotangents = [noise(value, g) for _ in outs]
    held = split(value, x.meta["dims"], x.meta["type"], sizes, generator=g)
    sent = [
        split(c, n.meta["dims"], cotangent(n.meta["type"]), sizes, generator=g)
        for c, n in zip(cotangents, outs)
    ]

    def work(rank):
        local = held[rank].clone().requires_grad_()
        results = fx.Interpreter(program.graph_module).run(local)
        return [r.detach() for r in results], torch.autograd.grad(results, local, [s[rank] for s in sent])[0]

    per_rank = Ranks(sizes).run(work)
    for i, node in enumerate(outs):
        same(
            join([r[i] for r, _ in per_rank], node.meta["dims"], node.meta["type"], sizes),
            value,
            f"{mesh}: {node.meta['type']}",
        )
    same(
        join([grad for _, grad in per_rank], x.meta["dims"], cotangent(x.meta["type"]), sizes),
        sum(cotangents),
        "gradient",
    )


TABLE = [
    (P, I, ops.all_reduce, ()),
    (I, R, ops.sum_gradient, ()),
    (F, R, ops.all_gather, (1, 2, "R")),
    (F, I, ops.all_gather, (1, 2, "I")),
    (B, R, ops.all_gather, (0, 1, "R")),
    (P, F, ops.reduce_scatter, (1, 2)),
    (R, F, ops.shard, (1, 2, "R")),
    (I, O, ops.shard, (1, 1, "I")),
    (R, P, ops.partial, ("R",)),
    (I, P, ops.partial, ("I",)),
]


@pytest.mark.parametrize("source, target, op, extra", TABLE, ids=lambda v: getattr(v, "__name__", str(v)))
@pytest.mark.parametrize("mesh", ["tp=2", "dp=2,tp=2"])
def test_the_table(source, target, op, extra, mesh):
    program = chain(mesh, {"dp": I, "tp": source} if "dp" in mesh else {"tp": source}, [(0, "tp", target)])
    result = LowerCollectives()(program)
    (node,) = [n for n in program.graph_module.graph.nodes if n.op == "call_function"]
    assert (node.target, node.args[1], node.args[2:]) == (op, ("tp",), extra)
    assert result.matches == result.changes == 1 and node.meta["conversion"][0] == ("tp",)
    compare(program, mesh)


@pytest.mark.parametrize(
    "start, target, first",
    [
        ({"dp": P, "tp": P}, I, "dp"),
        ({"dp": I, "tp": I}, R, "tp"),
        ({"dp": B, "tp": B}, R, "dp"),
        ({"dp": B, "tp": B}, I, "tp"),
        ({"dp": I, "tp": I}, B, "dp"),
        ({"dp": P, "tp": P}, F, "dp"),
    ],
)
def test_the_same_conversion_on_two_axes_is_one_op(start, target, first):
    """convert(convert(x, dp), tp) -> op(x, (dp, tp)), the major axis first in whichever order they stood."""
    second = "tp" if first == "dp" else "dp"
    program = chain("dp=2,tp=2", start, [(0, first, target), (1, second, target)])
    LowerCollectives()(program)
    (node,) = [n for n in program.graph_module.graph.nodes if n.op == "call_function"]
    assert node.args[1] == ("dp", "tp")
    compare(program, "dp=2,tp=2")


def test_a_value_in_between_that_has_another_user_keeps_two_ops():
    """P,P -> I,P -> I,I and I,P out."""
    program = chain("dp=2,tp=2", {"dp": P, "tp": P}, [(0, "dp", I), (1, "tp", I), (1, "tp", B)])
    LowerCollectives()(program)
    assert len([n for n in program.graph_module.graph.nodes if n.op == "call_function"]) == 3
    compare(program, "dp=2,tp=2")


def test_a_factor_over_two_axes_gathered_for_two_kinds_of_users():
    """S,S -> (tp R) -> (dp R) and (dp I): no merge, so the minor axis must be gathered first.

    The other order would interleave pieces and is refused.
    """
    program = chain("dp=2,tp=2", {"dp": B, "tp": B}, [(0, "tp", R), (1, "dp", R), (1, "dp", I)])
    LowerCollectives()(program)
    compare(program, "dp=2,tp=2")
    wrong = chain("dp=2,tp=2", {"dp": B, "tp": B}, [(0, "dp", R), (1, "tp", R), (1, "tp", I)])
    with pytest.raises(TypeCheckError, match="minor axis tp"):
        LowerCollectives()(wrong)


@pytest.mark.parametrize("length", [4, 3])
def test_a_dropout_draws_on_the_slice_that_is_left(length):
    """dropout(P) -> scatter becomes scatter -> dropout, at the same place in the order of draws.

    The masks are those of one rank.
    """
    model = m.Fn(lambda s, x: block(s, block(s, x)).square().mean(), up=(8, 16), down=(16, 8), norm=(8,))
    runs = []
    for mesh in ("tp=1", "tp=2"):
        program = compile_graph(global_graph(model, mesh, m.inputs(length=length)), default_passes())
        runs.append(run_ranks(program, model, m.inputs(length=length)))
    first, second = find(
        program, "dropout"
    )  # the first is added to x, whole on each rank, before the sum is scattered
    assert op_name(first.args[0]) == "aten.matmul" and second.args[0].target is ops.reduce_scatter
    (one, one_gradients), (many, gradients) = runs
    same(many[0], one[0], "loss")
    for name, gradient in gradients.items():
        same(gradient, one_gradients[name], name)


def test_a_dropout_that_others_read_stays():
    """Its partial sum itself is asked for as well: two reductions either way, and one draw."""
    model = m.Fn(
        lambda s, x: twice(functional.dropout((x @ s.up).relu() @ s.down, 0.5), x), up=(8, 16), down=(16, 8)
    )
    program, _ = upto(model, "tp=2", m.inputs(length=4), "lower_collectives", sequence_parallel=True)
    (node,) = find(program, "dropout")
    assert len(node.users) > 1 and op_name(node.args[0]) == "aten.matmul"


def block(s, x):
    return x + functional.dropout((functional.layer_norm(x, (8,), s.norm) @ s.up).relu() @ s.down, 0.5)


def twice(y, x):
    return (x + y).square().mean() + y.sum() + y.sum(1).square().mean()


def test_rows_of_experts_are_not_gathered():
    """Each rank has another number of them, which an all-gather does not know."""
    program = chain("ep=2", {"ep": B}, [(0, "ep", R)])
    (x,) = program.graph_module.graph.find_nodes(op="placeholder")
    x.meta["dims"][0][0].ragged = True
    with pytest.raises(CaptureError, match="would need the rows of all experts on every rank"):
        LowerCollectives()(program)
