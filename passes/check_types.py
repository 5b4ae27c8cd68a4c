"""The type check: no op is left with an operand that does not fit its rule."""

from __future__ import annotations

from torch import fx

from tedfx.decisions.decide import decide
from tedfx.errors import TypeCheckError, user_line
from tedfx.graph.facts import CONVERSION, DIMS, RELATION, TYPE, TYPES_OF
from tedfx.graph.nodes import operand, operands
from tedfx.placement.plan import differentiable
from tedfx.placement.types import I, R, Shard, kind
from tedfx.stages.graphs import LocalGraph, TypedGraph

# (source, target) pairs with an op of their own, S for any shard
DIRECT = {"P>I", "I>R", "R>P", "I>P", "P>S", "R>S", "I>S", "S>R", "S>I"}


def check_types(
    program: TypedGraph | LocalGraph, after="", fine: dict[fx.Node, tuple[list, list]] | None = None
) -> int:
    """Re-derive every node's type from its operands' and compare; the number of nodes checked.

    Called by the runner after every pass once types exist. Raises TypeCheckError with the node, the axis,
    what it has, what its rule says, and the user's line. Independent of how the types came about: a pass that
    drops, doubles or misplaces a conversion is found here.

    fine: what was found right before, filled by this; where nothing that a check reads is another, it is not
    made again.
    """
    checked, fine = 0, {} if fine is None else fine
    for node in program.graph_module.graph.nodes:
        if node.op == "output":
            _check_output(program, node, after)
        if node.op != "call_function":
            continue
        if node in CONVERSION:
            _check_conversion(node, after)
            checked += 1
        elif (
            node in RELATION and (node in TYPE or node in TYPES_OF) and all(n in TYPE for n in operands(node))
        ):
            read = _read(program, node)
            if not _same(fine.get(node), read):
                _check_node(program, node, after)
                fine[node] = read
            checked += 1
    return checked


def _read(program, node: fx.Node) -> tuple[list, list]:
    """All that the check of a node reads: things that are compared by identity, and placements."""
    plan = program.plan
    things = [node.target, node.args, node.kwargs, RELATION[node], plan.tokens]
    equal = [plan.sequence, plan.dedup, plan.algebra, {a: list(f) for a, f in plan.factors.items()}]
    for each in (node, *operands(node)):
        things += [each, DIMS.get(each)]
        types = TYPES_OF.get(each) or (TYPE.get(each),)
        equal += [differentiable(each), [t and dict(t) for t in types]]
    return things, equal


def _same(known: tuple[list, list] | None, now: tuple[list, list]) -> bool:
    return (
        known is not None
        and len(known[0]) == len(now[0])
        and all(a is b for a, b in zip(known[0], now[0]))
        and known[1] == now[1]
    )


def _fail(node: fx.Node, axis, text: str, after: str):
    where = user_line(node)
    raise TypeCheckError(
        f"{'after ' + after + ': ' if after else ''}{node.name} on axis {axis}: {text} ({where})"
    )


def _check_node(program, node: fx.Node, after: str) -> None:
    relation = RELATION[node]
    if relation.kind in ("getitem",) and operand(node, 0) not in TYPES_OF:
        return
    nodes = operands(node)
    if relation.kind in ("grouped", "expert_rows", "combine", "dispatch") and any(
        DIMS.get(n) is None for n in nodes
    ):
        return
    for axis in program.plan.axes:
        types = [TYPE[n][axis] for n in nodes]
        decision = decide(node, axis, types, program.plan, lambda i: False)
        have = [t[axis] for t in TYPES_OF[node]] if relation.several else [TYPE[node][axis]]
        for value, current, target in zip(nodes, types, decision.targets):
            if (
                target is not None
                and current != target
                and not (not differentiable(value) and current in (R, I) and target in (R, I))
            ):
                _fail(node, axis, f"operand {value.name} is {current}, the op needs {target}", after)
        if decision.out != have:
            _fail(node, axis, f"its type is {have}, its operands {types} make it {decision.out}", after)


def _check_conversion(node: fx.Node, after: str) -> None:
    axes, source, target = CONVERSION[node]
    value = operands(node)[0]
    if f"{kind(source)}>{kind(target)}" not in DIRECT:
        _fail(node, axes, f"there is no conversion {source} -> {target}", after)
    for axis, placement in TYPE[node].items():
        before = TYPE[value][axis]
        if axis in axes:
            if before != source or placement != target:
                _fail(
                    node,
                    axis,
                    f"converts {source} -> {target}, but its operand is {before} and its type {placement}",
                    after,
                )
        elif before != placement:
            _fail(
                node, axis, f"changes from {before} to {placement} on an axis that it does not convert", after
            )


def _check_output(program, node: fx.Node, after: str) -> None:
    factor = program.batch_factor
    for value in node.all_input_nodes:
        for axis, placement in TYPE.get(value, {}).items():
            rows = (
                isinstance(placement, Shard)
                and factor is not None
                and placement.factor.root() is factor.root()
            )
            if not rows and placement != I and not (placement == R and not differentiable(value)):
                _fail(
                    value,
                    axis,
                    f"leaves the graph as {placement}; outputs are I, or sharded by the batch",
                    after,
                )
