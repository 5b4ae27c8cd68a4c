"""Sizes that are no symbols: pairs, halves, unequal pieces with factors behind them, sizes of data. Local
programs on threads against one device."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedfx.errors import CallError, TraceError
from tedfx.placement.factors import leaves
from tedfx.placement.fit import whole_pieces
from tedfx.placement.sizes import solve, symbol_of
from tedfx.trace.call_check import CallRules
from tests.marks import slow, slow_but
from tests.passes import models as m
from tests.passes.helpers import PLAIN, parity, placeholder, upto

MESHES = [("dp=2", {}), ("tp=2", {"sequence_parallel": True}), ("dp=2,tp=2", {"sequence_parallel": True})]


def scaled(fn, **shapes):
    return m.Fn(lambda s, x: fn(s, x * s.w), w=(8,), **shapes)


def chosen(x, high):
    return (x.detach().abs() * 97).long() % high


@pytest.mark.parametrize(
    "fn",
    [
        lambda s, x: F.logsigmoid(x[::2].mean((1, 2)) - x[1::2].mean((1, 2))).mean(),  # pairs of rows
        lambda s, x: (x[: x.shape[0] // 2] - x[x.shape[0] // 2 :]).square().mean(),  # halves of them
        slow(lambda s, x: x.view(2, -1, x.shape[1], 8).softmax(0)),
        slow(lambda s, x: x.unflatten(0, (-1, 2)).cumsum(1)),
        lambda s, x: (
            torch.stack([x[:, ::2], x[:, 1::2]], 2).flatten(1, 2).tanh() * x
        ),  # neighbours in the sequence, and back
        slow(lambda s, x: torch.cat([x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]], 1) * x),
        slow(lambda s, x: x.unflatten(1, (-1, 2)).softmax(2).flatten(1, 2) + x),
        slow(lambda s, x: torch.zeros(x.shape[0] // 2, 8, dtype=x.dtype) + x[::2].sum(1)),
    ],
    ids=["pairs", "halves", "view", "unflatten", "stacked", "rolled", "windows", "zeros"],
)
def test_pairs_and_halves(fn):
    model = scaled(fn)
    for mesh, options in MESHES:
        parity(model, mesh, m.inputs(8, 6), **options)


def test_a_pair_is_a_refinement_and_a_half_is_whole():
    """Batch 2 s as (s, 2): the ranks keep their rows. In halves, rows of other ranks meet."""
    pairs, _ = upto(scaled(lambda s, x: x[::2] * x[1::2]), "dp=2", m.inputs(8, 6), "place")
    dims = placeholder(pairs, "x").meta["dims"]
    assert (
        [f.size for f in leaves(dims[0])][1:] == [2]
        and leaves(dims[0])[0] is pairs.batch_factor
        and not any("conversion" in n.meta for n in pairs.graph_module.graph.nodes)
    )
    halves, _ = upto(scaled(lambda s, x: x.view(2, -1, 8)), "dp=2", m.inputs(8, 6), "place")
    assert len(leaves(placeholder(halves, "x").meta["dims"][0])) == 1 and any(
        "conversion" in n.meta for n in halves.graph_module.graph.nodes
    )


def test_rows_that_do_not_fit_are_refused_with_the_line():
    program, _ = upto(scaled(lambda s, x: x[::2] * x[1::2]), "dp=2", m.inputs(8, 6), "place")
    (fit,) = whole_pieces(program.graph_module.graph, program.trace.inputs, program.pieces)
    fit.check({("x",): torch.empty(4, 6, 8)})
    with pytest.raises(
        CallError,
        match=r"dim 0 of x is 3 on a rank, and the model takes 2 neighbours at a time \| at "
        r".*test_sizes.py:\d+ \| pass a multiple of 2 per rank",
    ):
        fit.check({("x",): torch.empty(3, 6, 8)})
    rules = CallRules(program.trace, 1)
    rules.check_sizes({("x",): torch.empty(4, 6, 8)})
    with pytest.raises(CallError, match="dim 0 of x is 7"):
        rules.check_sizes({("x",): torch.empty(7, 6, 8, dtype=torch.float64)})


def test_a_size_and_its_symbol():
    s = next(
        iter(
            upto(scaled(lambda s, x: x[::2] * x[1::2]), "dp=2", m.inputs(8, 6), "place")[0]
            .trace.extents["batch"]
            .free_symbols
        )
    )
    assert symbol_of(2 * s + 1) == s and solve(2 * s + 1, 9) == 4
    assert symbol_of(5) is None and symbol_of(s * s) is None and symbol_of(s // 2) is None


@pytest.mark.parametrize("length", [5, slow(7)])
def test_unequal_pieces_with_factors_behind_them(length):
    """(B, S, k) cut along S: 3 x 2 and 4 x 2 of 7 x 2, not 7 and 7. Shards of replicated values, gathers and
    reduce-scatters."""

    def fn(s, x):
        p = (torch.tanh(x @ s.up) @ s.down).flatten(0, 1).softmax(-1)  # on a slice of the tokens
        ids, mask = p.topk(2, -1)[1].flatten(), s.w.sum() * torch.ones(x.shape[:2], dtype=x.dtype).flatten()
        counts = torch.zeros(8, dtype=x.dtype).scatter_add(0, ids, mask.repeat_interleave(2))
        together = (p.repeat_interleave(2, 0) * mask.repeat_interleave(2)[:, None]).flip(0)
        return p * counts, together

    model = scaled(fn, up=(8, 16), down=(16, 8))
    for mesh in ("tp=2", "dp=2,tp=2", "tp=4"):
        parity(model, mesh, m.inputs(4, length), sequence_parallel=True)


@pytest.mark.parametrize(
    "fn",
    [
        lambda s, x: (
            x.flatten(0, 1)[(x.detach()[..., 0] > 0).flatten().nonzero().squeeze(-1)].view(-1, 2, 4).sum(0)
        ),
        lambda s, x: (
            torch.bincount(chosen(x, 5).flatten(), weights=x.detach().flatten(), minlength=5)
            * s.w[:5]
            * x.sum()
        ),
        lambda s, x: torch.bincount(chosen(x, 5).flatten(), x.detach().flatten()).sum() * x,
        lambda s, x: torch.bincount(chosen(x, 5).flatten()).max() * x,
    ],
    ids=["nonzero", "weights, minlength", "weights", "no minlength"],
)
def test_sizes_that_only_the_data_tells(fn):
    for mesh, options in MESHES[-1:]:
        parity(scaled(fn), mesh, m.inputs(8, 6), **options)


def test_lengths_that_only_the_data_tells_are_no_sizes_of_their_own_pieces():
    """The rows of each expert, counted on the host: on a rank there are other rows, and nothing before the
    split has their number."""

    def fn(s, x):
        rows = x.flatten(0, 1)
        lengths = F.one_hot((rows.detach()[:, 0] > 0).long(), 2).sum(0).tolist()
        first, second = rows.split(lengths)
        return torch.cat((first * 2, second)).square().sum()

    with pytest.raises(
        TraceError,
        match=r"only the data tells \(u\d+\) shapes a value here, and no tensor before it has that size "
        r"\| at .*test_sizes.py",
    ):
        upto(scaled(fn), "dp=2", m.inputs(8, 6), "localize")


def test_an_empty_dim_is_viewed():
    """No window fits: x[:, :0] in windows of 4."""
    fn = lambda s, x: torch.cat((x[:, :0].reshape(x.shape[0], 0, 4, 8).sum(2), x), 1)
    parity(scaled(fn), "dp=2", m.inputs(8, 6))


class Loop(nn.Module):
    """Experts in a loop, used in two places; `tie`: two experts share a parameter, or are one object."""

    def __init__(self, tie=""):
        super().__init__()
        self.gate = m.linear(8, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(m.linear(8, 6, True), nn.GELU(), m.linear(6, 8)) for _ in range(4)
        )
        if tie == "weight":
            self.experts[3][0].weight = self.experts[1][0].weight
        if tie == "expert":
            self.experts[3] = self.experts[1]

    def mixture(self, x):
        t = x.flatten(0, 1)
        w, ids = self.gate(t).softmax(-1).topk(2, -1)
        out = torch.zeros_like(t)
        for e, expert in enumerate(self.experts):
            row, slot = torch.where(ids == e)
            out.index_add_(0, row, expert(t[row]) * w[row, slot, None])
        return out.view_as(x)

    def forward(self, x):
        return x + self.mixture(torch.tanh(x + self.mixture(x)))


def stacked(program) -> dict[str, list[str]]:
    return {name.removeprefix("p_experts_stacked_"): names for name, names in program.trace.stacked.items()}


@pytest.mark.parametrize("tie", slow_but(["expert"], ["", "weight", "expert"]))
def test_experts_used_twice_and_experts_that_share(tie):
    model = Loop(tie)
    first, _ = upto(model, "dp=2", m.inputs(4, 6), "capture_loops", **PLAIN)
    assert {name: len(names) for name, names in stacked(first).items()} == {
        "0_weight": 3 if tie else 4,
        "0_bias": 3 if tie == "expert" else 4,
        "2_weight": 3 if tie == "expert" else 4,
    }
    parity(model, "ep=2,tp=2", m.inputs(4, 6))


def test_a_stack_of_tied_parameters_has_all_names():
    from tedfx.state.layouts import layouts_of

    model = nn.Module()
    model.first, model.again = Loop(), nn.Module()
    model.again.experts, model.forward = model.first.experts, lambda x: model.first(x)
    program, _ = upto(model, "ep=2,tp=2", m.inputs(4, 6), "lower_experts")
    layout = next(layout for layout in layouts_of(model, program, set()) if layout.sources)
    assert (
        layout.groups[2] == (layout.sources[2], layout.sources[2].replace("first", "again"))
        and len(layout.names) == 8
    )
