"""Graphs that a test writes by hand, as the stages that passes take."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
from torch import fx

from tedfx._torch import pytree
from tedfx.placement.plan import Plan
from tedfx.placement.roles import MeshShape, Roles
from tedfx.stages.graphs import GlobalGraph, PlannedGraph, TypedGraph
from tedfx.trace.global_graph import Trace


def global_graph(graph: fx.Graph, mesh="dp=1", parameters: Iterable[str] = (), trainable=()) -> GlobalGraph:
    """The graph as if a model without inputs had been traced to it; `parameters` names placeholders."""
    (output,) = graph.find_nodes(op="output")
    given = output.args[0] if isinstance(output.args[0], tuple) else (output.args[0],)
    output.args = (given,)
    trace = Trace(
        graph_module=fx.GraphModule({}, graph),
        parameters={name: name for name in parameters},
        tied={},
        buffers={},
        constants={},
        inputs={},
        in_spec=pytree.tree_structure(((), {})),
        out_spec=pytree.tree_structure(given),
        training=True,
        signature=inspect.Signature(),
        sizes={},
        bounds={},
        static=[],
        notes=[],
        values={},
        device=torch.device("cpu"),
    )
    return GlobalGraph.of(trace, Roles.resolve(MeshShape.of(mesh)), trainable)


def typed_graph(graph: fx.Graph, mesh) -> TypedGraph:
    """A graph whose nodes have types already, with an empty plan."""
    program = global_graph(graph, mesh)
    return program.then(PlannedGraph, plan=Plan(program.roles)).then(TypedGraph)
