"""Experts of several structures in one loop: which of them are alike.

    for e in range(E):                                     ids [N, K] in 0..E-1
        y = experts[e](x[token]) if e < real else x[token]     "zero-computation" experts behind real ones
        out.index_add_(0, token, y * w[token, slot, None])

Experts are of one class if their bodies are the same operators on operands that are alike: one value, what
the routing says of each expert's own tokens, parameters of one shape, the same constants or each expert's own
number. Each class is a loop of its own (passes/capture_loops.py), and their sums add up, since an expert adds
at its tokens whatever the others do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from tedfx._torch import pytree
from tedfx.capture.chains import Step
from tedfx.capture.routing import Fact, Routing, name_of
from tedfx.graph.draws import draws
from tedfx.graph.facts import VAL

__all__ = ["classes_of", "plain_body", "runs_of"]


def classes_of(chain: Sequence[Step], routing: Routing, known: Mapping[fx.Node, Fact]) -> list[list[int]]:
    """The experts of each class, in their order; all in one where a class of several would be one expert with
    parameters (there is nothing to split then). `chain`: a step per expert."""
    compare, found = _Alike(routing, known), list[list[int]]()
    for expert, step in enumerate(chain):
        like = lambda mine: compare(chain[mine[0]].value, step.value, mine[0], expert)
        mine = next((mine for mine in reversed(found) if like(mine)), None)
        if mine is None:
            found.append([expert])
        else:
            mine.append(expert)
    if any(len(mine) == 1 and not compare.plain(chain[mine[0]].value) for mine in found):
        return [list(range(len(chain)))]
    return found


def plain_body(step: Step, routing: Routing, known: Mapping[fx.Node, Fact]) -> set[fx.Node]:
    """The body of an expert without parameters: it computes with its tokens and their weights alone, and
    draws nothing; empty of any other. What such experts add to a token is one function of it, times the sum
    of their weights."""
    return _Alike(routing, known).plain(step.value)


def runs_of(numbers: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first, behind the last, how many stand before it) of each run of neighbours."""
    runs: list[tuple[int, int, int]] = []
    for place, number in enumerate(numbers):
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1, runs[-1][2])
        else:
            runs.append((number, number + 1, place))
    return runs


class _Alike:
    def __init__(self, routing: Routing, known: Mapping[fx.Node, Fact]):
        self.routing, self.known = routing, known
        self.memo: dict[tuple[fx.Node, fx.Node], bool] = {}

    def __call__(self, a: Any, b: Any, one: int, other: int) -> bool:
        """Whether `a`, of expert `one`, and `b`, of expert `other`, are the same computation."""
        if a is b:
            return True
        if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
            return type(a) is type(b) and (a == b or (a, b) == (one, other))
        if (a, b) not in self.memo:
            self.memo[a, b] = self._nodes(a, b, one, other)
        return self.memo[a, b]

    def _nodes(self, a: fx.Node, b: fx.Node, one: int, other: int) -> bool:
        mine, its = self._fact(a), self._fact(b)
        if mine is not None or its is not None:
            return mine is not None and its is not None and mine.kind == its.kind and mine.dims == its.dims
        if a.op == b.op == "placeholder":
            return VAL[a].shape == VAL[b].shape and VAL[a].dtype == VAL[b].dtype
        if (a.op, a.target) != (b.op, b.target):
            return False
        here, spec = pytree.tree_flatten((a.args, a.kwargs))
        there, others = pytree.tree_flatten((b.args, b.kwargs))
        return spec == others and all(self(x, y, one, other) for x, y in zip(here, there))

    def _fact(self, node: fx.Node) -> Fact | None:
        fact = self.known.get(node)
        return fact if fact is not None and fact.expert is not None and fact.routing is self.routing else None

    def plain(self, value: fx.Node) -> set[fx.Node]:
        todo, seen = [value], set[fx.Node]()
        while todo:
            node = todo.pop()
            if node in seen or self._fact(node) is not None:
                continue
            seen.add(node)
            if name_of(node) in ("index", "index_select"):  # rows of tokens, or their weights
                continue
            if node.op != "call_function" or not isinstance(VAL.get(node), torch.Tensor) or draws(node):
                return set()
            todo += node.all_input_nodes
        return seen
