"""One trace per tiny model and one compilation per mesh, for all tests of this folder."""

import functools

import pytest
import torch._dynamo

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


@pytest.fixture(scope="module", autouse=True)
def shape_functions_are_cached():
    """A step on fake tensors asks for the same sizes again and again; tests/conftest.py has it off."""
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=True):
        yield


@pytest.fixture
def traces():
    return traced


@pytest.fixture
def compilations():
    return compiled
