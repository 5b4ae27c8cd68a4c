"""Losses in rows form: what a mean hides becomes a sum and a count that types can see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tedfx.errors import TraceError, user_line
from tedfx.graph.emit import emit
from tedfx.graph.facts import VAL
from tedfx.graph.nodes import argument, op_name, operand
from tedfx.passes.base import Pass, PassResult
from tedfx.stages.graphs import GlobalGraph

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitLosses(Pass[GlobalGraph]):
    """`cross_entropy(mean | sum)` becomes rows (`reduction='none'`), their sum, and for a mean the number of
    labels that count.

    1. Logits of more than two dims are brought to `(rows, classes)`.
    2. `sum(rows)`, and for a mean `sum(rows) / sum(labels != ignore_index)` (with class weights: over the sum
       of the weights of the labels).

    The sum over sharded rows is then a partial sum and the count another: the global mean, whatever the
    number of valid labels per rank.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"functional"})
    provides: ClassVar[frozenset[str]] = frozenset({"row_losses"})

    def __call__(self, program: GlobalGraph) -> PassResult:
        result, graph = PassResult(), program.graph_module.graph
        for node in list(graph.nodes):
            if node.op == "call_function" and op_name(node) == "aten.cross_entropy_loss":
                result.matches += 1
                if argument(node, 3, "reduction", 1) != 0 or VAL[node.args[0]].dim() != 2:
                    self._rewrite(graph, node)
                    result.changes += 1
        graph.eliminate_dead_code()
        return result

    def _rewrite(self, graph: fx.Graph, node: fx.Node) -> None:
        logits, labels = operand(node, 0), operand(node, 1)
        weight, reduction = argument(node, 2, "weight"), argument(node, 3, "reduction", 1)
        ignore, smoothing = argument(node, 4, "ignore_index", -100), argument(node, 5, "label_smoothing", 0.0)
        if VAL[labels].dtype.is_floating_point:
            raise TraceError(
                "cross_entropy with class probabilities is not supported; use class indices "
                f"({user_line(node)})"
            )
        make = lambda target, *args, **kwargs: emit(graph, target, args, kwargs, like=node)
        with graph.inserting_before(node):
            rank = VAL[logits].dim()
            if rank == 1:
                logits, labels = (
                    make(aten.unsqueeze.default, logits, 0),
                    make(aten.unsqueeze.default, labels, 0),
                )
            elif rank > 2:  # (n, classes, ...) -> (n, ..., classes) -> (rows, classes)
                order = [0, *range(2, rank), 1]
                logits = make(
                    aten.reshape.default,
                    make(aten.permute.default, logits, order),
                    [-1, VAL[logits].shape[1]],
                )
                labels = make(aten.reshape.default, labels, [-1])
            if weight is not None and smoothing:
                raise TraceError(
                    "cross_entropy with class weights and label smoothing is not supported "
                    f"({user_line(node)})"
                )
            rows = make(aten.cross_entropy_loss.default, logits, labels, weight, 0, ignore, smoothing)
            if reduction == 0:
                shape = VAL[operand(node, 1)].shape
                if len(shape) == 1:
                    raise AssertionError(node)
                sizes = [
                    make(aten.sym_size.int, node.args[1], d) if isinstance(size, torch.SymInt) else size
                    for d, size in enumerate(shape)
                ]
                new = make(aten.reshape.default, rows, sizes) if shape else make(aten.sum.default, rows)
            else:
                new = make(aten.sum.default, rows)
                if reduction == 1:
                    valid = make(aten.ne.Scalar, labels, ignore)
                    if weight is not None:
                        safe = make(aten.mul.Tensor, labels, valid)
                        valid = make(aten.mul.Tensor, make(aten.index.Tensor, weight, [safe]), valid)
                    count = make(aten.sum.default, valid)
                    new = make(aten.div.Tensor, new, make(aten.to.dtype, count, VAL[rows].dtype))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
