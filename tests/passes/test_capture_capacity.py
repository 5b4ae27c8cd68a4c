"""Mixtures with a capacity: loss and every gradient of the captured graph are the model's, tokens dropped and
all; what is not proven is refused."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import einsum, nn

from tedfx.capture.uncaptured import LEFT
from tedfx.errors import CaptureError, TraceError
from tedfx.passes.base import run_pipeline
from tedfx.passes.capture_capacity import CaptureCapacity
from tedfx.passes.capture_loops import CaptureLoops, find_uncaptured
from tedfx.passes.functionalize import Functionalize
from tedfx.stages.graphs import GlobalGraph
from tedfx.trace.export import trace
from tests.capture.test_models import BIASES, check, operators, routers, tokens
from tests.marks import slow
from tests.models_capacity import FACTORS, LAYERS
from tests.models_plain import Config

E, H, I, C = 4, 32, 48, 6


class Layer(nn.Module):
    """One mixture by itself."""

    def __init__(self, name, **config):
        super().__init__()
        torch.manual_seed(0)
        self.moe = LAYERS[name](replace(Config(), **config), FACTORS[name])

    def forward(self, x):
        y, aux = self.moe(x)
        return {"y": y, "loss": y.square().sum() + aux}


def capture(model):
    traced = trace(model, kwargs={"x": torch.zeros(3, 6, H, dtype=next(model.parameters()).dtype)})
    done = run_pipeline(GlobalGraph.of(traced), [Functionalize(), CaptureLoops(), CaptureCapacity()])
    traced, history = done.trace, done.history
    return traced, history[-1].result


FAST = ("switch", "signed", "marked", "padded")
OTHERS = ("modules", "nested", "at_random")


@pytest.mark.parametrize(
    "name, config",
    [
        *((name, {}) if name in FAST else slow(name, {}) for name in LAYERS if name not in OTHERS),
        slow("modules", {"expert": "normed"}),
    ],
    ids=str,
)
def test_every_way_to_write_it(name, config):
    model = Layer(name, **config).double()
    traced, result = capture(model)
    assert result.matches == 1 and find_uncaptured(traced.graph_module.graph) == []
    found = operators(traced)
    assert found.count("tedfx.dispatch.default") == found.count("tedfx.combine.default") == 1 and found.count(
        "aten.cumsum.default"
    ) in (1, 2, 3)
    widest = max(
        len(n.meta["val"].shape)
        for n in traced.graph_module.graph.nodes
        if isinstance(n.meta.get("val"), torch.Tensor)
    )
    assert widest <= 4 and not any("bmm" in o or "one_hot" in o and "float" in o for o in found)
    for values in BIASES.values():
        routers(model, values)
        check(model, traced, x=tokens())
    with torch.no_grad():  # ties: all experts have the same score
        model.moe.router.weight.zero_()
        model.moe.router.bias.zero_()
    check(model, traced, x=tokens(2, 7))
    dropped = (model(tokens())["y"].abs().sum(-1) == 0).sum()
    assert dropped > 0, "the test shall drop tokens"


@pytest.mark.slow
def test_mixtures_in_slots_of_a_mixture():
    """The inner experts, of all outer ones, are dispatched; what takes tokens to the outer ones stays."""
    model = Layer("nested").double()
    traced, result = capture(model)
    assert result.matches == 1 and [n.split(" | ")[0] for n in result.notes] == [
        f"4 experts with a capacity at {result.notes[0].split(' at ')[1]}",
        f"{LEFT}the experts are mixtures themselves, and theirs are dispatched; tokens come to the outer "
        "ones and back by products with masks",
    ]
    (dispatch,) = traced.graph_module.graph.find_nodes(
        op="call_function", target=torch.ops.tedfx.dispatch.default
    )
    assert dispatch.args[2] == 2 * 4
    for values in BIASES.values():
        routers(model, values)
        check(model, traced, x=tokens())


class Spoiled(LAYERS["straight"]):
    """What dispatches passes a gradient to other weights than those that combine."""

    passed = staticmethod(lambda weights: 2 * weights)


@pytest.mark.slow
def test_a_gradient_that_goes_straight_to_other_weights_is_refused(monkeypatch):
    monkeypatch.setitem(LAYERS, "straight", Spoiled)
    with pytest.raises(CaptureError, match="gradient to other weights than those that combine .*models_cap"):
        capture(Layer("straight").double())


class Read(LAYERS["switch"]):
    """One-hot with as many classes as the data ask for, of which `first` are taken."""

    first: ClassVar[Callable] = staticmethod(lambda wide, n: wide)

    def forward(self, x):
        numbers = (x[..., 0] * 4).long().abs()
        wide = F.one_hot(numbers, max(numbers.max() + 1, 3))
        return self.router(x) * self.first(wide, 3).sum(-1, keepdim=True), x.sum()


@pytest.mark.parametrize(
    "first", [lambda wide, n: wide, lambda wide, n: wide[..., : n + 1], lambda wide, n: wide[..., 1:n]]
)
def test_a_one_hot_whose_size_is_data_is_refused_where_more_than_its_first_classes_are_read(
    first, monkeypatch
):
    monkeypatch.setattr(Read, "first", staticmethod(first))
    monkeypatch.setitem(LAYERS, "switch", Read)
    with pytest.raises(TraceError, match="as many classes as the data ask for .*test_capture_capacity.py"):
        capture(Layer("switch").double())


def test_the_first_classes_of_a_one_hot_whose_size_is_data(monkeypatch):
    monkeypatch.setattr(Read, "first", staticmethod(lambda wide, n: wide[..., :n]))
    monkeypatch.setitem(LAYERS, "switch", Read)
    model = Layer("switch").double()
    traced, _ = capture(model)
    check(model, traced, x=tokens())
    check(model, traced, x=tokens() * 50)  # numbers beyond the classes


# --- a plain top-1 or top-2 layer whose parts can be spoiled ------------------------------------------------


def place(mask):
    return mask.cumsum(0) - mask


def keep(place):
    return place < C


def slots(place, mask):
    return F.one_hot((place * mask).sum(-1), C)


def experts(m, rows):
    return torch.bmm(F.relu(torch.bmm(rows, m.up)), m.down)


def put(mask, x):
    return einsum("nec,nh->ech", mask.to(x.dtype), x)


def behind(place, first):
    return place + first.sum(0)


class Mixture(nn.Module):
    def __init__(
        self,
        top=1,
        place=place,
        keep=keep,
        slots=slots,
        experts=experts,
        put=put,
        behind=behind,
        choose=lambda combine: combine != 0,
        back=None,
    ):
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(H, E)
        self.up, self.down = nn.Parameter(torch.randn(E, H, I)), nn.Parameter(torch.randn(E, I, H))
        self.parts = (top, place, keep, slots, experts, put, behind, choose, back)

    def forward(self, x):
        top, place, keep, slots, experts, put, behind, choose, back = self.parts
        x = x.reshape(-1, H)
        probs = self.router(x).softmax(-1)
        combine, masks, scores = 0, [], probs
        for _ in range(top):
            gate, index = scores.max(-1)
            mask = F.one_hot(index, E)
            scores = scores.masked_fill(mask.bool(), 0.0)
            at = place(mask) if not masks else behind(place(mask), masks[0])
            kept = mask * keep(at) if keep else mask
            masks.append(mask)
            combine = combine + einsum(
                "n,ne,nc->nec", gate, kept.to(gate.dtype), slots(at, kept).to(gate.dtype)
            )
        rows = experts(self, put(choose(combine), x))
        y = back(combine, rows) if back else einsum("nec,ech->nh", combine, rows)
        return {"y": y, "loss": y.square().sum()}


def clamped(place, mask):
    return F.one_hot((place * mask).sum(-1).clamp(0, C - 1), C)


def by_comparison(place, mask):
    return (place * mask).sum(-1, keepdim=True) == torch.arange(C)


def by_scatter(place, mask):
    at = (place * mask).sum(-1, keepdim=True)
    return torch.zeros(at.shape[0], C, dtype=torch.int64).scatter(1, at, 1)


def one_based(mask):
    return mask.cumsum(0) * mask - 1


def marked(mark):
    """Of who has no place, the place is a mark."""
    return lambda place, mask: torch.where(mask.bool(), place, mark).amax(-1, keepdim=True) == torch.arange(C)


def filled(place, mask):
    place = place.masked_fill(mask == 0, -1)
    return F.one_hot(torch.where(place >= C, -1, place).max(-1).values + 1, C + 1)[..., 1:]


def overflow(classes, end):
    """Whoever is beyond the capacity stands in a class that is left out."""
    return lambda place, mask: F.one_hot((place * mask).sum(-1).clamp(max=C), classes)[..., :end]


def late(other):
    """Whoever is beyond the capacity has another place."""

    def slots(place, mask):
        at = (place * mask).sum(-1, keepdim=True)
        return torch.where(at < C, at, other) == torch.arange(C)

    return slots


def after_none(place, mask):
    return F.one_hot((place * mask).sum(-1), C + 1)[..., 1:]


def within(place):
    return (place < C) & (place > -1)


@pytest.mark.parametrize(
    "parts",
    [
        slow({"place": one_based, "keep": within}),
        slow({"top": 2}),
        {"slots": by_comparison, "keep": None, "top": 2},
        slow({"slots": by_scatter}),
        slow({"slots": clamped}),
        slow({"slots": marked(-1), "top": 2}),
        {"slots": filled, "keep": None},
        slow({"slots": overflow(C + 1, -1), "keep": None, "top": 2}),
        slow({"slots": late(C), "keep": None, "top": 2}),
        slow(
            {
                "slots": after_none,
                "place": lambda mask: mask.cumsum(0) * mask,
                "keep": lambda place: place <= C,
            }
        ),
        {"slots": after_none},  # the first of each expert is dropped
        slow({"keep": lambda place: place <= C - 1, "choose": lambda combine: combine > 0}),
        slow({"place": one_based, "keep": lambda place: ~(place >= C)}),
        slow({"place": lambda mask: mask.double().cumsum(0).long() - mask}),
        {
            "put": lambda mask, x: mask.to(x.dtype).flatten(1).t() @ x,
            "experts": lambda m, rows: experts(m, rows.view(E, C, H)),
        },
        {
            "experts": lambda m, rows: einsum(
                "ecf,efh->ceh", F.gelu(einsum("ech,ehf->ecf", rows, m.up)), m.down
            ),
            "back": partial(einsum, "nec,ceh->nh"),
        },
        {"experts": lambda m, rows: torch.stack([F.relu(x @ u) @ d for x, u, d in zip(rows, m.up, m.down)])},
        slow({"experts": lambda m, rows: F.layer_norm(experts(m, rows), (H,)) * 0.5}),
    ],
)
def test_other_words_for_it(parts):
    model = Mixture(**parts).double()
    traced, result = capture(model)
    assert result.matches == 1
    for values in ("uneven", "all to one"):
        routers(model, BIASES[values])
        check(model, traced, x=tokens())


@pytest.mark.parametrize(
    "parts, why",
    [
        slow(
            {
                "place": one_based,
                "keep": lambda place: place >= 0,
                "slots": lambda place, mask: F.one_hot((place * mask).sum(-1).clamp(max=C - 1), C),
            },
            "beyond the capacity are not masked out",
        ),
        ({"keep": None, "slots": clamped}, "beyond the capacity are not masked out"),
        slow({"keep": None, "slots": overflow(C + 1, C + 1)}, "beyond the capacity are not masked out"),
        slow({"keep": None, "slots": late(C - 1)}, "beyond the capacity are not masked out"),
        slow(
            {
                "keep": None,
                "slots": lambda place, mask: F.one_hot(
                    torch.where((mask > 0) & (place < C), place, 0).sum(-1), C
                ),
            },
            "beyond the capacity are not masked out",
        ),
        ({"top": 2, "behind": lambda place, first: place}, "does not queue behind another"),
        slow(
            {"top": 2, "behind": lambda place, first: place + first.sum(0) - 1},
            "does not queue behind another",
        ),
        ({"choose": lambda combine: combine}, "not provably 0 or 1"),
        ({"experts": lambda m, rows: experts(m, rows).softmax(1)}, "along the rows"),
        slow(
            {"experts": lambda m, rows: experts(m, rows) - experts(m, rows).mean(1, keepdim=True)},
            "along the rows",
        ),
        slow(
            {"experts": lambda m, rows: experts(m, rows) * torch.arange(C)[:, None]}, "differs between slots"
        ),
        slow({"experts": lambda m, rows: experts(m, rows.flip(0))}, "flip"),
        slow(
            {
                "experts": lambda m, rows: torch.stack(
                    [F.relu(rows[e - 1] @ m.up[e]) @ m.down[e] for e in range(E)]
                )
            },
            "slots of another",
        ),
        ({"back": lambda combine, rows: rows.sum((0, 1)) + combine.sum()}, "no sum over the slots"),
        (
            {"back": lambda combine, rows: einsum("nec,ech->nch", combine, rows).sum(1)},
            "over some of them only",
        ),
    ],
)
def test_refused_by_name(parts, why):
    with pytest.raises(CaptureError, match=why) as error:
        capture(Mixture(**parts))
    assert "test_capture_capacity.py:" in str(error.value)


class Groups(Mixture):
    """A place in a sequence, a slot in the batch."""

    def forward(self, x):
        gate, index = self.router(x).softmax(-1).max(-1)
        mask = F.one_hot(index, E)
        at = ((mask.cumsum(1) - mask) * mask).sum(-1)
        combine = einsum("gs,gse,gsc->gsec", gate, mask.to(gate.dtype), F.one_hot(at, C).to(gate.dtype))
        rows = experts(self, einsum("gsec,gsh->ech", combine.bool().to(x.dtype), x))
        return {"loss": einsum("gsec,ech->gsh", combine, rows).sum()}


def test_slots_filled_from_several_groups():
    with pytest.raises(CaptureError, match="counted in groups"):
        capture(Groups())


@pytest.mark.parametrize(
    "place",
    [
        lambda mask: mask.to(torch.bfloat16).cumsum(0).long() - mask,
        lambda mask: mask.flip(0).cumsum(0) - 1,
        lambda mask: mask * 0,
    ],
    ids=["bfloat16", "flipped", "zero"],
)
def test_positions_that_say_nothing_are_not_captured(place):
    traced, result = capture(Mixture(place=place))
    assert result.matches == 0
    assert {style for style, _ in find_uncaptured(traced.graph_module.graph)} == {
        "one-hot dispatch with capacity"
    }
