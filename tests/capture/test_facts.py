"""What routing values mean, on graphs drawn by hand.

scores [n, e] --topk--> ids [n, k] --eq e--> hit --where--> token, slot
                   \\--> w [n, k] ----mul----> weighed --sum k--> gate
"""

import operator

import pytest
import torch
from torch import fx

from tedfx.capture.chains import dependence
from tedfx.capture.masks import facts
from tedfx.capture.slot_facts import slot_facts
from tedfx.capture.slots import Drop

aten = torch.ops.aten
N, K, E = 6, 2, 4


class Drawing:
    """Builds a graph node by node on real values."""

    def __init__(self):
        self.graph = fx.Graph()

    def input(self, name, value):
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def __call__(self, target, *args, **kwargs):
        node = self.graph.call_function(target, args, kwargs)
        args, kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*args, **kwargs)
        return node


@pytest.fixture
def d():
    drawing = Drawing()
    drawing.scores = drawing.input("scores", torch.rand(N, E))
    top = drawing(aten.topk.default, drawing.scores, K)
    drawing.w, drawing.ids = drawing(operator.getitem, top, 0), drawing(operator.getitem, top, 1)
    return drawing


def fact(d, node):
    return facts(d.graph).get(node)


def test_ids(d):
    found = fact(d, d.ids)
    assert (found.kind, found.dims, found.routing.experts, found.routing.unique) == (
        "ids",
        (("t0",), ("k",)),
        E,
        True,
    )
    assert fact(d, d.w) is None
    flat = d(aten.view.default, d.ids, [N * K])
    assert fact(d, flat).dims == (("t0", "k"),)
    first = d(aten.select.int, d.ids, 1, 0)
    assert fact(d, first).routing.node is first and fact(d, first).routing.choices == 1
    assert fact(d, d(aten.add.Tensor, d.ids, 1)) is None


def test_one_choice():
    """What is left of a dim of size 1 is a view: the same choice of experts."""
    d = Drawing()
    ids = d(operator.getitem, d(aten.topk.default, d.input("scores", torch.rand(N, E)), 1), 1)
    first = fact(d, d(aten.select.int, ids, 1, 0))
    assert (first.kind, first.dims, first.routing.node) == ("ids", (("t0",),), ids)
    mask = d(aten.one_hot.default, ids, E)
    assert fact(d, d(aten.select.int, mask, 1, 0)).dims == (("t0",), ("e",))


def place(d, mask=None):
    """(mask, its cumsum times itself): 0 where the expert was not chosen."""
    mask = d(aten.one_hot.default, d(aten.argmax.default, d.scores, -1), E) if mask is None else mask
    return mask, d(aten.mul.Tensor, d(aten.cumsum.default, mask, 0), mask)


def slot_fact(d, node):
    return slot_facts(d.graph).get(node)


def test_places_that_know_who_was_chosen(d):
    mask, at = place(d)
    less = d(aten.sub.Tensor, at, 1)
    assert [
        (slot_fact(d, n).first, slot_fact(d, n).outside) for n in (at, less, d(aten.clamp.default, less, 0))
    ] == [(1, 0), (0, -1), (0, 0)]
    assert slot_fact(d, d(aten.sub.Tensor, d(aten.cumsum.default, mask, 0), mask)).outside is None
    (term,) = slot_fact(d, d(aten.ge.Scalar, less, 0)).terms
    assert (term.hit, term.exact, term.guards, term.values) == (True, True, frozenset(), ())
    assert slot_fact(d, d(aten.gt.Scalar, at, 0)).terms[0].hit
    keep = d(aten.__and__.Tensor, d(aten.lt.Scalar, less, 2), d(aten.ge.Scalar, less, 0))
    (kept,) = slot_fact(d, keep).terms
    assert kept.hit and kept.exact and len(kept.guards) == 1
    # a comparison that holds where nobody was chosen, or that not every place passes, says no more than its
    # own bit
    assert isinstance(slot_fact(d, d(aten.ge.Scalar, less, -1)), Drop) and isinstance(
        slot_fact(d, d(aten.ge.Scalar, at, 2)), Drop
    )
    # a place masked by a bit is -1 where the bit is 0: the comparison is a bit of its own, and says that one
    masked = d(aten.sub.Tensor, d(aten.mul.Tensor, at, d(aten.lt.Scalar, at, 3)), 1)
    (term,) = slot_fact(d, d(aten.ge.Scalar, masked, 0)).terms
    assert term.hit and len(term.guards) == 2 and slot_fact(d, masked).outside == -1


def test_slots_by_comparison(d):
    _, at = place(d)
    slots = lambda node: slot_fact(
        d, d(aten.eq.Tensor, d(aten.unsqueeze.default, node, -1), d(aten.arange.default, 3))
    )
    found = slots(d(aten.sub.Tensor, at, 1))
    assert found.dims == (("t0",), ("e",), ("c",)) and found.terms[0].hit and found.terms[0].slot.first == 0
    assert not slots(at).terms[0].hit  # 0 is a slot, and the place of whoever was not chosen


