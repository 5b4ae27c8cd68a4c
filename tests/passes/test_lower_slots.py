"""`lower_slots`: a dispatch whose groups are whole on a rank has its rows in slots; nothing about them is
data."""

import pytest

from tedfx.compiler import compile_graph, default_passes
from tedfx.placement.roles import MeshShape, Roles
from tedfx.stages.graphs import GlobalGraph
from tedfx.trace.export import trace
from tests.models_capacity import CAPACITY
from tests.passes.helpers import count, find

SLOTS = ("route_slots", "fill_slots", "send_slots", "gather_slots", "scatter_slots", "return_slots")
ROWS = ("dispatch", "route", "exchange_counts", "all_to_all_single", "grouped_linear", "combine")


@pytest.fixture(scope="module")
def gshard():
    return trace(CAPACITY["capacity_gshard"](layers=1))


def compiled(traced, mesh, roles, capacity):
    graph = GlobalGraph.of(traced, Roles.resolve(MeshShape.of(mesh), roles), set(traced.parameters))
    return compile_graph(graph, default_passes(capacity=capacity))


@pytest.mark.parametrize(
    "mesh, roles, owned, lanes, moved",
    [
        ("ep=2", None, (), (), ("send_slots", "return_slots")),
        ("dp=2,tp=2", {"expert": ("tp",)}, ("tp",), (), ()),
        ("ep=2,tp=2", None, (), ("tp",), ("send_slots", "gather_slots", "scatter_slots", "return_slots")),
    ],
)
def test_rows_of_a_capacity_per_rank_stand_in_slots(gshard, mesh, roles, owned, lanes, moved):
    program = compiled(gshard, mesh, roles, "local")
    here = ("route_slots", "fill_slots", *moved)
    assert count(program, *SLOTS) == {name: int(name in here) for name in SLOTS}
    assert not any(count(program, *ROWS).values())
    (route,) = find(program, "route_slots")
    assert route.args[3:] == (owned, lanes)


def test_rows_of_a_capacity_of_the_global_batch_do_not(gshard):
    program = compiled(gshard, "ep=2", None, "global")
    assert not any(count(program, *SLOTS).values()) and count(program, "route") == {"route": 1}
