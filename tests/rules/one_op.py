"""A graph of one op on real tensors, typed by `decide`, and the comparison of its shards with the whole."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass, field, replace

import torch
import torch.utils._pytree as pytree
from torch import fx

from tedfx.decisions.decide import decide
from tedfx.dtypes import has_gradient
from tedfx.graph.nodes import op_name, operands
from tedfx.passes.annotate import Annotate
from tedfx.passes.base import run_pipeline
from tedfx.passes.check_types import DIRECT
from tedfx.passes.collective_algebra import NAMES
from tedfx.passes.localize import Localize
from tedfx.passes.place import route
from tedfx.placement.factors import leaves
from tedfx.placement.plan import differentiable
from tedfx.placement.types import I, P, R, Shard, kind
from tedfx.stages.graphs import PlannedGraph, TypedGraph
from tests.graphs import global_graph
from tests.rules.simulate import Ranks, cotangent, join, noise, same, split

AXIS = "tp"


@dataclass
class Case:
    """`target(*args, **kwargs)`; tensors among the arguments are the operands.

    reaches: words such as "S0>S0" that some decision must have (operand placements > output placements); a
    rule that replicated everything would pass every other check.
    """

    name: str
    target: object
    args: tuple
    kwargs: dict = field(default_factory=dict)
    reaches: tuple = ()
    random: bool = False
    frozen: tuple = ()  # operands that torch gives no gradient to
    meets: object = lambda program, types: True  # which placements of the operands can occur


@dataclass
class OneOp:
    """A graph with factors and one call; `values` of its placeholders; on `degree` ranks."""

    case: Case
    planned: PlannedGraph
    call: fx.Node
    values: dict
    degree: int

    graph_module = property(lambda self: self.planned.graph_module)
    plan = property(lambda self: self.planned.plan)
    trainable = property(lambda self: self.planned.trainable)
    mesh = property(lambda self: {AXIS: self.degree})

    def cuts(self, factor) -> bool:
        """Whether the axis may shard a factor: two ranks what they divide, more ranks whatever there is, so
        that pieces are unequal and, where the op can do with that, some are empty."""
        size, ranks = factor.size, self.degree
        if not isinstance(size, int) or size == 1:
            return False
        empty = (ranks - 1) * -(-size // ranks) >= size
        return size % ranks == 0 if ranks == 2 else not (empty and self.call.meta["relation"].filled)


def build(case: Case, trainable="all", degree: int = 2) -> OneOp:
    """A case's operands and call, up to the factors."""
    graph, values, made = fx.Graph(), {}, {}
    flat, spec = pytree.tree_flatten((case.args, case.kwargs))
    nodes = []
    for leaf in flat:
        if isinstance(leaf, torch.Tensor):
            if id(leaf) not in made:
                node = graph.placeholder(f"x{len(made)}")
                node.meta["val"] = leaf
                made[id(leaf)], values[node.name] = node, leaf
            nodes.append(made[id(leaf)])
        else:
            nodes.append(leaf)
    args, kwargs = pytree.tree_unflatten(nodes, spec)
    call = graph.call_function(case.target, tuple(args), kwargs)
    real, real_kwargs = fx.map_arg((call.args, call.kwargs), lambda n: n.meta["val"])
    call.meta["val"] = case.target(*real, **real_kwargs)
    outputs = [call]
    if isinstance(call.meta["val"], (tuple, list)):
        outputs = []
        for i, value in enumerate(call.meta["val"]):
            item = graph.call_function(operator.getitem, (call, i))
            item.meta["val"] = value
            outputs.append(item)
    graph.output(tuple(outputs))
    floats = [n for n, v in values.items() if has_gradient(v.dtype) and int(n[1:]) not in case.frozen]
    learned = {"all": floats, "first": floats[:1], "rest": floats[1:], "none": []}[trainable]
    planned = run_pipeline(
        global_graph(graph, {AXIS: degree}, floats, learned), [Annotate()], have={"functional", "row_losses"}
    )
    planned.plan.algebra = NAMES
    found = next(n for n in planned.graph.nodes if n.name == call.name)
    return OneOp(case, planned, found, values, degree)


