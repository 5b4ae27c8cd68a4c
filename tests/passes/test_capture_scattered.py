"""Tokens written into slots at addresses: loss and every gradient of the captured graph are the model's; what
is not proven is refused."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedfx.errors import CaptureError
from tedfx.passes.base import run_pipeline
from tedfx.passes.capture_capacity import CaptureCapacity
from tedfx.passes.capture_loops import CaptureLoops, find_uncaptured
from tedfx.passes.capture_scattered import CaptureScattered
from tedfx.passes.capture_sorted import CaptureSorted
from tedfx.passes.functionalize import Functionalize
from tedfx.stages.graphs import GlobalGraph
from tedfx.trace.export import trace
from tests.capture.test_models import BIASES, check, operators, routers, tokens
from tests.marks import slow_but
from tests.models_plain import Config
from tests.models_scatter import LAYERS

E, H, C = 4, 32, 6


class Layer(nn.Module):
    """One mixture by itself."""

    def __init__(self, name, **config):
        super().__init__()
        torch.manual_seed(0)
        self.moe = LAYERS[name](replace(Config(), **config))

    def forward(self, x):
        y, aux = self.moe(x)
        return {"y": y, "loss": y.square().sum() + aux}


def capture(model):
    traced = trace(model, kwargs={"x": torch.zeros(3, 6, H, dtype=next(model.parameters()).dtype)})
    passes = [Functionalize(), CaptureSorted(), CaptureLoops(), CaptureCapacity(), CaptureScattered()]
    done = run_pipeline(GlobalGraph.of(traced), passes)
    return done.trace, done.history[-1].result


@pytest.mark.parametrize("name", slow_but(["kept", "trash"], LAYERS))
def test_every_way_to_write_it(name):
    model = Layer(name).double()
    traced, result = capture(model)
    assert result.matches == 1 and find_uncaptured(traced.graph_module.graph) == []
    found = operators(traced)
    assert found.count("tedfx.dispatch.default") == found.count("tedfx.combine.default") == 1
    words = ("index_put", "index_add", "index_copy", "aten.index.", "bmm", "scatter")
    assert not any(word in o for o in found for word in words)
    for values in BIASES.values():
        routers(model, values)
        check(model, traced, x=tokens())
    with torch.no_grad():  # ties: all experts have the same score
        model.moe.router.weight.zero_()
        model.moe.router.bias.zero_()
    check(model, traced, x=tokens(2, 7))
    dropped = (model(tokens())["y"].abs().sum(-1) == 0).any()
    assert dropped == (name != "roomy"), "the test shall drop tokens, but where no token is too late"


# --- a plain layer whose parts can be spoiled ---------------------------------------------------------------


def place(mask, ids):
    return ((mask.cumsum(0) - 1) * mask).sum(-1)


def behind(ids, at):
    """Who is too late stands in a row behind the last."""
    return torch.where(at < C, ids * C + at, E * C)


def write(address, x):
    return x.new_zeros(E * C + 1, H).index_copy(0, address, x)[:-1]


def read(done, address, ids, at, w):
    return torch.cat([done, done.new_zeros(1, H)])[address] * w.unsqueeze(-1)


def experts(m, rows):
    return torch.bmm(F.relu(torch.bmm(rows, m.up) + 0.1), m.down)


class Mixture(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(H, E)
        self.up, self.down = nn.Parameter(torch.randn(E, H, 24)), nn.Parameter(torch.randn(E, 24, H))
        given = {"place": place, "address": behind, "write": write, "experts": experts, "read": read}
        self.parts = {**given, **parts}

    def forward(self, x):
        parts, x = self.parts, x.reshape(-1, H)
        w, ids = self.router(x).softmax(-1).max(-1)
        at = parts["place"](F.one_hot(ids, E), ids)
        address = parts["address"](ids, at)
        done = parts["experts"](self, parts["write"](address, x).view(E, C, H)).view(E * C, H)
        y = parts["read"](done, address, ids, at, w)
        return {"y": y, "loss": y.square().sum()}


def plain(address, x):
    return x.new_zeros(E * C, H).index_copy(0, address, x)


def added(address, x):
    return x.new_zeros(E * C, H).index_add(0, address, x)


def unmasked(done, address, ids, at, w):
    return done[address.clamp(max=E * C - 1)] * w.unsqueeze(-1)


def by_keep(done, address, ids, at, w):
    return done[address.clamp(max=E * C - 1)] * w.unsqueeze(-1) * (at < C).unsqueeze(-1)


def by_less(done, address, ids, at, w):
    return unmasked(done, address, ids, at, w) * (at < C - 2).unsqueeze(-1)


def in_two_dims(done, address, ids, at, w):
    return done.view(E, C, H)[ids, at.clamp(max=C - 1)] * (w * (at < C)).unsqueeze(-1)


def filled(ids, at):
    return (ids * C + at).masked_fill(at >= C, E * C)


def padded(done, address, ids, at, w):
    return F.pad(done, (0, 0, 0, 1)).index_select(0, address) * w.unsqueeze(-1)


def picked(done, address, ids, at, w):
    """What is not picked may be anything."""
    keep = at < C
    out = w.new_zeros(w.shape[0], H)
    out[keep] = done[address[keep]] * torch.where(keep, w, torch.inf)[keep].unsqueeze(-1)
    return out


def picked_of_a_table(done, address, ids, at, w):
    """The number of who is dropped is that of no entry."""
    keep, table = at < C, torch.linspace(1, 2, C, dtype=w.dtype)
    rows = done[address[keep]] * (w[keep] * table[at[keep]]).unsqueeze(-1)
    return w.new_zeros(w.shape[0], H).index_add(0, keep.nonzero()[:, 0], rows)


def picked_and_shifted(done, address, ids, at, w):
    """What is not picked stays zero."""
    keep = (at < C).nonzero().squeeze(-1)
    out = w.new_zeros(w.shape[0], H)
    return out.index_copy(0, keep, done[address[keep]] * w[keep, None] + 1.0)


def picked_and_added(done, address, ids, at, w):
    keep = at < C
    out = w.unsqueeze(-1).expand(-1, H).clone()
    out[keep] += done[address[keep]] - w[keep].unsqueeze(-1)
    return out


@pytest.mark.parametrize(
    "parts",
    slow_but(
        [{"read": by_keep}],
        [
            {"read": by_keep},
            {"read": picked},
            {"read": picked_and_shifted},
            {"read": picked_of_a_table},
            {"read": picked_and_added},
            {"read": in_two_dims},
            {"read": by_less},
            {"address": filled},
            {"read": padded},
            {"place": lambda mask, ids: (mask.cumsum(0) - mask)[torch.arange(mask.shape[0]), ids]},
        ],
    ),
)
def test_other_words_for_it(parts):
    model = Mixture(**parts).double()
    traced, result = capture(model)
    assert result.matches == 1
    for values in ("uneven", "all to one"):
        routers(model, BIASES[values])
        check(model, traced, x=tokens())


def late(done, address, at):
    some = (at < C + 1).nonzero().squeeze(-1)
    return some, done[address.clamp(max=E * C - 1)[some]]


def twice(address, x):
    return x.new_zeros(E * C + 1, H).index_add(0, address, x).index_add(0, address, x)[:-1]


REFUSED = {
    "another stride": (
        {"address": lambda ids, at: torch.where(at < C - 1, ids * (C - 1) + at, E * C)},
        "addresses count 5 slots",
    ),
    "the next expert's": (
        {"address": lambda ids, at: ids * C + at, "write": added},
        "the address of another",
    ),
    "the last one stays": (
        {"address": lambda ids, at: ids * C + at.clamp(max=C - 1), "write": plain, "read": by_keep},
        "not provably left out",
    ),
    "all at the first": (
        {"address": lambda ids, at: (ids * C + at) * (at < C), "write": plain, "read": by_keep},
        "share a slot",
    ),
    "another place": ({"read": lambda d, a, ids, at, w: read(d, behind(ids, at + 1), ids, at, w)}, "another"),
    "not masked": ({"read": unmasked}, "not provably left out"),
    "masked by another": (
        {"read": lambda d, a, ids, at, w: unmasked(d, a, ids, at, w) * (at < C + 1).unsqueeze(-1)},
        "not provably left out",
    ),
    "picked and mixed": (
        {"read": lambda d, a, ids, at, w: w[:, None] * d[a[at < C]].mean(0)},
        "that a mask picked are read by aten.mean",
    ),
    "picked by less": (
        {"read": lambda d, a, ids, at, w: w.new_zeros(w.shape[0], H).index_add(0, *late(d, a, at))},
        "not provably left out",
    ),
    "written twice": ({"place": place, "write": twice}, "queue behind"),
    "mixed": ({"experts": lambda m, rows: experts(m, rows).softmax(1)}, "along the rows"),
    "never read": ({"read": lambda done, *_: done.sum(-1)}, "nothing reads them"),
    "a limit that is data": (
        {
            "address": lambda ids, at: torch.where(at < at.float().mean(), ids * C + at, E * C),
        },
        "the address of another",
    ),
}


@pytest.mark.parametrize("name", slow_but(["the next expert's", "not masked"], REFUSED))
def test_refused_by_name(name):
    parts, why = REFUSED[name]
    with pytest.raises(CaptureError, match=why) as error:
        capture(Mixture(**parts))
    assert "test_capture_scattered.py:" in str(error.value)


class Unstable(LAYERS["sorted"]):
    stable = False


def test_a_sort_that_is_not_stable_drops_anyone():
    with pytest.raises(CaptureError, match="sort with stable=True"):
        capture(Unstable(Config()))


# --- runs that are filled up to a multiple, in grouped products ---------------------------------------------


def up(counts):
    return (counts + 7) // 8 * 8


def by_sort(ids, begin):
    """(rows, assignments) of a stable sort."""
    counts = ids.bincount(minlength=E)
    sorted_ids, order = ids.sort(stable=True)
    place = torch.arange(order.shape[0]) - (counts.cumsum(0) - counts)[sorted_ids]
    return begin[sorted_ids] + place, order


def by_argsort(ids, begin):
    """Nobody is dropped: the order within a run reaches no result."""
    order, counts = ids.argsort(), ids.bincount(minlength=E)
    place = torch.arange(order.shape[0]) - (counts.cumsum(0) - counts)[ids[order]]
    return begin[ids[order]] + place, order


def by_search(ids, begin):
    sorted_ids, order = ids.sort(stable=True)
    place = torch.arange(order.shape[0]) - torch.searchsorted(sorted_ids, torch.arange(E))[sorted_ids]
    return begin[sorted_ids] + place, order


def by_cumsum(ids, begin):
    """(rows, None): in the assignments' own order."""
    return begin[ids] + (F.one_hot(ids, E).cumsum(0) - 1).gather(1, ids[:, None])[:, 0], None


