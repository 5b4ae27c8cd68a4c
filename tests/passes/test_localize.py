"""`localize`: what depends on sizes is rewritten from dims and types; then the local program is run on
threads against one device."""

import pytest
import torch
import torch.nn.functional as F

from tedfx import ops
from tedfx.compiler import compile_graph, default_passes
from tedfx.errors import TraceError
from tests.marks import slow_but
from tests.passes import models as m
from tests.passes.helpers import find, global_graph, parity, run_ranks, upto
from tests.rules.simulate import same


def scaled(fn, **shapes):
    """Runs fn(self, h) on h = x * w; a loss comes out."""
    return m.Fn(lambda s, x: fn(s, x * s.w), w=(8,), **shapes)


@pytest.mark.parametrize("mesh", ["tp=2", "dp=2,tp=2"])
def test_views_have_the_sizes_of_a_rank(mesh):
    program = parity(m.make(m.Attention), mesh, m.inputs())
    heads = [n.args[1][2] for n in find(program, "view")[:3]]
    assert heads == [2, 2, 2]  # of 4
    assert [n.args[1][-1] for n in find(program, "reshape")][-1:] == [8]  # 2 heads x 4


@pytest.mark.parametrize("mesh", ["dp=2", "tp=2", "dp=2,tp=2"])
@pytest.mark.parametrize(
    "kind, args",
    [
        (m.Mlp, ()),
        (m.GateUp, (8, 4, False)),
        (m.GateUp, (8, 4, True)),
        (m.Attention, (4, 2)),
        (m.LM, ()),
        (m.LM, (15,)),
    ],
    ids=str,
)
def test_models_are_those_of_one_device(kind, args, mesh):
    parity(m.make(kind, *args), mesh, m.tokens(vocabulary=15) if kind is m.LM else m.inputs())


def test_four_ranks_and_two_kv_heads():
    parity(m.make(m.Attention, 4, 2), "tp=4", m.inputs())


def test_a_range_over_a_sharded_dim_keeps_global_numbers():
    """arange(B) -> arange(B local) + offset; the ops between are those of the local range."""
    model = scaled(lambda s, h: (h.sum((1, 2)) * torch.arange(h.shape[0], dtype=h.dtype)).sum())
    program = parity(model, "dp=2", m.inputs())
    (offset,) = find(program, "axis_offset")
    assert offset.args[1] == ("dp",) and find(program, "arange")[0].args[0] is offset.args[0]


def test_a_range_with_start_and_step():
    model = scaled(
        lambda s, h: (h.sum((1, 2)) * torch.arange(3, 3 + 2 * h.shape[0], 2, dtype=h.dtype)).square().sum()
    )
    parity(model, "dp=2", m.inputs())


def test_a_range_that_starts_at_a_size():
    """arange(B - 1, -1, -1): B is the global one."""
    parity(
        scaled(lambda s, h: (h * 0.5 + h[torch.arange(h.shape[0] - 1, -1, -1)]).square().sum()),
        "dp=2",
        m.inputs(),
    )


@pytest.mark.parametrize("kind", ["range", "strided range", "ones", "linspace", "eye"])
def test_created_values_meet_sharded_ones(kind):
    """h[.., F] * created[F], F over tp; strided: F is the second factor of gate|up."""

    def fn(s, x):
        if kind == "strided range":
            h = x @ s.up
            gate, up = (h * torch.arange(16, dtype=x.dtype)).chunk(2, -1)
            return (x + (gate * up) @ s.down).square().sum()
        h = x @ s.up
        made = {
            "range": torch.arange(16, dtype=x.dtype),
            "ones": torch.ones(16, dtype=x.dtype) * 2,
            "linspace": torch.linspace(0, 1, 16, dtype=x.dtype),
            "eye": torch.eye(16, dtype=x.dtype)[3],
        }[kind]
        return (x + torch.tanh(h * made) @ s.down).square().sum()

    parity(scaled(fn, up=(8, 16), down=(8 if kind == "strided range" else 16, 8)), "tp=2", m.inputs())


