"""`checkpoint`: which nodes become regions, that regions are convex, what they keep, and that what is emitted
computes the same."""

import gc
import operator
import random
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import tedfx
from tedfx.analysis.activations import Ledger, Sizing
from tedfx.analysis.attention_cores import attention_cores
from tedfx.analysis.cost import Cost
from tedfx.analysis.layers import layer_of, path_of
from tedfx.analysis.saved import saved, saves
from tedfx.compiler import compile_graph, default_passes, pipeline
from tedfx.errors import ConfigError, TedfxError
from tedfx.graph.emission import emit, schedule
from tedfx.graph.nodes import short_name
from tedfx.options import parse_policy
from tedfx.passes.checkpoint import (
    Checkpoint,
    assert_no_recomputed_collectives,
    barrier,
    communicating_nodes,
    regions_of,
)
from tedfx.placement.roles import MeshShape, Roles
from tests.marks import slow
from tests.passes import models as m
from tests.passes.helpers import find, global_graph, run_ranks


class Layers(nn.Module):
    """Two layers of attention and a mixture, embedding and head left out."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


class Block(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.norm, self.attention, self.mixture = nn.LayerNorm(8, dtype=m.DTYPE), Attend(dropout), Mix()

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mixture(x)


class Attend(m.Attention):
    def __init__(self, dropout):
        super().__init__(dropout=dropout)
        torch.nn.init.normal_(self.q.weight)

    def forward(self, x):
        b, s = x.shape[:2]
        q, k, v = (w(x).view(b, s, self.heads, self.head).transpose(1, 2) for w in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout)
        return self.o(y.transpose(1, 2).reshape(b, s, -1))


class Mix(m.MoE):
    def forward(self, x):
        flat = x.flatten(0, 1)
        weights, ids = F.linear(flat, self.router).softmax(-1).topk(self.top, -1)
        rows, counts, order = m.moe.dispatch(flat, ids, self.experts)
        h = m.moe.grouped_linear(rows, self.up, counts)
        h = torch.tanh(h + m.moe.expert_rows(self.up_bias, counts, h))
        return m.moe.combine(m.moe.grouped_linear(h, self.down, counts), order, weights).view_as(x)


def compiled(policy, mesh="ep=2,tp=2", model=None, call=None, **options):
    model, call = model or m.make(Layers), call or m.inputs()
    program = global_graph(model, mesh, call, example=True)
    return compile_graph(program, [*default_passes()[:-1], Checkpoint(policy, **options)])


def regions(program) -> dict[int, list[fx.Node]]:
    found = {}
    for node in program.graph_module.graph.nodes:
        if "region" in node.meta:
            found.setdefault(node.meta["region"], []).append(node)
    return found


# ---- which nodes -------------------------------------------------------------------------------------------


def test_none_changes_nothing():
    program = compiled("none")
    assert regions(program) == {} and emit(program.graph_module) is program.graph_module


@pytest.mark.parametrize("mesh", ["ep=2,tp=2", "tp=2", "dp=2"])
def test_comm_regions_hold_local_work_only(mesh):
    program = compiled("comm", mesh)
    found = regions(program)
    inside = {short_name(n) for nodes in found.values() for n in nodes}
    assert {"layer_norm", "scaled_dot_product_attention", "grouped_linear", "tanh"} <= inside
    assert not inside & {"all_reduce", "all_to_all_single", "exchange_counts", "route", "topk"}
    assert_no_recomputed_collectives(program)
    for nodes in found.values():
        assert any(saves(n) for n in nodes)
        assert len({layer_of(path_of(n)) for n in nodes} - {""}) == 1


def test_every_collective_of_the_cost_is_a_barrier():
    program = compiled("none")
    names = communicating_nodes(program)
    assert {short_name(n) for n in program.graph_module.graph.nodes if n.name in names} >= {
        "all_reduce",
        "all_to_all_single",
        "exchange_counts",
    }
    for node in program.graph_module.graph.nodes:
        if node.op == "call_function":
            assert bool(barrier(node, names)) == (
                node.name in names or short_name(node) in ("topk", "route")
            ), node


def test_a_collective_in_a_region_is_refused():
    program = compiled("comm")
    (first, *_) = find(program, "all_to_all_single")
    first.meta["region"] = 99
    with pytest.raises(TedfxError, match="all_to_all_single is recomputed in region 99, but it communicates"):
        assert_no_recomputed_collectives(program)
    del first.meta["region"]
    find(program, "topk")[0].meta["region"] = 98
    with pytest.raises(TedfxError, match="decides a routing"):
        assert_no_recomputed_collectives(program)


def test_full_takes_layers_whole_and_costs_what_it_repeats():
    program = compiled("full")
    found = regions(program)
    inside = [short_name(n) for nodes in found.values() for n in nodes]
    assert inside.count("all_to_all_single") == 4 and inside.count("topk") == 2
    phases = {
        phase: sum(i.op == "all_to_all_single" for i in Cost(program).items if i.phase == phase)
        for phase in ("forward", "recompute", "backward")
    }
    assert phases == {"forward": 4, "recompute": 4, "backward": 4}
    with pytest.raises(TedfxError):
        assert_no_recomputed_collectives(program)


@pytest.mark.parametrize("dropout", [0.0, slow(0.5)])
def test_selective_takes_the_cores_of_attention(dropout):
    program = compiled("selective", model=m.make(Layers, dropout))
    names = [[short_name(n) for n in nodes] for nodes in regions(program).values()]
    if dropout:
        assert len(names) == 2 and all(
            n[0] == n[-1] == "matmul" and {"softmax", "dropout"} <= set(n) for n in names
        )
    else:
        assert names == [["scaled_dot_product_attention"]] * 2


def test_a_softmax_over_a_product_with_a_parameter_is_no_attention():
    program = compiled(
        "none", "dp=1", m.Fn(lambda s, x: ((x @ s.w).softmax(-1) @ s.v).square().sum(), w=(8, 4), v=(4, 8))
    )
    assert find(program, "softmax") and attention_cores(program.graph_module.graph) == []


# ---- convexity ---------------------------------------------------------------------------------------------


def random_graph(seed: int):
    """A graph of sums, with labels; values grow with depth, so that a wrong order or operand shows."""
    draw, graph = random.Random(seed), fx.Graph()
    nodes, label = [graph.placeholder(f"x{i}") for i in range(2)], {}
    for i in range(draw.randint(5, 40)):
        new = graph.call_function(operator.add, (draw.choice(nodes[-8:]), draw.choice(nodes)))
        if i % 3 == 0:
            new = graph.call_function(operator.mul, (new, 1.01 + i / 7))
        nodes.append(new)
    for node in nodes[2:]:
        label[node] = draw.choice([None, "a", "a", "b"])
    graph.output(tuple(nodes[-3:]))
    graph.lint()
    return graph, label


@pytest.mark.parametrize("seed", range(60))
def test_regions_are_convex_and_what_is_emitted_computes_the_same(seed):
    graph, label = random_graph(seed)
    found = regions_of(graph, label)
    assert {n for nodes in found for n in nodes} == {n for n, name in label.items() if name is not None}
    for number, nodes in enumerate(found):
        assert len({label[n] for n in nodes}) == 1
        members, left = set(nodes), set()  # left: outside, after the region
        for node in graph.nodes:
            if node in members:
                assert not any(i in left for i in node.all_input_nodes), (
                    "a path leaves the region and enters it again"
                )
            elif any(i in members or i in left for i in node.all_input_nodes):
                left.add(node)
        for node in nodes:
            node.meta["region"] = number
    flat = fx.GraphModule({}, graph)
    x = [
        torch.randn(
            3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + i)
        ).requires_grad_()
        for i in range(2)
    ]
    one, other = flat(*x), emit(flat)(*x)
    assert all(torch.equal(a, b) for a, b in zip(one, other))
    grads = [torch.autograd.grad(sum(o.sum() for o in out), x, allow_unused=True) for out in (one, other)]
    assert all(a is b is None or torch.allclose(a, b, rtol=1e-12) for a, b in zip(*grads))


def test_a_region_that_is_left_and_entered_again_is_refused():
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(operator.add, (x, 1))
    b = graph.call_function(operator.add, (a, 1))
    c = graph.call_function(operator.add, (b, a))
    graph.output((c,))
    a.meta["region"] = c.meta["region"] = 0
    with pytest.raises(TedfxError, match="region 0 is not convex"):
        schedule(graph)


# ---- what is kept ------------------------------------------------------------------------------------------


class Alive(TorchDispatchMode):
    """Which of the storages that ops make are still there."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.made[x.untyped_storage()._cdata] = (
                    weakref.ref(x.untyped_storage()),
                    x.untyped_storage().nbytes(),
                )
        return result


