"""`capacity="local"`: every batch coordinate counts places and capacity among its own tokens alone.

This is what DeepSpeed and GShard mean by a capacity under data parallelism. It is another function than that
of the global batch, and still one of a single device: the same model with its tokens in as many groups as
there are batch coordinates. So it is written as a rewrite of the single-device graph, before any type is
known; that nothing is exchanged for it follows from the types, as for everything else.

Of what decides the place of a token (facts: tedfx/capture/slot_facts.py), where the queue runs along the
batch:
1. the cumsum that numbers the queue counts in each group from the start: `group_cumsum`;
2. totals of earlier choices that are added to a place become those of the token's own group: `group_total`.
   The sum they were stays for other uses of it (the share of an expert in an auxiliary loss is one of all
   tokens);
3. the number that a place is compared with, or clamped to, is computed anew from the group's number of
   tokens: the user's own arithmetic, in which the batch is divided by the number of groups. The number stays
   as it is for other uses.
What the model makes of the places (keep bits, weights, counts of kept tokens) follows. Every other sum and
mean is over all tokens.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar

import torch
from torch import fx
from torch.fx.node import map_aggregate

from tedfx import ops
from tedfx.capture.routing import dim_of, name_of, shape_of
from tedfx.capture.slot_facts import slot_facts
from tedfx.capture.slots import Place, totals_of
from tedfx.errors import CaptureError, ConfigError, user_line
from tedfx.graph.emit import emit
from tedfx.graph.facts import CHOOSES, SLOTS, VAL
from tedfx.graph.nodes import function, is_elementwise, operand
from tedfx.passes.base import Pass, PassResult
from tedfx.placement.sizes import as_size
from tedfx.stages.graphs import GlobalGraph

__all__ = ["LocalCapacity"]

aten = torch.ops.aten
_LIMITS = ("lt", "le", "gt", "ge", "clamp", "clamp_max")


@dataclass(frozen=True)
class LocalCapacity(Pass[GlobalGraph]):
    """See the module's docstring. `groups`: 0 for as many as the mesh has batch coordinates."""

    groups: int = 0

    requires: ClassVar[frozenset[str]] = frozenset({"capacities captured"})
    provides: ClassVar[frozenset[str]] = frozenset({"local capacity"})

    def __call__(self, program: GlobalGraph) -> PassResult:
        graph, trace = program.graph_module.graph, program.trace
        groups = self.groups or program.roles.mesh.size(program.roles.batch)
        choosing = next((n for n in graph.nodes if n in CHOOSES), None)
        if choosing is not None and groups > 1:
            raise ConfigError(
                f"capacity='local': experts choose among all tokens of the batch | at {user_line(choosing)} "
                "| let them choose per sequence, or use capacity='global'"
            )
        dispatches = [n for n in graph.nodes if n in SLOTS]
        if not dispatches or groups == 1:
            return PassResult(
                notes=["a single batch coordinate: local is global"]
                if dispatches
                else ["no mixture with a capacity: nothing to count locally"]
            )
        if trace.sizes.get("batch") is None:
            raise ConfigError(
                "capacity='local' divides the batch among its ranks, and the inputs have no batch of a "
                "free size; use capacity='global'"
            )
        found = _Groups(graph, groups, trace.sizes.get("batch"), _upstream(dispatches)).rewrite()
        for node in dispatches:
            SLOTS[node] = _regrouped(SLOTS[node], trace.sizes.get("batch"))
        graph.eliminate_dead_code()
        notes = (
            [f"{groups} groups of tokens, each with a capacity of its own"]
            if found
            else ["capacities are counted per sequence: local is global"]
        )
        return PassResult(matches=len(dispatches), changes=found, notes=notes)


def _regrouped(slots, batch):
    along = any(inside and _has(size, batch) for size, inside in slots.tokens)
    return replace(slots, local=True) if along else slots


def _has(size, symbol) -> bool:
    return not isinstance(size, int) and symbol is not None and size.has(symbol)


def _upstream(dispatches: list[fx.Node]) -> set[fx.Node]:
    """What the ids of the dispatches are made of: with their keep bits, so with all places and limits."""
    found, todo = set(), [operand(n, 1) for n in dispatches]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