def choices(program: OneOp, node: fx.Node) -> list:
    """The placements that an operand may come with."""
    found = [R, I] + ([P] if has_gradient(node.meta["val"].dtype) else [])
    flat = [f for d in node.meta["dims"] for f in leaves(d)]
    return found + [Shard(f) for f in dict.fromkeys(flat) if program.cuts(f) and flat.count(f) == 1]


def decisions(program):
    """Every (placements as converted, output placements) that `decide` can come to, once each; checks what
    holds for all of them."""
    call, plan = program.call, program.plan
    nodes = operands(call)
    distinct = list(dict.fromkeys(nodes))
    relation = call.meta["relation"]
    created = [f for f in dict.fromkeys(leaves(relation.created)) if program.cuts(f)]
    seen = set()
    for planned in [None, *created]:
        plan.factors = {AXIS: [planned]} if planned is not None else {}
        for combination in itertools.product(*(choices(program, n) for n in distinct)):
            given = dict(zip(distinct, combination))
            types = [given[n] for n in nodes]
            if not program.case.meets(program, types):
                continue
            decision = decide(call, AXIS, types, plan)
            final = [t if target is None else target for t, target in zip(types, decision.targets)]
            check_decision(call, nodes, types, decision, final, plan)
            if op_name(call) == "aten.linear" and len(nodes) == 3 and decision.out[0] == P:
                continue  # `Place` splits the bias off: tests/passes/test_place.py
            key = (tuple(final), tuple(decision.out), planned)
            if key not in seen:
                seen.add(key)
                yield final, decision.out, list(plan.factors.get(AXIS, ()))


def check_decision(call, nodes, types, decision, final, plan) -> None:
    what = f"{call.target} with {types} -> {final} > {decision.out}"
    for node, current, target in zip(nodes, types, final):
        if current != target and not (not differentiable(node) and {current, target} <= {R, I}):
            at = current
            for step in route(node, current, target):
                conversion = f"{kind(at)}>{kind(step)}"
                assert conversion in DIRECT, f"{what}: no conversion {conversion}"
                at = step
            assert at == target or {at, target} <= {R, I}, what
    if call.meta["relation"].kind not in ("create", "like"):
        learned = [t == I for n, t in zip(nodes, final) if differentiable(n)]
        assert all(learned) or not any(learned), f"{what}: some learned operands are I, some are not"
    again = decide(call, AXIS, final, plan)
    settled = [t if target is None else target for t, target in zip(final, again.targets)]
    assert settled == final and again.out == decision.out, (
        f"{what}: decided again it is {settled} > {again.out}"
    )


def words(program, final, outs) -> str:
    """``S0 R > S0``: for a shard its dim, and the place inside it where that is not 0."""

    def word(placement, dims):
        if not isinstance(placement, Shard):
            return str(placement)
        for d, dim in enumerate(dims):
            for k, leaf in enumerate(leaves(dim)):
                if leaf is placement.factor.root():
                    return f"S{d}" + (f".{k}" if k else "")
        return "S?"

    call = program.call
    dims = call.meta["relation"].results
    left = [word(p, n.meta["dims"]) for p, n in zip(final, operands(call))]
    return " ".join(left) + ">" + " ".join(word(p, d) for p, d in zip(outs, dims))


