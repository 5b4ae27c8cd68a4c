"""Mesh shapes and roles: defaults, overrides, and every refusal."""

from types import SimpleNamespace

import pytest
import torch

from tedfx.errors import ConfigError
from tedfx.placement.roles import MeshShape, Roles, parse_mesh


def resolve(mesh, **roles):
    return Roles.resolve(MeshShape.of(mesh), roles)


def test_a_mesh_from_a_string_a_mapping_and_a_device_mesh():
    one = MeshShape.of("dp=2, tp=4")
    mesh = SimpleNamespace(mesh_dim_names=("dp", "tp"), mesh=torch.zeros(2, 4))
    assert one == MeshShape.of({"dp": 2, "tp": 4}) == MeshShape.of(mesh) == MeshShape.of(one)
    assert one.world == 8 and one.size(("tp",)) == 4 and one.size(()) == 1 and str(one) == "dp=2,tp=4"
    assert MeshShape.of("dp=1,tp=4").wide(("dp", "tp")) == ("tp",)


def test_defaults_by_name():
    roles = resolve("dp=2,ep=2,tp=2")
    assert (roles.batch, roles.tensor, roles.expert, roles.expert_tensor) == (
        ("dp", "ep"),
        ("tp",),
        ("ep",),
        ("tp",),
    )
    assert resolve("dp=2").tensor == () and resolve("tp=2").batch == ()


def test_axes_of_a_role_follow_the_mesh_and_names_may_be_single():
    assert resolve("ep=2,dp=2").batch == ("ep", "dp")
    assert resolve("ep=2,tp=2", expert=("tp", "ep")).expert == ("ep", "tp")
    assert resolve("data=2,model=2", batch="data", tensor="model", expert_tensor="model").tensor == ("model",)


def test_experts_on_the_tensor_axis_leave_none_for_their_width():
    roles = resolve("tp=2", expert=("tp",))
    assert roles.expert == ("tp",) and roles.expert_tensor == ()


@pytest.mark.parametrize(
    "mesh, roles, message",
    [
        ("dp2", {}, "mesh 'dp2': expected axis=size pairs such as dp=2,ep=2,tp=2, got 'dp2'"),
        ("dp=0", {}, "expected axis=size pairs .* got 'dp=0'"),
        ("dp=x", {}, "expected axis=size pairs"),
        ("=2", {}, "expected axis=size pairs"),
        ("dp=2,dp=2", {}, "axis 'dp' is named twice"),
        (
            "dp=2",
            {"pipeline": ("dp",)},
            "unknown role 'pipeline'; roles are batch, tensor, expert, expert_tensor, context, stage",
        ),
        (
            "dp=2",
            {"tensor": ("tp",)},
            r"role tensor=\('tp',\) names axis 'tp', but the mesh has axes \('dp',\)",
        ),
        ("dp=2", {"batch": ("dp", "dp")}, r"role batch=\('dp', 'dp'\) names an axis twice"),
        ("x=2", {}, "mesh axis 'x' has no role; name it dp, ep or tp, or pass roles="),
        (
            "dp=2,tp=2",
            {"batch": ("dp", "tp")},
            "roles batch and tensor share mesh axis 'tp'; they must be disjoint",
        ),
        ("dp=2,cp=2", {"batch": ("dp", "cp")}, "roles batch and context share mesh axis 'cp'"),
        (
            "ep=2,tp=2",
            {"expert": ("ep", "tp"), "expert_tensor": ("tp",)},
            "roles expert and expert_tensor share mesh axis 'tp'",
        ),
        ("dp=2", {"stage": ("dp",)}, "roles stage and batch share mesh axis 'dp'"),
        ("pp=2", {}, "mesh axis 'pp' = 2: pipeline stages are not built yet; use size 1"),
        ("cp=2", {}, "mesh axis 'cp' = 2: context parallelism are not built yet; use size 1"),
    ],
)
def test_what_is_refused(mesh, roles, message):
    with pytest.raises(ConfigError, match=message):
        resolve(mesh, **roles)


def test_axes_of_size_one_need_no_role_and_no_room():
    assert resolve("x=1,pp=1,cp=1,dp=2").batch == ("dp",)


def test_a_mesh_without_names():
    with pytest.raises(ConfigError, match="the mesh has no axis names"):
        MeshShape.of(SimpleNamespace(mesh_dim_names=None, mesh=torch.zeros(2)))


def test_parse_mesh():
    assert parse_mesh("dp=2,tp=1") == {"dp": 2, "tp": 1}
