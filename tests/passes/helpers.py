"""A model through the first passes of the pipeline, and through all of them onto ranks that are threads."""

from __future__ import annotations

import weakref

import torch
from torch import fx

from tedfx.compiler import compile_graph, default_passes, example_sizes
from tedfx.graph.nodes import op_name
from tedfx.options import Options
from tedfx.passes.base import run_pipeline
from tedfx.placement.roles import MeshShape, Roles
from tedfx.placement.sizes import solve, symbol_of
from tedfx.placement.types import format_type, kind
from tedfx.stages.graphs import GlobalGraph
from tedfx.trace.export import trace
from tests.rules.simulate import Ranks, cotangent, join, same, split

_TRACES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # a GlobalGraph is a copy


def global_graph(model, mesh: str, call: dict, roles=None, outputs=None, example=False) -> GlobalGraph:
    shape = MeshShape.of(mesh)
    if model not in _TRACES:
        _TRACES[model] = trace(model, kwargs=call)
    traced = _TRACES[model]
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    return GlobalGraph.of(
        traced,
        Roles.resolve(shape, roles),
        {p for p, n in traced.parameters.items() if n not in frozen},
        options=Options(outputs=outputs),
        example=example_sizes(traced, call) if example else None,
    )


# Megatron's and TED's own order: tokens whole on the tensor axes.
PLAIN = {"dedup": False, "sequence_parallel": False}


def upto(model, mesh: str, call: dict, last: str, roles=None, **options):
    """The program after the pass of this name, and that pass's result. No type check runs. `options` of
    `default_passes`, by default `PLAIN`."""
    program, passes = global_graph(model, mesh, call, roles), default_passes(**{**PLAIN, **options})
    names = [p.name for p in passes]
    program = run_pipeline(program, passes[: names.index(last) + 1])
    return program, program.history[-1].result


def short(node: fx.Node) -> str:
    return op_name(node).removeprefix("aten.").removeprefix("tedfx.")


def calls(program, *without: str) -> list[str]:
    """Names of the calls in order, sizes and arithmetic on them left out."""
    skip = {"sym_size", "mul_size", "getitem", *without}
    graph = program.graph_module.graph
    return [
        short(n)
        for n in graph.nodes
        if n.op == "call_function"
        and short(n) not in skip
        and (isinstance(n.meta.get("val"), torch.Tensor) or "val" not in n.meta)
    ]


def find(program, name: str) -> list[fx.Node]:
    return [n for n in program.graph_module.graph.nodes if n.op == "call_function" and short(n) == name]


def count(program, *names: str) -> dict[str, int]:
    return {name: len(find(program, name)) for name in names}


def placeholder(program, fqn: str) -> fx.Node:
    names = {
        **program.trace.parameters,
        **program.trace.buffers,
        **{k: ".".join(map(str, v)) for k, v in program.trace.inputs.items()},
    }
    return next(
        n for n in program.graph_module.graph.find_nodes(op="placeholder") if names.get(n.name) == fqn
    )


def typed(node: fx.Node) -> str:
    return format_type(node.meta["type"], node.meta["dims"])


def conversions(program) -> list[str]:
    """``tp:I>R`` per pending conversion, in order."""
    found = [n.meta["conversion"] for n in program.graph_module.graph.nodes if "conversion" in n.meta]
    return [f"{axis}:{kind(a)}>{kind(b)}" for (axis,), a, b in found]


def run_ranks(program, model, call: dict, cotangents=None):
    """Outputs and parameter gradients of the finished local graph, joined by type."""
    mesh = dict(zip(program.roles.mesh.names, program.roles.mesh.sizes))
    graph = program.graph_module.graph
    trace_ = program.trace
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values, known = {}, {}
    nodes = [n for n in graph.nodes if n.op == "placeholder"]
    for node in nodes:
        if node.name in trace_.inputs:
            (name,) = trace_.inputs[node.name]
            values[node.name] = call[name]
            for size, actual in zip(node.meta["val"].shape, call[name].shape):
                if symbol_of(size) is not None:
                    known[symbol_of(size)] = solve(size, actual)
        elif node.name != "seed":
            fqn = trace_.parameters.get(node.name) or trace_.buffers.get(node.name)
            stack = trace_.stacked.get(node.name)
            values[node.name] = (
                torch.stack([state[n] for n in stack]).detach()
                if stack
                else state[fqn].detach()
                if fqn
                else trace_.constants[node.name]
            )
    wide = {a: n for a, n in mesh.items() if n > 1}
    held = {
        n.name: split(values[n.name], n.meta["dims"], n.meta["type"], wide, known)
        for n in nodes
        if n.name in values
    }
    (output,) = graph.find_nodes(op="output")
    outs = list(output.args[0])
    sent = None
    if cotangents is not None:
        sent = [
            split(g, n.meta["dims"], cotangent(n.meta["type"]), wide, known) for n, g in zip(outs, cotangents)
        ]

    def work(rank):
        given = []
        for node in nodes:
            value = torch.tensor(11) if node.name == "seed" else held[node.name][rank].clone()
            given.append(value.requires_grad_() if node.name in program.trainable else value)
        results = fx.Interpreter(program.graph_module).run(*given)
        learned = [g for g in given if g.requires_grad]
        through = [
            (o, torch.ones_like(o) if sent is None else sent[i][rank])
            for i, o in enumerate(results)
            if o is not None and o.requires_grad
        ]
        found = torch.autograd.grad(
            [o for o, _ in through], learned, [g for _, g in through], allow_unused=True
        )
        return results, [torch.zeros_like(x) if g is None else g for g, x in zip(found, learned)]

    per_rank = Ranks({a: n for a, n in mesh.items()}).run(work)
    outputs = [
        join([r[i].detach() for r, _ in per_rank], n.meta["dims"], n.meta["type"], wide, known, f"output {i}")
        for i, n in enumerate(outs)
    ]
    learned = [n for n in nodes if n.name in program.trainable]
    gradients = {}
    for i, n in enumerate(learned):
        whole = join(
            [g[i] for _, g in per_rank],
            n.meta["dims"],
            cotangent(n.meta["type"]),
            wide,
            known,
            f"gradient of {n.name}",
        )
        gradients.update(
            zip(trace_.stacked[n.name], whole)
            if n.name in trace_.stacked
            else [(trace_.parameters[n.name], whole)]
        )
    return outputs, gradients


def parity(model, mesh: str, call: dict, roles=None, **options):
    """The whole pipeline on threads against the model itself: outputs, gradients. Returns the program."""
    program = compile_graph(global_graph(model, mesh, call, roles), default_passes(**{**PLAIN, **options}))
    expected = model(**call)
    expected = list(expected) if isinstance(expected, tuple) else [expected]
    g = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(o.shape, dtype=o.dtype, generator=g) for o in expected]
    learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    torch.autograd.backward(expected, cotangents)
    found = [p.grad for p in learned.values()]
    outputs, gradients = run_ranks(program, model, call, cotangents)
    for i, (got, want) in enumerate(zip(outputs, expected)):
        same(got, want.detach(), f"output {i} on {mesh}")
    for (name, p), want in zip(learned.items(), found):
        if name in gradients:
            same(
                gradients[name],
                torch.zeros_like(p) if want is None else want,
                f"gradient of {name} on {mesh}",
            )
    return program