@pytest.mark.parametrize("mesh", ["dp=2", "dp=2,tp=2", "dp=2,ep=2"])
def test_means_divide_by_the_global_count(mesh):
    """mean over (B, S, 8) with B sharded -> sum, / (2 B_local x S x 8), all-reduce; a mean over whole dims
    stays."""
    roles = {"batch": ("dp", "ep"), "expert": ()} if "ep" in mesh else None
    model = scaled(
        lambda s, h: (
            h.square().mean() + h.mean((0, 1)).square().sum() + h.mean(-1, keepdim=True).square().sum()
        )
    )
    program = parity(model, mesh, m.inputs(), roles)
    assert len(find(program, "mean")) == 1 and len(find(program, "div")) == 2


@pytest.mark.parametrize(
    "fn",
    [
        lambda s, h: h.square().sum() / h.shape[0],
        lambda s, h: h.square().sum() * (h.shape[0] * h.shape[1] + 1),
        lambda s, h: h.square().sum() / float(h.shape[0] * h.shape[1]),
        lambda s, h: (h * h.shape[0] ** -0.5).sum(),
        lambda s, h: h.square().sum() / torch.full((), h.shape[0]),
    ],
    ids=["size", "product", "float", "power", "full"],
)
def test_sizes_used_as_numbers_are_global(fn):
    parity(scaled(fn), "dp=2", m.inputs())


def test_the_vocabulary_is_parallel_and_padding_counts_in_the_whole():
    program = parity(m.make(m.LM), "tp=2", m.tokens())
    for node in find(program, "vocab_parallel_embedding"):
        assert node.args[2] == ("tp",)
    (loss,) = find(program, "vocab_parallel_cross_entropy")
    assert (
        loss.args[2:] == (("tp",), -100)
        and not find(program, "embedding")
        and not find(program, "cross_entropy_loss")
    )
    padded = m.LM()
    padded.embed = torch.nn.Embedding(16, 6, padding_idx=13, dtype=torch.float64)
    program = parity(padded, "tp=2", m.tokens())
    assert {n.args[3] for n in find(program, "vocab_parallel_embedding")} == {13, None}


