"""Layered accumulation on ranks: the gradients of micro-batches one after another and of one large batch, and
what is gathered, summed and in which order."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn

import tedfx
from tedfx.analysis.layers import layers
from tedfx.errors import TedfxError
from tedfx.ops import count_collectives
from tedfx.runtime.layered import interleave, turns
from tedfx.verification.batches import split_batch
from tests.marks import slow
from tests.parity.cases import case, on_ranks

NO_AUX = {"router_aux_loss_coef": 0.0}  # the router's loss of a batch is not the mean of its parts'
ONE = {"num_hidden_layers": 1}
CASES = [
    slow(case("mixtral", "dp=2", zero=3, overrides=NO_AUX)),
    slow(case("mixtral", "ep=2,tp=2", zero=3, checkpoint="comm", overrides=NO_AUX)),
    slow(case("deepseek_v3", "ep=2,tp=2", zero=2, checkpoint="full")),
    slow(case("plain", "dp=2,tp=2", zero=1, roles={"expert": "tp"}, overrides={"aux": 0.0})),
]


def micro_batches(pm, batch, sizes=(1, 1, 2)):
    """This rank's rows in pieces of unequal sizes, and what each piece's mean loss weighs."""
    mine, at, pieces = split_batch(batch, *pm.batch_coordinate), 0, []
    for size in sizes:
        pieces.append({name: x[at : at + size] for name, x in mine.items()})
        at += size
    assert at == len(mine["input_ids"])
    counts = torch.tensor(
        [(piece["labels"][:, 1:] != -100).sum().item() for piece in pieces], dtype=torch.float64
    )
    if pm.batch_coordinate[1] > 1:
        dist.all_reduce(counts)
    return pieces, (counts / counts.sum()).tolist()


def three_ways(pm, batch, rank):
    pieces, weights = micro_batches(pm, batch)
    mine = split_batch(batch, *pm.batch_coordinate)
    pm(**mine).loss.backward()
    together = pm.gather_gradients()
    pm.zero_grad()
    with count_collectives() as log:
        with pm.no_sync():
            for piece, weight in zip(pieces[:-1], weights):
                (pm(**piece).loss * weight).backward()
        (pm(**pieces[-1]).loss * weights[-1]).backward()
    apart, sums = pm.gather_gradients(), len(pm.reductions)
    pm.zero_grad()
    with count_collectives() as layered_log:
        outputs = pm.layered(pieces)
        sum(out.loss * weight for out, weight in zip(outputs, weights)).backward()
    layered = pm.gather_gradients()
    error = lambda a, b: max(float((a[n] - g).norm() / g.norm().clamp(min=1e-9)) for n, g in b.items())
    count = lambda log: Counter(c.phase for c in log if c.op == "gather_parameters")
    return (
        error(layered, apart),
        error(layered, together),
        count(log),
        count(layered_log),
        sums,
        len(pm.reductions),
        all(r.overlapped for r in pm.reductions),
    )


def agree(ways, zero: int, compiled: bool = False) -> None:
    to_apart, to_together, gathers, layered_gathers, sums, layered_sums, overlapped = ways
    assert to_apart < 1e-11 and to_together < 1e-6  # the model's own norms and softmax are in float32
    assert sums == layered_sums and overlapped
    if zero == 3 and not compiled:
        assert layered_gathers and gathers == {phase: 3 * n for phase, n in layered_gathers.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_three_micro_batches_are_one_large_batch(case):
    for ways in on_ranks(case, three_ways):
        agree(ways, case.options.zero)


def compiled_collectives(pm, batch, rank):
    """(gathers, scatters) of a compiled step, forward and backward, of one call and of three micro-batches
    layer by layer."""
    pieces, _ = micro_batches(pm, batch)

    def counted(run):
        found = []
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as forward:
            loss = run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as backward:
            loss.backward()
        for profile in (forward, backward):
            names = Counter(
                event.name.rpartition("::")[2]
                for event in profile.events()
                if event.name.startswith("_c10d_functional::")
            )
            found.append((names["all_gather_into_tensor"], names["reduce_scatter_tensor"]))
        return found

    one = lambda: pm(**pieces[0]).loss
    many = lambda: sum(out.loss for out in pm.layered(pieces))
    for run in (one, many):
        run().backward()
    return counted(one), counted(many)


def compiled_all_ways(pm, batch, rank):
    whole = [n for n in pm.graph.graph.nodes if getattr(n.target, "__name__", "") == "gather_parameters"]
    return three_ways(pm, batch, rank), compiled_collectives(pm, batch, rank), len(whole)


@pytest.mark.slow
@pytest.mark.parametrize("model, checkpoint", [("llama", "none"), ("mixtral", "comm")])
def test_a_compiled_step_gathers_and_scatters_once(model, checkpoint):
    """Backward gathers again instead of keeping whole weights: all but the embedding's, whose adjoint needs
    none. Each gradient is scattered where it arises."""
    overrides = ONE | (NO_AUX if model == "mixtral" else {})
    this = case(model, "dp=2", zero=3, compile="aot_eager", checkpoint=checkpoint, overrides=overrides)
    for ways, (one, layered), gathers in on_ranks(this, compiled_all_ways):
        agree(ways, 3, compiled=True)
        assert one == layered == [(gathers, 0), (gathers - 1, gathers)]


def order(pm, batch, rank):
    """Of the interleaved graph: (turn, micro-batch) along it; the layers in it; the order in which buckets
    were summed, by layer."""
    (program,) = pm.programs.values()
    made = interleave(program, 3)
    place = turns(program.graph_module.graph)
    names = {node.name: place[node] for node in place}
    seen = [
        (names[n.name.removesuffix(f"_mb{n.meta['micro_batch']}")], n.meta["micro_batch"])
        for n in made.graph_module.graph.nodes
        if n.op == "call_function" and "micro_batch" in n.meta
    ]
    pieces, weights = micro_batches(pm, batch)
    pm.boundary.bucket_bytes = 1
    sum(out.loss for out in pm.layered(pieces)).backward()
    return (
        seen,
        len({layer for layer in layers(program.graph_module.graph).values() if layer}),
        [name for r in pm.reductions if r.overlapped for name in r.names],
    )


def test_all_micro_batches_of_a_layer_before_the_next():
    for seen, depth, summed in on_ranks(case("mixtral", "dp=2", zero=2), order):
        assert seen == sorted(seen) and depth > 1 and len({s for s, _ in seen}) >= depth + 2
        layer = [int(name.split(".")[2]) for name in summed if ".layers." in name]
        assert layer == sorted(layer, reverse=True) and len(set(layer)) == depth


def in_half_precision(pm, batch, rank, compile):
    """Distance of bfloat16 gradients of 8 micro-batches, added up in float32, from those of float32 sums by
    hand, and what sums in bfloat16 would be apart."""
    model = half_model()
    made = tedfx.parallelize(
        model,
        pm.device_mesh,
        example_inputs={"input": torch.zeros(2, 8, dtype=torch.bfloat16)},
        zero=compile[0],
        compile=compile[1],
        gradient_dtype=torch.float32,
    )
    pieces = [
        torch.randn(2, 8, generator=torch.Generator().manual_seed(10 * rank.index + m)).bfloat16()
        for m in range(8)
    ]
    wide, narrow = {}, {}
    for piece in pieces:
        made(input=piece).sum().backward()
        for name, grad in made.gather_gradients().items():
            wide[name] = wide.get(name, 0) + grad.double()
            narrow[name] = (
                narrow.get(name, torch.zeros((), dtype=torch.bfloat16)) + grad.bfloat16()
            ).bfloat16()
        made.zero_grad()
    sum(out.sum() for out in made.layered([{"input": piece} for piece in pieces])).backward()
    found = made.gather_gradients()
    assert all(g.dtype == torch.float32 for g in found.values())
    error = lambda a: max(float((a[n].double() - w).norm() / w.norm()) for n, w in wide.items())
    return error(found), error(narrow)


def half_model():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))).bfloat16()


@pytest.mark.parametrize(
    "how",
    [
        slow((0, False)),
        (3, False),
        slow((3, {"backend": "aot_eager"})),
    ],
    ids=str,
)
def test_gradients_accumulate_in_float32_when_asked(how):
    for found, narrow in on_ranks(case("llama", "dp=2", overrides=ONE), in_half_precision, how):
        # a compiled graph gives each rank's sum of the micro-batches back in bfloat16, rounded once
        assert found < (1e-6 if not how[1] else 2**-8) and found < narrow / (1.5 if how[1] else 100)


class Counting(nn.Module):
    """Writes to a buffer that the next call reads, early and late in the graph, and drops."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x):
        for layer in self.layers:
            x = nn.functional.dropout(layer(x + self.seen), 0.3, self.training)
        self.seen += x.detach().mean(0)
        return x