class Runs(Mixture):
    """Top-2. torch's own grouped product has no float64 on the CPU: compared in bfloat16."""

    def __init__(self, rows=by_sort, length=up, begin=None, ends=None):
        super().__init__()
        self.parts = rows, length, begin or (lambda ends, padded: ends - padded), ends or length

    def forward(self, x):
        rows, length, begin, others = self.parts
        x = x.reshape(-1, H)
        w, ids = self.router(x).softmax(-1).topk(2, -1)
        counts = ids.flatten().bincount(minlength=E)
        padded = length(counts)
        at, order = rows(ids.flatten(), begin(padded.cumsum(0), padded))
        numbers = torch.arange(ids.numel()) if order is None else order
        ends = others(counts).cumsum(0).to(torch.int32)
        filled = x.new_zeros(ids.numel() + 16 * E, H).index_copy(0, at, x[numbers // 2])
        inner = F.silu(torch._grouped_mm(filled, self.up, offs=ends))
        done = torch._grouped_mm(inner, self.down, offs=ends)[at]
        y = torch.zeros_like(x).index_add(0, numbers // 2, done * w.flatten()[numbers, None])
        return {"y": y, "loss": y.square().sum()}


@pytest.mark.parametrize(
    "parts",
    slow_but(
        [{}],
        [
            {},
            {"rows": by_cumsum},
            {"rows": by_search},
            {"rows": by_argsort},
            {"rows": by_cumsum, "length": lambda counts: counts},
            {"length": lambda counts: (torch.ceil(counts / 16) * 16).long()},
            {
                "length": lambda counts: up(counts.clamp(min=8)),
                "ends": lambda counts: up(counts.clamp_min(1)),
            },
            {"begin": lambda ends, padded: F.pad(ends[:-1], (1, 0))},
            {"begin": lambda ends, padded: torch.cat([ends.new_zeros(1), ends[:-1]])},
        ],
    ),
)
def test_runs_filled_up_to_a_multiple(parts):
    model = Runs(**parts).to(torch.bfloat16)
    traced, result = capture(model)
    assert result.matches == 1
    found = operators(traced)
    assert found.count("tedfx.grouped_linear.default") == 2 and not any("grouped_mm" in n for n in found)
    for values in BIASES.values():
        routers(model, values)
        x = tokens().bfloat16()
        got, wanted = (run(x=x) for run in (lambda **given: traced(model, **given), model))
        for a, b in zip(*(torch.autograd.grad(out["loss"], [*model.parameters()]) for out in (got, wanted))):
            torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2 * float(b.abs().max()))
        torch.testing.assert_close(got["y"], wanted["y"], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("ends", slow_but([], [lambda counts: counts, lambda counts: up(counts) + 8]))
def test_grouped_products_at_other_ends(ends):
    with pytest.raises(CaptureError, match="where the experts' runs end") as error:
        capture(Runs(ends=ends).to(torch.bfloat16))
    assert "test_capture_scattered.py:" in str(error.value)


@pytest.mark.parametrize(
    "parts",
    slow_but(
        [],
        [
            {"length": lambda counts: counts // 8 * 8},  # shorter than what an expert has
            {"begin": lambda ends, padded: ends},
            {"rows": lambda ids, begin: by_sort(ids.flip(0), begin)},
        ],
    ),
)
def test_runs_that_say_nothing_are_not_captured(parts):
    traced, result = capture(Runs(**parts).to(torch.bfloat16))
    assert result.matches == 0 and find_uncaptured(traced.graph_module.graph)
