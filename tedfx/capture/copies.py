"""E bodies in lock-step on copies of all tokens: what experts compute where nothing is left out.

As `Bodies` on the rows of a dispatch, but the rows are those of all experts: a value of the tokens [N, ..]
stands there once per expert, (E * N, ..), and a value that each expert takes its entry of (`slots[:, e]`) is
put by expert. Then all experts have the same number of rows, so a product with stacked matrices is one einsum
with a dim of experts, and an entry per expert is spread over the rows by expansion.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tedfx.capture.batched import Batched, refuse
from tedfx.capture.bodies import Bodies
from tedfx.capture.routing import shape_of
from tedfx.capture.weights import Weight
from tedfx.graph.facts import VAL
from tedfx.placement.sizes import Size

__all__ = ["Copies"]

aten = torch.ops.aten


class Copies(Bodies):
    """`products`: how many products with an expert's own matrices were emitted."""

    products = 0

    def __init__(self, *args: Any):
        super().__init__(*args, gathered=False)
        self.copied: dict[fx.Node, fx.Node] = {}  # rows that are copies -> the tokens [N, H]
        self.sources: list[tuple[fx.Node, int]] = []  # of the rows, and the first dim that counts them

    def dispatch(self, x: fx.Node, like: fx.Node) -> fx.Node:
        shape = shape_of(x)
        flat = x if len(shape) == 2 else self.emit(aten.reshape.default, (x, [-1, shape[-1]]), {}, like)
        found = next((rows for rows, tokens in self.copied.items() if tokens is flat), None)
        if found is None:
            self.sources.append((x, 0))
            found = self.emit(aten.unsqueeze.default, (flat, 0), {}, like)
            found = self.emit(aten.expand.default, (found, [self.experts, -1, -1]), {}, like)
            found = self.emit(aten.reshape.default, (found, [-1, shape[-1]]), {}, like)
            self.copied[found] = flat
        return found

    def grouped(self, rows: fx.Node, weight: fx.Node, transposed: bool, like: fx.Node) -> fx.Node:
        self.products += 1
        if rows in self.copied:
            rows, letters = self.copied[rows], "ni"
        else:
            rows, letters = self.by_expert(rows, like), "eni"
        equation = f"{letters},{'eio' if transposed else 'eoi'}->eno"
        made = self.emit(aten.einsum.default, (equation, [rows, weight]), {}, like)
        return self.emit(aten.reshape.default, (made, [-1, shape_of(made)[-1]]), {}, like)

    def by_expert(self, rows: fx.Node, like: fx.Node) -> fx.Node:
        """(E * N, ..) as (E, N, ..)."""
        return self.emit(aten.reshape.default, (rows, [self.experts, -1, *shape_of(rows)[1:]]), {}, like)

    def expert_rows(self, param: fx.Node, lead: Batched, like: fx.Node) -> fx.Node:
        rows = self.by_expert(lead.node, like)
        count = self.emit(aten.sym_size.int, (rows, 1), {}, like)
        features = shape_of(param)[1:]
        made = self.emit(aten.unsqueeze.default, (param, 1), {}, like)
        made = self.emit(aten.expand.default, (made, [-1, count, *[-1] * len(features)]), {}, like)
        return self.emit(aten.reshape.default, (made, [-1, *features]), {}, like)

    def sizes(self, leading: list[Size], like: fx.Node) -> list[fx.Node]:
        """The sizes of the dims that count tokens, of a value of this leading shape."""
        for source, start in self.sources:
            if shape_of(source)[start : start + len(leading)] == leading:
                dims = range(start, start + len(leading))
                return [self.emit(aten.sym_size.int, (source, d), {}, like) for d in dims]
        raise refuse("experts change how tokens are grouped", like, "let an expert keep the tokens' dims")

    def weights(self, weight: Weight | None, like: fx.Node) -> fx.Node:
        """[N, E]: the weight of each expert for each token."""
        if weight is None or not any("e" in dim for dim in weight.dims):
            raise refuse("an expert's weight is not its entry of one tensor", like, "weigh by gate[:, e]")
        node = self.flat(weight.node, weight.dims, like)
        for dtype in weight.casts:
            if VAL[node].dtype != dtype:
                node = self.emit(aten.to.dtype, (node, dtype), {}, like)
        return node

    def _stacked(self, value: Any) -> Any:
        """An entry of a value of the tokens is rows, one of parameters an entry per expert."""
        out = super()._stacked(value)
        if not isinstance(out, Batched) or out is value:
            return out
        shape = shape_of(out.node)
        if all(isinstance(size, int) for size in shape) or len(shape) < 3:
            return out
        self.sources.append((out.node, 1))
        rows = self.emit(aten.reshape.default, (out.node, [-1, shape[-1]]), {}, value.like)
        return replace(out, kind="rows", made=rows, right=1, span=len(shape) - 2)
