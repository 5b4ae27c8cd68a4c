"""Types for every value, and the conversions that ops ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch.fx.node import map_aggregate

from tedfx.decisions.decide import decide
from tedfx.graph.emit import emit_typed, insert
from tedfx.graph.facts import CONVERSION, DIMS, RELATION, TYPE, TYPES_OF, VAL, copy_value
from tedfx.graph.nodes import argument, is_tensor, op_name, operand, operands
from tedfx.passes.base import Pass, PassResult
from tedfx.placement.plan import differentiable
from tedfx.placement.types import I, P, Placement, R, Shard, find_dim
from tedfx.rules import Relation
from tedfx.stages.graphs import PlannedGraph, TypedGraph
from tedfx.state.layouts import stack_names


def convert(x, axis, source, target):
    """A pending conversion of one value on one mesh axis (typed graph); `passes/lower_collectives.py` makes
    it an op."""
    return x


@dataclass(frozen=True)
class Place(Pass[PlannedGraph]):
    """Give every value a type and make every misfit a `convert` node.

    1. Inputs: the batch factor over the batch axes. Parameters: the plan's factors; otherwise R on the batch
       axes (their gradient is summed at the boundary), I elsewhere. Buffers and constants: I.
    2. Nodes in order: per axis `decide` (tedfx/decisions) says what each operand must be and what comes out.
       Conversions go one axis at a time and are made once per (value, target): the first reduction of a value
       serves all its users.
    3. Outputs: batch rows stay with their rank; everything else becomes I. A loss that is a partial sum is
       reduced here.
    4. Parameters whose every use on an axis, casts apart, is R become R there: their gradient is summed at
       the boundary, once, not per use. The graph of a later call takes over what the first one settled.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"tensor_plan"})
    provides: ClassVar[frozenset[str]] = frozenset({"types"})
    gives = TypedGraph

    def __call__(self, program: PlannedGraph) -> PassResult:
        return _Placement(program).run()


