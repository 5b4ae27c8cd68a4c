"""Mesh shape and roles: which mesh axes split which part of the work (the roles table of the design page)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any, TypeAlias

from torch.distributed.device_mesh import DeviceMesh

from tedfx.errors import ConfigError

DEFAULTS = {
    "batch": ("dp", "ep"),
    "tensor": ("tp",),
    "expert": ("ep",),
    "expert_tensor": ("tp",),
    "context": ("cp",),
    "stage": ("pp",),
}
_DISJOINT = [("batch", "tensor"), ("batch", "context"), ("expert", "expert_tensor")] + [
    ("stage", other) for other in ("batch", "tensor", "expert", "expert_tensor", "context")
]


@dataclass(frozen=True)
class MeshShape:
    """Axis names and sizes, major first: all that the compiler knows of a mesh."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, mesh: "MeshLike") -> "MeshShape":
        """From a DeviceMesh with named axes, a mapping of name to size, or ``"dp=2,ep=2"``."""
        if isinstance(mesh, MeshShape):
            return mesh
        if isinstance(mesh, str):
            mesh = parse_mesh(mesh)
        if mesh is None:
            raise ConfigError(
                "mesh is None; pass a DeviceMesh: init_device_mesh('cuda', (2, 2), "
                "mesh_dim_names=('ep', 'tp'))"
            )
        if isinstance(mesh, Mapping):
            return cls(tuple(mesh), tuple(int(v) for v in mesh.values()))
        names = getattr(mesh, "mesh_dim_names", None)
        if names is None:
            raise ConfigError(
                "the mesh has no axis names; pass mesh_dim_names=('dp', 'ep', 'tp') (any subset) to "
                "init_device_mesh"
            )
        return cls(tuple(names), tuple(mesh.mesh.shape))

    def size(self, axes: Iterable[str]) -> int:
        return prod(dict(zip(self.names, self.sizes))[a] for a in axes)

    @property
    def world(self) -> int:
        return prod(self.sizes)

    def wide(self, axes: Iterable[str]) -> tuple[str, ...]:
        """The axes among these whose size exceeds 1, in the given order."""
        return tuple(a for a in axes if self.size((a,)) > 1)

    def __str__(self) -> str:
        return ",".join(f"{n}={s}" for n, s in zip(self.names, self.sizes))


MeshLike: TypeAlias = MeshShape | DeviceMesh | Mapping[str, int] | str | None


def parse_mesh(text: str) -> dict[str, int]:
    """``"dp=2,ep=2,tp=2"`` to a dict."""
    out: dict[str, int] = {}
    for word in text.split(","):
        name, _, size = word.strip().partition("=")
        if not name or not size.isdigit() or int(size) < 1:
            raise ConfigError(
                f"mesh {text!r}: expected axis=size pairs such as dp=2,ep=2,tp=2, got {word.strip()!r}"
            )
        if name in out:
            raise ConfigError(f"mesh {text!r}: axis {name!r} is named twice")
        out[name] = int(size)
    return out


@dataclass(frozen=True)
class Roles:
    """Axes per role, each a tuple in mesh order, major first."""

    batch: tuple[str, ...] = ()
    tensor: tuple[str, ...] = ()
    expert: tuple[str, ...] = ()
    expert_tensor: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    stage: tuple[str, ...] = ()
    mesh: MeshShape = field(default=MeshShape((), ()), repr=False)

    @classmethod
    def resolve(cls, mesh: MeshShape, given: Any = None) -> "Roles":
        """Defaults from the axis names, overridden by ``given`` (role -> its axes, or one axis); everything
        wrong is one ConfigError line."""
        if isinstance(given, str) or not isinstance(given or {}, Mapping):
            raise ConfigError(
                f"roles={given!r}: pass a dict of role names to axis names, such as roles={{'expert': "
                f"('tp',)}}"
            )
        asked: dict[str, tuple[str, ...]] = {}
        chosen_by_user: Mapping[str, Any] = given or {}
        for role, axes in chosen_by_user.items():
            if role not in DEFAULTS:
                raise ConfigError(f"unknown role {role!r}; roles are {', '.join(DEFAULTS)}")
            axes = (axes,) if isinstance(axes, str) else tuple(axes)
            for axis in axes:
                if axis not in mesh.names:
                    raise ConfigError(
                        f"role {role}={axes!r} names axis {axis!r}, but the mesh has axes {mesh.names}"
                    )
            if len(set(axes)) != len(axes):
                raise ConfigError(f"role {role}={axes!r} names an axis twice")
            asked[role] = axes
        chosen: dict[str, tuple[str, ...]] = {}
        for role, default in DEFAULTS.items():
            chosen[role] = tuple(a for a in mesh.names if a in asked.get(role, default))
        if "expert_tensor" not in asked:
            chosen["expert_tensor"] = tuple(a for a in chosen["expert_tensor"] if a not in chosen["expert"])
        roles = cls(**chosen, mesh=mesh)
        roles._check()
        return roles

    def _check(self) -> None:
        used = {a for f in fields(self) if f.name != "mesh" for a in getattr(self, f.name)}
        for axis in self.mesh.names:
            if axis not in used and self.mesh.size((axis,)) > 1:
                raise ConfigError(
                    f"mesh axis {axis!r} has no role; name it dp, ep or tp, or pass roles={{'batch': "
                    f"({axis!r},), ...}}"
                )
        for one, other in _DISJOINT:
            common = set(getattr(self, one)) & set(getattr(self, other))
            if common:
                raise ConfigError(
                    f"roles {one} and {other} share mesh axis {sorted(common)[0]!r}; they must be disjoint"
                )
        for role, name in (("stage", "pipeline stages"), ("context", "context parallelism")):
            for axis in getattr(self, role):
                if self.mesh.size((axis,)) > 1:
                    raise ConfigError(
                        f"mesh axis {axis!r} = {self.mesh.size((axis,))}: {name} are not built yet; use "
                        "size 1"
                    )
