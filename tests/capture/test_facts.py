"""What routing values mean, on graphs drawn by hand.

    scores [n, e] --topk--> ids [n, k] --eq e--> hit --where--> token, slot
                       \\--> w [n, k] ----mul----> weighed --sum k--> gate
"""

import operator

import pytest
import torch
from tedfx.passes.capture_chains import dependence
from tedfx.passes.capture_masks import facts
from torch import fx

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
    assert (found.kind, found.dims, found.routing.experts, found.routing.unique) == ("ids", (("t0",), ("k",)), E, True)
    assert fact(d, d.w) is None
    flat = d(aten.view.default, d.ids, [N * K])
    assert fact(d, flat).dims == (("t0", "k"),)
    first = d(aten.select.int, d.ids, 1, 0)
    assert fact(d, first).routing.node is first and fact(d, first).routing.choices == 1
    assert fact(d, d(aten.add.Tensor, d.ids, 1)) is None


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
    assert (fact(d, d(aten.select.int, one_hot, 0, 2)).expert, fact(d, d(aten.select.int, one_hot, 1, 0))) == (2, None)
    assert fact(d, d(aten.one_hot.default, d.ids, E + 1)) is None
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
    assert (fact(d, gate).kind, fact(d, gate).dims, fact(d, gate).weight) == ("gate", (("t0",), ()), (d.w, (("t0",), ("k",))))
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


def test_dependence_ends_where_it_is_complete(d):
    total = d.input("x", torch.rand(N, 3))
    for e in range(E):
        gate = d(aten.sum.dim_IntList, d(aten.mul.Tensor, d.w, d(aten.eq.Scalar, d.ids, e)), [-1], True)
        total = d(aten.add.Tensor, total, gate)
    after = d(aten.mul.Tensor, total, 2.0)
    known = facts(d.graph)
    depends, ends = dependence(d.graph, known)
    assert [node for _, node in ends] == [total] and total not in depends and after not in depends
