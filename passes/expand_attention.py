"""Fused attention written out where its fused form says less than types need."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tedfx.graph.emit import emit
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import argument, op_name
from tedfx.passes.base import Pass, PassResult
from tedfx.placement.sizes import as_size
from tedfx.stages.graphs import GlobalGraph

aten = torch.ops.aten


@dataclass(frozen=True)
class ExpandAttention(Pass[GlobalGraph]):
    """`scaled_dot_product_attention` stays whole, except with grouped heads and with dropout.

    1. `enable_gqa` with fewer key than query heads: keys and values are repeated by a view, as models do by
       hand, so that heads are one factor.
    2. `dropout_p > 0`: scores, softmax, dropout and product apart. The fused kernel draws its mask from each
       rank's own generator, so heads split over ranks would repeat draws; a separate dropout is
       counter-based. Costs the (queries x keys) matrix.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"functional"})

    def __call__(self, program: GlobalGraph) -> PassResult:
        result, graph = PassResult(), program.graph_module.graph
        for node in list(graph.nodes):
            if node.op != "call_function" or op_name(node) != "aten.scaled_dot_product_attention":
                continue
            result.matches += 1
            q, k, v = node.args[:3]
            gqa = argument(node, 7, "enable_gqa", False) and as_size(VAL[q].shape[-3]) != as_size(
                VAL[k].shape[-3]
            )
            dropout = argument(node, 4, "dropout_p", 0.0)
            if not gqa and not dropout:
                continue
            result.changes += 1
            make = lambda target, *args, **kwargs: emit(graph, target, args, kwargs, like=node)
            with graph.inserting_before(node):
                if gqa:
                    groups = int(VAL[q].shape[-3]) // int(VAL[k].shape[-3])
                    k, v = self._repeat(make, k, groups), self._repeat(make, v, groups)
                mask, causal = argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", False)
                scale = argument(node, 6, "scale")
                if dropout:
                    new = self._written_out(make, q, k, v, mask, dropout, causal, scale)
                else:
                    new = make(
                        aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, causal, scale=scale
                    )
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        graph.eliminate_dead_code()
        return result

    @staticmethod
    def _repeat(make, x: fx.Node, groups: int) -> fx.Node:
        """(b, kv, s, d) -> (b, kv x groups, s, d), each head `groups` times in a row."""
        wide = make(aten.unsqueeze.default, x, 2)
        wide = make(aten.expand.default, wide, [-1, -1, groups, -1, -1])
        sizes = [make(aten.sym_size.int, x, d) for d in (0, 2)]
        return make(
            aten.reshape.default,
            wide,
            [sizes[0], int(VAL[x].shape[1]) * groups, sizes[1], VAL[x].shape[3]],
        )

    @staticmethod
    def _written_out(make, q, k, v, mask, dropout, causal, scale) -> fx.Node:
        scale = 1.0 / math.sqrt(int(VAL[q].shape[-1])) if scale is None else scale
        scores = make(
            aten.mul.Tensor, make(aten.matmul.default, q, make(aten.transpose.int, k, -2, -1)), scale
        )
        if causal:
            queries, keys = (
                make(aten.sym_size.int, q, VAL[q].dim() - 2),
                make(aten.sym_size.int, k, VAL[k].dim() - 2),
            )
            ones = make(aten.full.default, [queries, keys], True, dtype=torch.bool, device=VAL[q].device)
            scores = make(
                aten.masked_fill.Scalar,
                scores,
                make(aten.logical_not.default, make(aten.tril.default, ones)),
                float("-inf"),
            )
        if mask is not None:
            if VAL[mask].dtype == torch.bool:
                scores = make(
                    aten.masked_fill.Scalar, scores, make(aten.logical_not.default, mask), float("-inf")
                )
            else:
                scores = make(aten.add.Tensor, scores, mask)
        weights = make(aten.softmax.int, scores, -1)
        return make(aten.matmul.default, make(aten.dropout.default, weights, dropout, True), v)
