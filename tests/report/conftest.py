"""One trace per tiny model and one compilation per mesh, for all tests of this folder."""

import functools

import pytest

from tedfx.compiler import Compilation, compile_trace
from tedfx.roles import MeshShape, Roles
from tedfx.trace import trace
from tests.models import MODELS
from tests.pool import ranks  # noqa: F401  the session's rank processes


@functools.cache
def traced(name, **options):
    return trace(MODELS[name](**options))


@functools.cache
def compiled(name, mesh, layers=2):
    each = traced(name) if layers == 2 else traced(name, num_hidden_layers=layers)
    return compile_trace(Compilation(each, Roles.resolve(MeshShape.of(mesh)), set(each.parameters)))


@pytest.fixture
def traces():
    return traced


@pytest.fixture
def compilations():
    return compiled