class _Groups:
    def __init__(self, graph: fx.Graph, groups: int, batch, upstream: set):
        self.graph, self.groups, self.batch, self.upstream = graph, groups, batch, upstream
        self.known = slot_facts(graph)
        self.numbers: dict[fx.Node, fx.Node] = {}

    def rewrite(self) -> int:
        changed = 0
        for node in list(self.graph.nodes):
            for fact in [self.known.get(n) for n in (node, *node.all_input_nodes) if n in self.upstream]:
                if isinstance(fact, Place) and self._along(fact):
                    break
            else:
                continue
            with self.graph.inserting_before(node):
                changed += self._rewrite(node)
        return changed

    def _along(self, place: Place) -> bool:
        """Whether the queue runs along the batch."""
        return any(_has(place.queue.routing.sizes[x], self.batch) for x in place.queue.labels)

    def _rewrite(self, node: fx.Node) -> bool:
        name, fact = name_of(node), self.known.get(node)
        read = {n: self.known.get(n) for n in node.all_input_nodes}
        places = {n: fact for n, fact in read.items() if isinstance(fact, Place)}
        if name == "cumsum" and isinstance(fact, Place):
            dim = dim_of(node, len(fact.dims))
            if dim is None:
                raise _refuse("places are numbered along no dim", node, "give cumsum a dim")
            args = (
                node.args[0],
                dim,
                self.groups,
                self._outer(fact.dims[dim], fact.queue.routing, node),
                VAL[node].dtype,
            )
            node.replace_all_uses_with(emit(self.graph, ops.group_cumsum, args, like=node))
            return True
        if name == "add" and isinstance(fact, Place):
            for total, fact_of_it in read.items():
                sums = totals_of(fact_of_it)
                if sums is None:
                    continue
                ((place, numbered),) = places.items()
                parts = [self._total(t, numbered, place, node) for t in self._in_order(sums.totals)]
                node.replace_input_with(
                    total, reduce(lambda a, b: emit(self.graph, aten.add.Tensor, (a, b), like=node), parts)
                )
                return True
            return False
        if name in _LIMITS and places:
            before = node.args, node.kwargs
            swap = lambda arg: (
                self._number(arg, node) if isinstance(arg, fx.Node) and arg not in places else arg
            )
            node.args, node.kwargs = (
                map_aggregate(node.args, swap),
                map_aggregate(node.kwargs, swap),
            )
            return before != (node.args, node.kwargs)
        if places and fact is None and not _by_row(node):
            raise _refuse(
                f"places of tokens are read by {name}, which mixes tokens",
                node,
                "read them token by token, or use capacity='global'",
            )
        return False

    # --- totals ---

    @staticmethod
    def _in_order(totals) -> list:
        return sorted(totals, key=lambda t: t.source.node if t.source is not None else -1)

    def _total(self, total, place: Place, like: fx.Node, node: fx.Node) -> fx.Node:
        """The total of each token's own group, laid out as the places that it is added to."""
        if total.source is None:
            raise _refuse(
                "a total of earlier choices that is no sum of a mask",
                node,
                "write it as mask.sum(0, keepdim=True)",
            )
        mask = self._laid_out(total.source.node, total.source.dims, place.dims, like, node)
        over = [d for d, dim in enumerate(place.dims) if set(dim) & total.labels]
        along = next(d for d in over if any(_has(total.routing.sizes[x], self.batch) for x in place.dims[d]))
        if any(not set(place.dims[d]) <= total.labels for d in over):
            raise _refuse(
                "a total over a part of a dim of the places", node, "keep the tokens in dims of their own"
            )
        args = (
            mask,
            over,
            along,
            self.groups,
            self._outer(place.dims[along], total.routing, node),
            torch.int64,
        )
        return emit(self.graph, ops.group_total, args, like=node)

    def _laid_out(self, value: fx.Node, dims: tuple, wanted: tuple, like: fx.Node, node: fx.Node) -> fx.Node:
        if dims == wanted:
            return value
        given, target = [d for d in dims if d], [d for d in wanted if d]
        if sorted(given) == sorted(target):
            order = [dims.index(d) for d in target] + [d for d, dim in enumerate(dims) if not dim]
            value = emit(self.graph, aten.permute.default, (value, order), like=node)
        elif [x for d in given for x in d] != [x for d in target for x in d]:
            raise _refuse(
                "earlier choices are laid out otherwise than the places that queue behind them",
                node,
                "keep one order of dims",
            )
        shape = [
            s if isinstance(s, int) else emit(self.graph, aten.sym_size.int, (like, d), like=node)
            for d, s in enumerate(shape_of(like))
        ]
        return emit(self.graph, aten.reshape.default, (value, shape), like=node)

    def _outer(self, dim: tuple, routing, node: fx.Node) -> int:
        """How many runs of tokens a dim holds one after the other, each with the whole batch: choices before
        tokens."""
        outer = 1
        for label in dim:
            if _has(routing.sizes[label], self.batch):
                return outer
            if not isinstance(routing.sizes[label], int):
                break
            outer *= routing.sizes[label]
        raise _refuse(
            "tokens are numbered with the batch behind another dim of a free size",
            node,
            "put the batch first, or use capacity='global'",
        )

    # --- numbers ---

    def _number(self, value: fx.Node, like: fx.Node) -> fx.Node:
        """A number made from sizes, for one group's share of the batch."""
        val = VAL.get(value)
        if isinstance(val, torch.Tensor):
            raise _refuse(
                "the capacity is a tensor", like, "compute it from sizes: int(factor * tokens / experts)"
            )
        if not isinstance(val, (torch.SymInt, torch.SymFloat)) or not _has(val.node.expr, self.batch):
            return value
        if value not in self.numbers:
            self.numbers[value] = self._computed(value, like)
        return self.numbers[value]

    def _computed(self, value: fx.Node, like: fx.Node) -> fx.Node:
        numbers = [n for n in value.all_input_nodes if isinstance(VAL.get(n), (torch.SymInt, torch.SymFloat))]
        if numbers:
            swap = lambda arg: self._number(arg, like) if isinstance(arg, fx.Node) else arg
            args, kwargs = map_aggregate((value.args, dict(value.kwargs)), swap)
            return emit(self.graph, function(value), args, kwargs, like=value)
        size = as_size(VAL[value])  # of a tensor: as many times the batch as it is tokens
        if (size / self.batch).has(self.batch):
            raise _refuse(
                f"the capacity is made from a size of {size}, which is no multiple of the batch",
                like,
                "compute it from the number of tokens",
            )
        return emit(self.graph, operator.floordiv, (value, self.groups), like=value)


def _by_row(node: fx.Node) -> bool:
    """Whether an op that has no fact treats each place by itself."""
    return is_elementwise(node) or name_of(node) in (
        "sym_size",
        "gather",
        "reshape",
        "view",
        "to",
        "_to_copy",
        "one_hot",
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
    )


def _refuse(what: str, node: fx.Node, fix: str) -> CaptureError:
    return CaptureError(f"capacity='local': {what} | at {user_line(node)} | {fix}")