def with_a_buffer(pm, batch, rank):
    torch.manual_seed(0)
    found = []
    model = Counting().double()
    pieces = [
        torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(m)) for m in range(3)
    ]
    for layered in (False, True):
        made = tedfx.parallelize(model, pm.device_mesh, example_inputs={"x": pieces[0]})
        made.rng_state = (5, 0)
        outputs = (
            made.layered([{"x": piece} for piece in pieces])
            if layered
            else [made(x=piece) for piece in pieces]
        )
        sum((m + 1) * out.sum() for m, out in enumerate(outputs)).backward()
        found.append(
            (
                torch.cat(outputs).detach(),
                made.gather_gradients(),
                made.get_buffer("seen").clone(),
                made.rng_state,
            )
        )
    for calls in ([], [{"x": pieces[0]}, {"x": pieces[0].float()}]):
        with pytest.raises(TedfxError, match="no micro-batches|micro-batch"):
            made.layered(calls)
    return found


def test_buffers_and_draws_are_those_of_calls_in_a_row():
    for apart, layered in on_ranks(case("llama", "tp=2", overrides=ONE), with_a_buffer):
        assert (
            torch.equal(apart[0], layered[0])
            and torch.equal(apart[2], layered[2])
            and apart[3] == layered[3] == (5, 3)
        )
        assert all(torch.allclose(g, layered[1][name], rtol=1e-12) for name, g in apart[1].items())