def test_argmax_and_modulo():
    d = Drawing()
    scores, numbers = d.input("scores", torch.rand(3, 5, E)), d.input("numbers", torch.arange(N))
    assert fact(d, d(aten.argmax.default, scores, -1)).dims == (("t0",), ("t1",))
    assert fact(d, d(aten.argmax.default, scores, 1)).routing.experts == 5
    assert fact(d, d(aten.argmax.default, scores)) is None
    assert fact(d, d(aten.remainder.Scalar, numbers, 7)).routing.experts == 7
    drawn = fact(d, d(aten.multinomial.default, d.input("p", torch.rand(N, E)), 3, True))
    assert (drawn.routing.choices, drawn.routing.unique) == (3, False)


def test_masks(d):
    hit = d(aten.eq.Scalar, d.ids, 3)
    assert (fact(d, hit).kind, fact(d, hit).expert) == ("hit", 3)
    assert fact(d, d(aten.any.dim, hit, -1)).reduced
    assert fact(d, d(aten.any.dim, hit, 0)) is None
    one_hot = d(aten.permute.default, d(aten.one_hot.default, d.ids, E), [2, 1, 0])
    assert fact(d, one_hot).dims == (("e",), ("k",), ("t0",))
    assert (
        fact(d, d(aten.select.int, one_hot, 0, 2)).expert,
        fact(d, d(aten.select.int, one_hot, 1, 0)),
    ) == (2, None)
    more = d(aten.one_hot.default, d.ids, E + 1)  # a class that no expert has
    assert (
        fact(d, d(aten.select.int, more, 2, E - 1)).expert == fact(d, d(aten.select.int, more, 2, -2)).expert
    )
    assert fact(d, d(aten.select.int, more, 2, E - 1)).expert == E - 1
    assert fact(d, d(aten.select.int, more, 2, E)) is fact(d, d(aten.select.int, more, 2, -1)) is None
    outer = d(aten.eq.Tensor, d(aten.unsqueeze.default, d.ids, 2), d(aten.arange.default, E))
    assert fact(d, d(operator.getitem, d(aten.unbind.int, outer, 2), 1)).expert == 1
    assert fact(d, d(aten.bitwise_and.Tensor, hit, hit)) is None


def test_searches(d):
    hit = d(aten.eq.Scalar, d.ids, 0)
    token = d(operator.getitem, d(aten.where.default, hit), 0)
    assert (fact(d, token).kind, fact(d, token).column, fact(d, token).order) == ("search", 0, ("t0",))
    turned = d(aten.where.default, d(aten.t.default, hit))
    assert fact(d, d(operator.getitem, turned, 1)).order == ("k", "t0")
    found = d(aten.nonzero.default, hit)
    assert fact(d, d(aten.select.int, found, 1, 1)).column == 1
    assert fact(d, d(aten.select.int, found, 0, 0)) is None


def test_gates(d):
    hit = d(aten.eq.Scalar, d.ids, 0)
    weighed = d(aten.mul.Tensor, d.w, hit)
    gate = d(aten.sum.dim_IntList, weighed, [-1], True)
    assert fact(d, weighed).kind == "weighed"
    assert (fact(d, gate).kind, fact(d, gate).dims, fact(d, gate).weight) == (
        "gate",
        (("t0",), ()),
        (d.w, (("t0",), ("k",))),
    )
    zeros = d(aten.zeros_like.default, d.scores)
    matrix = d(aten.scatter.src, zeros, 1, d.ids, d.w)
    assert fact(d, d(aten.slice.Tensor, matrix, 1, 2, 3)).expert == 2
    assert fact(d, d(aten.scatter.src, d.scores, 1, d.ids, d.w)) is None
    logits = d(aten.scatter.src, d(aten.full_like.default, d.scores, float("-inf")), 1, d.ids, d.w)
    assert (fact(d, logits).kind, fact(d, d(aten.softmax.int, logits, -1)).kind) == ("logits", "gate")
    assert fact(d, d(aten.softmax.int, logits, 0)) is None
    mask = d(aten.sum.dim_IntList, d(aten.one_hot.default, d.ids, E), [1])
    assert fact(d, d(aten.mul.Tensor, d.scores, mask)).kind == "gate"
    row = d.input("row", torch.rand(K))
    assert fact(d, d(aten.mul.Tensor, hit, row)) is None  # one weight for many tokens


def test_numbers_taken_apart_are_no_ids(d):
    """`for e in torch.arange(E)`, which has no routing."""
    one = d(operator.getitem, d(aten.unbind.int, d(aten.arange.default, E)), 1)
    assert fact(d, one) is None
    assert fact(d, d(aten.eq.Tensor, d.ids, one)) is None


def test_dependence_ends_where_it_is_complete(d):
    total = d.input("x", torch.rand(N, 3))
    for e in range(E):
        gate = d(aten.sum.dim_IntList, d(aten.mul.Tensor, d.w, d(aten.eq.Scalar, d.ids, e)), [-1], True)
        total = d(aten.add.Tensor, total, gate)
    after = d(aten.mul.Tensor, total, 2.0)
    known = facts(d.graph)
    depends, ends = dependence(d.graph, known)
    assert [node for _, node in ends] == [total] and total not in depends and after not in depends
