"""One trace per tiny model and one compilation per mesh, for all tests of this folder."""

import functools

import pytest

from tedfx.compiler import compile_graph, default_passes
from tedfx.placement.roles import MeshShape, Roles
from tedfx.stages.graphs import GlobalGraph
from tedfx.trace.export import trace
from tests.models import MODELS


@functools.cache
def traced(name, layers):
    return trace(MODELS[name](num_hidden_layers=layers))


@functools.cache
def compiled(name, mesh, layers=3, **options):
    each = traced(name, layers)
    return compile_graph(
        GlobalGraph.of(each, Roles.resolve(MeshShape.of(mesh)), set(each.parameters)),
        default_passes(**{"dedup": False, "sequence_parallel": False, **options}),
    )


@pytest.fixture
def traces():
    return traced


@pytest.fixture
def compilations():
    return compiled