def localized(program, final, outs):
    """The graph of one rank for these placements."""
    source = program.graph_module.graph
    graph, where = fx.Graph(), {}
    graph.output(graph.graph_copy(source, where))
    call = where[program.call]
    for node, placement in zip(operands(call), final):
        node.meta["type"] = {AXIS: placement}
    if call.meta["relation"].several:
        call.meta["types_of"] = [{AXIS: p} for p in outs]
        for user in call.users:
            user.meta["type"] = {AXIS: outs[user.args[1]]}
    else:
        call.meta["type"] = {AXIS: outs[0]}
    for node in graph.find_nodes(op="placeholder"):
        node.meta.setdefault("type", {AXIS: I})
    own = replace(program.planned.trace, graph_module=fx.GraphModule({}, graph))
    typed = replace(program.planned, trace=own, history=[]).then(TypedGraph)
    return run_pipeline(typed, [Localize()], have={"collectives", "local_experts"}).graph_module


def flow(module, values: dict, learned: set, cotangents=None):
    """Outputs and the gradients of the learned placeholders."""
    given = []
    for node in module.graph.find_nodes(op="placeholder"):
        value = torch.tensor(7) if node.name == "seed" else values[node.name]
        given.append(value.detach().clone().requires_grad_() if node.name in learned else value)
    outputs = fx.Interpreter(module).run(*given)
    wanted = {
        n.name: g for n, g in zip(module.graph.find_nodes(op="placeholder"), given) if n.name in learned
    }
    through = [
        (o, g)
        for o, g in zip(outputs, cotangents or [None] * len(outputs))
        if g is not None and o.requires_grad
    ]
    gradients = {name: torch.zeros_like(x) for name, x in wanted.items()}
    if through:
        found = torch.autograd.grad(
            [o for o, _ in through], list(wanted.values()), [g for _, g in through], allow_unused=True
        )
        gradients.update({name: g for name, g in zip(wanted, found) if g is not None})
    return [o.detach() for o in outputs], gradients


def compare(program, final, outs, generator) -> None:
    """The shards against the whole: outputs by their type, gradients by the cotangents of the operands'
    types."""
    what = words(program, final, outs)
    learned = program.trainable
    whole = program.graph_module
    if program.case.random:
        whole = localized(program, [I for _ in final], [I for _ in outs])
    results = list(next(iter(program.graph_module.graph.find_nodes(op="output"))).args[0])
    cotangents = [
        noise(n.meta["val"], generator) if n.meta["val"].dtype.is_floating_point else None for n in results
    ]
    (expected, gradients), *_ = Ranks({AXIS: 1}).run(
        lambda rank: flow(whole, program.values, learned, cotangents)
    )

    module = localized(program, final, outs)
    types = {n: {AXIS: p} for n, p in zip(operands(program.call), final)}
    placeholders = {n.name: n for n in program.graph_module.graph.find_nodes(op="placeholder")}
    held = {
        name: split(
            v, placeholders[name].meta["dims"], types[placeholders[name]], program.mesh, generator=generator
        )
        for name, v in program.values.items()
    }
    out_types = [
        {AXIS: p} for p in (outs if len(outs) == len(results) else [outs[n.args[1]] for n in results])
    ]
    sent = [
        None if g is None else split(g, n.meta["dims"], cotangent(t), program.mesh, generator=generator)
        for g, n, t in zip(cotangents, results, out_types)
    ]
    per_rank = Ranks(program.mesh).run(
        lambda rank: flow(
            module,
            {n: v[rank] for n, v in held.items()},
            learned,
            [None if g is None else g[rank] for g in sent],
        )
    )
    for i, (node, type_) in enumerate(zip(results, out_types)):
        got = join(
            [outputs[i] for outputs, _ in per_rank],
            node.meta["dims"],
            type_,
            program.mesh,
            what=f"{what}: output {i}",
        )
        same(got, expected[i], f"{what}: output {i}")
    for name in learned:
        node = placeholders[name]
        got = join(
            [g[name] for _, g in per_rank],
            node.meta["dims"],
            cotangent(types[node]),
            program.mesh,
            what=f"{what}: gradient of {name}",
        )
        same(got, gradients[name], f"{what}: gradient of {name}")