@pytest.mark.parametrize("policy", ["none", "comm", "full"])
@pytest.mark.parametrize(
    "kind, call",
    [(m.LM, m.tokens), (m.MoE, m.inputs), (Layers, m.inputs)],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_ledger_is_what_autograd_keeps(kind, call, policy):
    """On one rank: bytes of what forward made and backward holds on to, parameters and inputs left out."""
    model, call = m.make(kind), call(8, 16)
    program = compiled(policy, "dp=1", model, call)
    estimate = Ledger(
        program.graph_module.graph, list(regions(program).values()), Sizing(program.setting.example)
    ).total
    given = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    operands = []
    for node in program.graph_module.graph.find_nodes(op="placeholder"):
        name = program.trace.parameters.get(node.name) or program.trace.buffers.get(node.name)
        operands.append(
            given[name]
            if name
            else call[program.trace.inputs[node.name][0]]
            if node.name in program.trace.inputs
            else program.trace.constants[node.name]
        )
    theirs = {x.untyped_storage()._cdata for x in operands}
    with Alive() as alive:
        outputs = emit(program.graph_module)(*operands)
    gc.collect()
    theirs |= {x.untyped_storage()._cdata for x in outputs}
    actual = sum(
        size for key, (there, size) in alive.made.items() if key not in theirs and there() is not None
    )
    assert outputs[0].requires_grad and abs(estimate - actual) <= 0.1 * actual, (estimate, actual)


def test_rows_shared_by_lanes_are_not_kept_for_their_exchange():
    """Gathering and scattering lanes keep nothing, picking and spreading their index; what is not in the
    table would count operands and result."""
    program = compiled("none")
    named = {
        name: find(program, name) for name in ("gather_lanes", "scatter_lanes", "pick_rows", "spread_lanes")
    }
    assert all(named.values())
    for name, nodes in named.items():
        for node in nodes:
            assert saved(node) == ([node.args[1]] if name in ("pick_rows", "spread_lanes") else [])


def test_a_budget_lies_between_comm_and_none():
    total = {}
    for policy in ("none", "comm"):
        program = compiled(policy)
        total[policy] = Ledger(
            program.graph_module.graph, list(regions(program).values()), Sizing(program.setting.example)
        ).total
    all_of_them = len(regions(program))
    assert total["comm"] < 0.8 * total["none"]
    counts = []
    for share in (0.0, 0.3, 0.6, 1.0):
        limit = int(total["comm"] + share * (total["none"] - total["comm"])) + 1
        program = compiled(f"budget={limit}")
        counts.append(len(regions(program)))
        assert (
            Ledger(
                program.graph_module.graph, list(regions(program).values()), Sizing(program.setting.example)
            ).total
            <= limit
        )
    assert (
        counts[0] == all_of_them
        and counts[-1] == 0
        and counts == sorted(counts, reverse=True)
        and 0 < counts[1] < all_of_them
    )
    with pytest.raises(ConfigError) as refused:
        compiled("budget=100")
    least = int(str(refused.value).split("at least ")[1].split()[0])
    assert least - 1 < total["comm"] <= least and len(regions(compiled(f"budget={least}"))) == all_of_them
    assert (
        len(regions(compiled(f"budget={limit}", batch=5))) > 0
    )  # the same bytes hold less of a larger batch


# ---- ranks as threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["comm", "full"])
def test_the_emitted_graph_on_ranks(policy):
    program = compiled(policy)
    expected, gradients = run_ranks(program, m.make(Layers), m.inputs())
    program.trace.graph_module = emit(program.graph_module)
    assert program.graph_module.graph.find_nodes(op="call_module", target="region_0")
    outputs, recomputed = run_ranks(program, m.make(Layers), m.inputs())
    assert torch.equal(outputs[0], expected[0]) and gradients.keys() == recomputed.keys()
    assert all(torch.equal(recomputed[name], gradients[name]) for name in gradients)


# ---- options -----------------------------------------------------------------------------------------------


def test_policies():
    assert parse_policy("comm") == ("comm", 0) and parse_policy("budget=12") == ("budget", 12)
    assert (
        parse_policy("budget=1.5KiB") == ("budget", 1536)
        and parse_policy("budget=2GB") == ("budget", 2 * 10**9)
        and parse_policy("budget=7 B") == ("budget", 7)
    )
    for wrong in ("some", "budget", "budget=", "budget=-1", "budget=3XB", "", 3):
        with pytest.raises(ConfigError, match="one of none, full, selective, comm or budget=<bytes>"):
            tedfx.Options(checkpoint=wrong)


def test_passes_and_an_option_together_are_refused():
    roles = Roles.resolve(MeshShape.of("dp=2"))
    made = lambda **options: pipeline(tedfx.Options(**options), roles)
    assert made(checkpoint="comm")[-1] == Checkpoint("comm") and made()[-1] == Checkpoint("none")
    assert made(passes=default_passes(checkpoint="full"))[-1] == Checkpoint("full")
    with pytest.raises(ConfigError, match="passes= and checkpoint= together"):
        made(passes=default_passes(), checkpoint="none")
    with pytest.raises(ConfigError, match="passes= and dedup= together"):
        made(passes=default_passes(), dedup=True)
    with pytest.raises(ConfigError, match="sequence_parallel=True needs a tensor axis larger than 1"):
        made(sequence_parallel=True)


@pytest.mark.parametrize(
    "options, line",
    [
        ({"passes": default_passes(), "checkpoint": "comm"}, "passes= and checkpoint= together"),
        ({"checkpoint": "commm"}, "checkpoint='commm': one of none"),
        ({"checkpoint": "budget=1GiB"}, "pass it as example_inputs"),
    ],
    ids=["both", "unknown", "no example"],
)
def test_parallelize_refuses_before_anything_else(options, line):
    with pytest.raises(ConfigError, match=line) as refused:
        tedfx.parallelize(m.make(Layers), "tp=2", **options)
    assert "\n" not in str(refused.value)