def test_a_vocabulary_in_unequal_pieces():
    program = parity(m.make(m.LM, 15), "tp=2", m.tokens(vocabulary=15))
    (loss,) = find(program, "vocab_parallel_cross_entropy")
    assert loss.args[2:] == (("tp",), -100, (8, 7))
    assert (8, 7) in [n.args[4] for n in find(program, "vocab_parallel_embedding") if len(n.args) > 4]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_vocabulary_of_parts_is_not_cut_inside_of_them(parts):
    """Codebooks in one table, each with a head of its own: a shard of each codebook's entries is no run of
    the table's."""

    def fn(s, x):
        x = x + x @ s.square  # so that the hidden dim is no candidate
        found = F.embedding((x[..., 0].detach() > 0).long() * 3 + 2, s.table)
        books = s.table.view(parts, 8 // parts, 8)
        logits = torch.stack([F.linear(x, books[i]) for i in range(parts)])
        return logits.square().sum() + (found * x).square().sum()

    program = parity(m.Fn(fn, table=(8, 8), square=(8, 8)), "tp=2", m.inputs())
    assert bool(program.plan.factors.get("tp")) is (parts == 1)


@pytest.mark.parametrize("mesh", ["tp=2", "dp=2,tp=4"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: m.GateUp(inner=5),  # over four ranks 2, 2, 1 and none
        lambda: m.GateUp(inner=5, interleaved=True),
        lambda: m.Attention(7, 7),
        lambda: m.Attention(14, 7),
        lambda: m.Attention(7, 1, gqa=True),
    ],
    ids=["gate and up", "interleaved", "heads", "groups", "one key"],
)
def test_widths_and_heads_in_unequal_pieces(make, mesh):
    program = parity(m.make(make), mesh, m.inputs())
    assert {f.size for f in program.plan.factors["tp"]} in ({5}, {7})


def test_dropout_lists_the_factors_of_every_dim():
    model = m.Fn(
        lambda s, x: F.dropout(x @ s.up, 0.5).relu().matmul(s.down).add(x).square().sum(),
        up=(8, 16),
        down=(16, 8),
    )
    program, _ = upto(model, "dp=2,tp=2", m.inputs(), "localize")
    (node,) = [n for n in program.graph_module.graph.nodes if n.target is ops.dropout]
    batch, sequence, inner = node.args[4]
    assert batch[0][1] == ("dp",) and sequence[0][1] == () and inner == ((8, ("tp",)),)
    assert program.uses_seed and node.args[2].op == "placeholder"


def test_a_draw_lists_its_distribution_and_the_factors_of_every_dim():
    def noisy(s, x):
        h = x @ s.up
        h = h + torch.randn_like(h) + torch.empty_like(h).uniform_(0.9, 1.1)
        return h.relu().matmul(s.down).add(x).square().sum()

    model = m.Fn(noisy, up=(8, 16), down=(16, 8))
    program, _ = upto(model, "dp=2,tp=2", m.inputs(), "localize")
    one, other = [n for n in program.graph_module.graph.nodes if n.target is ops.draw]
    assert one.args[:2] == ("normal", (0.0, 1.0)) and other.args[:2] == ("uniform", (0.9, 1.1))
    assert [one.args[3], other.args[3]] == [0, 1] and one.args[2] is other.args[2]
    batch, sequence, inner = one.args[4]
    assert batch[0][1] == ("dp",) and sequence[0][1] == () and inner == ((8, ("tp",)),)


DRAWN = {
    "rand": lambda h: h * torch.rand(h.shape, dtype=h.dtype),
    "randn": lambda h: h * torch.randn(h.shape[0] * h.shape[1], h.shape[2], dtype=h.dtype).view(h.shape),
    "normal_": lambda h: h * torch.empty_like(h).normal_(1.0, 2.0),
    "normal": lambda h: h * torch.normal(h.detach(), h.detach().abs()),
    "bernoulli": lambda h: h * torch.bernoulli(h.sigmoid()),
    "bernoulli_": lambda h: h * torch.empty_like(h).bernoulli_(0.3),
    "log_normal_": lambda h: h * torch.empty_like(h).log_normal_(),
    "random_": lambda h: h * torch.empty_like(h).random_(5),
    "randint": lambda h: h * torch.randint(0, 5, h.shape),
    "gumbel_softmax": lambda h: F.gumbel_softmax(h),
    "multinomial": lambda h: (
        h + torch.multinomial(h.softmax(-1).flatten(0, 1), 2).sum(-1).view(*h.shape[:2], 1)
    ),
}


@pytest.mark.parametrize("name", slow_but(["rand", "bernoulli_", "multinomial"], DRAWN))
def test_what_a_model_draws_is_the_same_on_any_mesh(name):
    """And another number with every seed and site."""
    runs = []
    for mesh in ("dp=1", "dp=2", "tp=2"):
        model = m.Fn(
            lambda s, x: DRAWN[name](x @ s.up).matmul(s.down).square().sum(), up=(8, 16), down=(16, 8)
        )
        program = compile_graph(global_graph(model, mesh, m.inputs()), default_passes())
        assert len([n for n in program.graph.nodes if n.target in (ops.draw, ops.multinomial)]) == 1
        runs.append(run_ranks(program, model, m.inputs()))
    (one, gradients), *others = runs
    for many, theirs in others:
        same(many[0], one[0], "loss")
        for path, gradient in theirs.items():
            same(gradient, gradients[path], path)


REFUSED = {
    "poisson": lambda h: torch.poisson(h.abs()),
    "randperm": lambda h: h[:, :, torch.randperm(8)],
    "alpha_dropout": lambda h: F.alpha_dropout(h, 0.5),
    "complex": lambda h: torch.randn(8, dtype=torch.complex128).real * h,
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_draws_are_refused(name):
    with pytest.raises(TraceError, match=r"random numbers and has no counter-based form.*test_localize.py:"):
        upto(scaled(lambda s, h: REFUSED[name](h).sum()), "dp=2", m.inputs(), "localize")