class _Placement:
    def __init__(self, program: PlannedGraph):
        self.program, self.graph, self.plan = program, program.graph_module.graph, program.plan
        self.made: dict[tuple, fx.Node] = {}
        self.result = PassResult()

    def run(self) -> PassResult:
        batch = set(self.plan.roles.batch)
        states = set(self.program.trace.buffers) | set(self.program.trace.constants)
        params = self.program.parameter_names
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and node in DIMS:
                type_ = {}
                for axis in self.plan.axes:
                    factor = self.plan.chosen(axis, DIMS[node])
                    batch_factor = self.program.batch_factor and self.program.batch_factor.root()
                    if node.name not in params and factor is not None and factor.root() is not batch_factor:
                        # a call's inputs and the buffers are whole but for the batch; they are sliced where
                        # they are used
                        factor = None
                    if factor is not None and node.name not in states:
                        type_[axis] = Shard(factor.root())
                    else:
                        type_[axis] = R if self._sums(node, axis, axis in batch) else I
                TYPE[node] = type_
            elif node.op == "call_function" and node in RELATION:
                self.place(node)
            elif node.op == "output":
                self.outputs(node)
        self.boundary()
        self.result.next = self.program.then(TypedGraph)
        return self.result

    def _sums(self, node: fx.Node, axis: str, otherwise: bool) -> bool:
        """Whether the gradient of an input is summed over an axis at the boundary: as the module's first
        graph settled it, else `otherwise`."""
        if node.name not in self.program.parameter_names or not differentiable(node):
            return False
        settled = self._settled(node)
        return otherwise if settled is None else axis in settled

    def _settled(self, node: fx.Node) -> tuple[str, ...] | None:
        trace, summed = self.program.trace, self.program.setting.summed
        name = trace.parameters.get(node.name) or stack_names(trace.stacked)[node.name]
        return None if summed is None else summed.get(name)

    # nodes --------------------------------------------------------------------------------------------------
    def place(self, node: fx.Node) -> None:
        self.result.matches += 1
        outs, wanted = None, [{} for _ in operands(node)]
        for axis in self.plan.axes:
            types = [self._type(n)[axis] for n in operands(node)]
            decision = self.decide(node, axis, types)
            if (
                op_name(node) == "aten.linear"
                and argument(node, 2, "bias") is not None
                and self._needs_split(node, axis, types, decision)
            ):
                return self.split_bias(node)
            outs = outs or [{} for _ in decision.out]
            for out, placement in zip(outs, decision.out):
                out[axis] = placement
            for targets, target in zip(wanted, decision.targets):
                if target is not None:
                    targets[axis] = target
        self._substitute(
            node, [self.convert_all(n, targets, node) for n, targets in zip(operands(node), wanted)]
        )
        outs = outs or [{} for _ in RELATION[node].results]
        if RELATION[node].several:
            TYPES_OF[node] = outs
        else:
            TYPE[node] = outs[0]

    def decide(self, node, axis, types):
        nodes = operands(node)
        cut = self.plan.cuts(axis)
        reduced = lambda i: any(
            (nodes[i], axis, target) in self.made for target in (I, R, *([Shard(cut)] if cut else ()))
        )
        return decide(node, axis, types, self.plan, reduced)

    def _type(self, node: fx.Node) -> Mapping[str, Placement]:
        return TYPE[node]

    @staticmethod
    def _needs_split(node, axis, types, decision) -> bool:
        return decision.out[0] == P or types[0] == P

    def split_bias(self, node: fx.Node) -> None:
        """linear(x, w, b) -> linear(x, w) + b, where the product is a partial sum: the bias must be added
        once, not once per rank."""
        x, w, bias = node.args[0], node.args[1], argument(node, 2, "bias")
        relation = RELATION[node]
        node.args, node.kwargs = (x, w), {}
        RELATION[node] = Relation(
            out=relation.out, contracted=relation.contracted, linear=(frozenset({0}), frozenset({1}))
        )
        with self.graph.inserting_after(node):
            total = insert(self.graph, torch.ops.aten.add.Tensor, node, bias, like=node)
        copy_value(node, total)
        RELATION[total] = Relation(out=relation.out, linear=(frozenset({0, 1}),))
        node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
        self.place(node)
        self.place(total)

    def _substitute(self, node: fx.Node, new: list[fx.Node]) -> None:
        queue = iter(new)
        old = operands(node)
        if old == new:
            return
        swap = lambda arg: next(queue) if isinstance(arg, fx.Node) and _counts(arg) else arg
        node.args = map_aggregate(node.args, swap)
        node.kwargs = map_aggregate(node.kwargs, swap)

    # conversions --------------------------------------------------------------------------------------------
    def converted(self, value: fx.Node, axis: str, target, user: fx.Node) -> fx.Node:
        """The value with this placement on this axis; through intermediate placements where there is no
        direct op."""
        current = TYPE[value][axis]
        if current == target or (current in (R, I) and target in (R, I) and not differentiable(value)):
            return value
        if (
            current == P and (value, axis, target) not in self.made
        ):  # reduced once: what was made of the sum first serves the others
            cut = self.plan.cuts(axis)
            made = [self.made.get((value, axis, done)) for done in (I, *([Shard(cut)] if cut else ()))]
            found = next((m for m in made if m is not None), None)
            if found is not None:
                return self.converted(found, axis, target, user)
        for middle in route(value, current, target, "scatter" in self.plan.algebra):
            value = self.step(value, axis, middle, user)
        return value

    def convert_all(self, value: fx.Node, targets: dict, user: fx.Node) -> fx.Node:
        """Several axes of one value: shards are gathered minor axis first (a factor over dp and ep lies
        dp-major), everything else in mesh order.

        An axis cuts and joins whole pieces: what axes behind it have cut of the same factor is gathered
        before and cut again after.
        """
        opens = lambda axis: isinstance(TYPE[value][axis], Shard) and TYPE[value][axis] != targets[axis]
        order = [a for a in reversed(list(targets)) if opens(a)]
        again: dict[str, Placement] = {}
        for axis in order + [a for a in targets if a not in order]:
            for inner in self._inside(value, axis, targets[axis]):
                again.setdefault(inner, targets.get(inner, TYPE[value][inner]))
                value = self.converted(value, inner, I, user)
            value = self.converted(value, axis, targets[axis], user)
        for axis in (a for a in self.plan.axes if a in again):
            value = self.converted(value, axis, again[axis], user)
        return value

    def _inside(self, value: fx.Node, axis: str, target: Placement) -> list[str]:
        """The axes behind this one that cut the factor which a conversion cuts or joins, the last first."""
        types, axes = TYPE[value], list(self.plan.axes)
        if types[axis] == target:
            return []
        moved = [x for x in (types[axis], target) if isinstance(x, Shard)]
        return [a for a in reversed(axes[axes.index(axis) + 1 :]) if types[a] in moved]

    def step(self, value: fx.Node, axis: str, target, user: fx.Node) -> fx.Node:
        key = (value, axis, target)
        if key not in self.made:
            source = TYPE[value][axis]
            with self.graph.inserting_before(user):
                node = emit_typed(
                    self.graph,
                    convert,
                    value,
                    axis,
                    str(source),
                    str(target),
                    like=user,
                    dims=DIMS[value],
                    type_={**TYPE[value], axis: target},
                    differentiable=differentiable(value),
                )
            VAL[node] = VAL[value]
            CONVERSION[node] = ((axis,), source, target)
            self.made[key] = node
            self.result.changes += 1
        return self.made[key]

    # outputs ------------------------------------------------------------------------------------------------
    def outputs(self, node: fx.Node) -> None:
        batch, written = (
            [a for a in self.plan.axes if a in self.plan.roles.batch],
            len(self.program.trace.mutated_buffers),
        )

        def finish(arg, rows: bool):
            if not isinstance(arg, fx.Node) or arg not in DIMS:
                return arg
            factor = self.program.batch_factor
            if not rows or factor is None or find_dim(DIMS[arg], factor) is None:
                return self.convert_all(arg, {axis: I for axis in self.plan.axes}, node)
            if all(TYPE[arg][axis] == Shard(factor) for axis in batch):
                return self.convert_all(arg, {axis: I for axis in self.plan.axes if axis not in batch}, node)
            arg = self.convert_all(arg, {axis: I for axis in self.plan.axes}, node)
            return self.convert_all(arg, {axis: Shard(factor) for axis in batch}, node)

        node.args = (tuple(finish(arg, i >= written) for i, arg in enumerate(argument(node, 0))),)

    def boundary(self) -> None:
        """Parameters all of whose uses on an axis go through I -> R are R there, and so are casts of them
        (autocast): the sum is of the gradient in the parameter's dtype."""
        for node in list(self.graph.nodes):
            if node.op != "placeholder" or node.name not in self.program.parameter_names:
                continue
            if self._settled(node) is not None:
                continue
            while (
                (uses := _uses(node))
                and all(user.target is convert for user in uses)
                and len({CONVERSION[user] for user in uses}) == 1
            ):
                (axis,), source, target = CONVERSION[uses[0]]
                if (source, target) != (I, R):
                    break
                for value in {node, *(operand(user, 0) for user in uses)}:
                    TYPE[value] = {**TYPE[value], axis: R}
                for user in uses:
                    user.replace_all_uses_with(operand(user, 0))
                    self.graph.erase_node(user)
                    self.result.changes -= 1


def _uses(parameter: fx.Node) -> list[fx.Node]:
    """The users of a parameter and of its casts, casts apart."""
    found = []
    for user in parameter.users:
        found.extend(user.users if op_name(user) == "aten.to" else [user])
    return found


def route(value: fx.Node, current, target, scatters: bool = True) -> list:
    """The placements on the way from one to another, each a conversion with an op of its own. `scatters`: the
    row of that name of the collective algebra."""
    if (current == P or (isinstance(current, Shard) and not scatters)) and target == R:
        return [I, R] if differentiable(value) else [I]
    if current == P and isinstance(target, Shard) and not scatters:
        return [I, target]
    if current == R and target == I:
        return [P, I]
    if isinstance(current, Shard) and (isinstance(target, Shard) or target == P):
        return [R, target]
    if not differentiable(value) and target == R:
        return [I]
    return [target]


def _counts(node: fx.Node) -> bool:
    return is_tensor(node)
