"""Each row of the collective algebra on a graph small enough to draw: what stands where without it, what with
it, and how many bytes that saves."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from tedfx.analysis.cost import Cost
from tedfx.errors import ConfigError
from tedfx.passes.base import run_pipeline
from tedfx.passes.collective_algebra import ROWS, CollectiveAlgebra
from tests.passes import models as m
from tests.passes.helpers import PLAIN, count, default_passes, global_graph, parity

H, INNER, ROWS_PER_RANK = 8, 32, 12  # of m.inputs() on one batch rank: 4 x 3 tokens, float64


def compiled(model, mesh, rows, call=None, **options):
    """The local graph with these rows of the algebra only, and {(phase, collective, axes): (how many,
    bytes)}."""
    program = global_graph(model, mesh, call or m.inputs())
    passes = [
        CollectiveAlgebra(rows) if isinstance(p, CollectiveAlgebra) else p
        for p in default_passes(**{**PLAIN, **options})
    ]
    program = run_pipeline(program, passes)
    ranks = program.roles.mesh.size(program.roles.mesh.wide(program.roles.batch))
    cost, values = (
        Cost(program),
        {"batch": (call or m.inputs())["x"].shape[0] // ranks, "sequence": 3, "x_1": 3},
    )
    found = {}
    for item in cost.items:
        n, total = found.get((item.phase, item.op, item.axes), (0, 0))
        found[item.phase, item.op, item.axes] = (n + 1, total + cost.number(item.payload, values))
    return program, found


def sums(found, phase="forward", axes=("tp",)):
    return found.get((phase, "all_reduce", axes), (0, 0))


def pair(up, down, x):
    """Column-parallel, then row-parallel: a partial sum."""
    return torch.relu(x @ up) @ down


TOKENS = ROWS_PER_RANK * H * 8


def test_merge_two_branches_are_summed_once():
    """relu(x a) b + relu(x c) d: P + P, then one all-reduce; without the row each branch has its own."""
    model = m.Fn(
        lambda s, x: torch.tanh(pair(s.a, s.b, x) + pair(s.c, s.d, x)).add(x).square().sum(),
        a=(H, INNER),
        b=(INNER, H),
        c=(H, INNER),
        d=(INNER, H),
    )
    assert sums(compiled(model, "tp=2", ())[1]) == (2, 2 * TOKENS)
    assert sums(compiled(model, "tp=2", ("merge",))[1]) == (1, TOKENS)


def test_merge_a_bias_enters_the_sum_on_one_rank():
    """sum + b: with the row b is added before the all-reduce, on coordinate 0; the bytes are the same."""
    model = m.Fn(
        lambda s, x: torch.tanh(pair(s.a, s.b, x) + s.c).add(x).square().sum(),
        a=(H, INNER),
        b=(INNER, H),
        c=(H,),
    )
    for rows, partial in ((), 0), (("merge",), 1):
        program, found = compiled(model, "tp=2", rows)
        assert count(program, "partial") == {"partial": partial} and sums(found) == (1, TOKENS)


def test_delay_a_linear_op_that_shrinks_a_sum_goes_first():
    """sum over tokens of a partial sum: the all-reduce is of one row, not of all."""
    model = m.Fn(
        lambda s, x: torch.tanh(pair(s.a, s.b, x).sum((0, 1))).add(x).square().sum(),
        a=(H, INNER),
        b=(INNER, H),
    )
    assert sums(compiled(model, "tp=2", ())[1]) == (1, TOKENS)
    assert sums(compiled(model, "tp=2", ("delay",))[1]) == (1, H * 8)


def test_delay_does_not_enlarge_a_sum():
    """A linear op with a larger result comes behind the all-reduce, rows or not."""
    model = m.Fn(
        lambda s, x: torch.tanh(torch.stack([pair(s.a, s.b, x)] * 2).mul(2.0)).add(x).square().sum(),
        a=(H, INNER),
        b=(INNER, H),
    )
    for rows in ((), ("delay",), ("delay", "merge")):
        assert sums(compiled(model, "tp=2", rows)[1])[1] == TOKENS


def test_scatter_a_sum_of_which_a_slice_is_used():
    """Under sequence parallelism a partial sum is sliced along the tokens: reduce-scatter for all-reduce and
    slice; and in backward of the gather in front of it."""

    def fn(s, x):
        h = x * s.w
        h = F.layer_norm(h + pair(s.a, s.b, torch.tanh(h)), (H,)) * s.v
        return (h + pair(s.c, s.d, h)).square().mean()

    model = m.Fn(fn, w=(H,), v=(H,), a=(H, INNER), b=(INNER, H), c=(H, INNER), d=(INNER, H))
    _, without = compiled(model, "tp=2", (), sequence_parallel=True)
    assert (
        sums(without)[0] == 2 + 1
        and sums(without, "backward")[0] == 2
        and ("forward", "reduce_scatter_tensor", ("tp",)) not in without
    )  # the loss is the third
    program, found = compiled(model, "tp=2", ("scatter",), sequence_parallel=True)
    assert (
        sums(found)[0] == 1 and sums(found, "backward")[0] == 1
    )  # the loss; the first pair reads what was never cut
    assert found["forward", "reduce_scatter_tensor", ("tp",)] == (2, 2 * TOKENS) and found[
        "backward", "reduce_scatter_tensor", ("tp",)
    ] == (1, TOKENS)
    wire = lambda p: sum(
        cost.number(i.payload, {"batch": 4, "sequence": 3, "x_1": 3}) * i.factor
        for cost in [Cost(p)]
        for i in cost.items
        if i.axes == ("tp",)
    )
    assert wire(program) < wire(compiled(model, "tp=2", (), sequence_parallel=True)[0])


@pytest.mark.parametrize("dedup", [False, True])
def test_commute_tokens_are_gathered_and_summed_not_their_rows(dedup):
    """DeepSpeed-TED's order: rows are sliced, gathered, summed and gathered again, k of them per token. With
    the algebra: tokens wherever it can be."""
    call, model = m.inputs(8), m.Fn(lambda s, x: s.inner(x * s.w), w=(H,))
    model.inner = m.MoE(bias=False)
    tokens, top = 4 * 3, 2  # a rank's share of the batch
    rows = tokens * top * H * 8
    _, plain = compiled(model, "ep=2,tp=2", (), call, dedup=dedup)
    plain = {k: v for k, v in plain.items() if k[2] == ("tp",)}
    assert plain["forward", "all_reduce", ("tp",)] == (1, rows)
    assert plain["backward", "all_reduce", ("tp",)] == (1, rows)
    gathers = ("all_gather_into_tensor", ("tp",))
    half = rows // 2  # the payload of a gather over two is a half
    assert (
        plain.get(("forward", *gathers))
        == ((2, 2 * half) if dedup else None)
        == plain.get(("backward", *gathers))
    )

    program, found = compiled(model, "ep=2,tp=2", CollectiveAlgebra().rows, call, dedup=dedup)
    found = {k: v for k, v in found.items() if k[2] == ("tp",)}
    if dedup:  # the lanes, and tokens behind the combine; sums are scattered
        assert count(program, "gather_lanes", "scatter_lanes") == {"gather_lanes": 1, "scatter_lanes": 1}
        assert found["forward", *gathers] == (2, half + half // top) and found[
            "forward", "reduce_scatter_tensor", ("tp",)
        ] == (1, rows)
        assert ("forward", "all_reduce", ("tp",)) not in found
    else:
        assert sums(found) == (1, rows // top) and sums(found, "backward") == (
            2,
            rows // top + tokens * top * 8,
        )  # the other: of the combine's weights


@pytest.mark.parametrize("row", [row.name for row in ROWS])
@pytest.mark.parametrize("switches", [{}, {"dedup": True}, {"sequence_parallel": True}], ids=str)
def test_each_row_alone_is_the_single_device_function(row, switches, monkeypatch):
    monkeypatch.setattr(
        "tests.passes.helpers.default_passes",
        lambda **o: [
            CollectiveAlgebra((row,)) if isinstance(p, CollectiveAlgebra) else p for p in default_passes(**o)
        ],
    )
    parity(m.make(m.MoE), "ep=2,tp=2", m.inputs(8), **switches)


@pytest.mark.parametrize("switches", [{}, {"dedup": True}, {"sequence_parallel": True}], ids=str)
@pytest.mark.parametrize(
    "mesh, roles",
    [("ep=2,tp=2", None), ("tp=2,ep=2", {"expert": ("ep", "tp")}), ("dp=2,tp=2", {"expert": ("tp",)})],
)
def test_without_any_row_it_is_the_single_device_function(mesh, roles, switches):
    parity(m.make(m.MoE), mesh, m.inputs(8), roles, algebra=False, **switches)


@pytest.mark.parametrize(
    "options",
    [{}, {"sequence_parallel": True}, {"algebra": False}, {"dedup": True, "algebra": False}],
    ids=str,
)
def test_no_gather_of_a_slice_and_nothing_twice(options):
    """What needs no row: no conversion undoes another, and no value is converted twice in the same way."""
    program, _ = compiled(m.make(m.MoE), "ep=2,tp=2", CollectiveAlgebra().rows, m.inputs(8), **options)
    nodes = [n for n in program.graph_module.graph.nodes if "conversion" in n.meta]
    assert not [
        n
        for n in nodes
        if "conversion" in n.args[0].meta and n.meta["type"] == n.args[0].args[0].meta.get("type")
    ]
    assert max(Counter((n.target, *map(str, n.args)) for n in nodes).values()) == 1


def test_a_row_that_does_not_exist():
    with pytest.raises(ConfigError, match="no row 'split': its rows are merge, delay"):
        CollectiveAlgebra(("split",))
