"""What can be said of a ParallelModule without a compilation: mesh, roles, parameters."""

from __future__ import annotations

import json
from math import prod
from typing import Any

from tedfx._version import __version__
from tedfx.report.tables import wrap
from tedfx.report.words import ROLES, count_of

SCHEMA = 1  # of to_json, here and in tedfx/report/as_json.py


class Uncompiled:
    """Of a module before its first call, or whose `program` was compiled without a record."""

    def __init__(self, pm, program, signature: str):
        self.pm, self.program, self.signature = pm, program, signature

    def to_json(self) -> dict[str, Any]:
        mesh, roles = self.pm.device_mesh, getattr(self.pm, "roles", None)
        sizes = dict(zip(mesh.mesh_dim_names, mesh.mesh.shape))
        groups: dict[tuple, list] = {}
        for layout in self.pm.layouts:
            axes = tuple(a for a, _ in layout.shards if sizes[a] > 1)
            groups.setdefault(axes, []).append(layout)
        total = lambda layouts: sum(prod(layout.shape) for layout in layouts)
        local = lambda axes, layouts: total(layouts) // prod(sizes[a] for a in axes)
        return {
            "schema": SCHEMA,
            "tedfx": __version__,
            "mesh": sizes,
            "world": mesh.size(),
            "roles": {role: list(getattr(roles, role)) for role in ROLES} if roles is not None else None,
            "compiled": self.program is not None,
            "signature": self.signature or None,
            "parameters": {
                "tensors": len(self.pm.layouts),
                "total": total(self.pm.layouts),
                "local": sum(local(axes, layouts) for axes, layouts in groups.items()),
                "groups": [
                    {"axes": list(a), "tensors": len(g), "total": total(g), "local": local(a, g)}
                    for a, g in groups.items()
                ],
            },
        }

    def __str__(self) -> str:
        data = self.to_json()
        mesh = ",".join(f"{a}={n}" for a, n in data["mesh"].items())
        lines = [f"ParallelModule on mesh {mesh} ({data['world']} ranks)"]
        if data["roles"]:
            lines.append(
                "roles       " + "  ".join(f"{r}={','.join(a)}" for r, a in data["roles"].items() if a)
            )
        p = data["parameters"]
        lines.append(
            f"parameters  {count_of(p['total'])} in {p['tensors']} tensors; on a rank {count_of(p['local'])}"
            + (f" ({p['local'] / p['total']:.1%})" if p["total"] else "")
        )
        for group in p["groups"]:
            where = f"split over {', '.join(group['axes'])}" if group["axes"] else "whole"
            lines.append(
                f"  {where:<22} {group['tensors']:>4} tensors, {count_of(group['total'])}, "
                f"{count_of(group['local'])} on a rank"
            )
        if self.program is None:
            lines.append(
                "not compiled yet: call the module once, then print(pm) shows the graph of this rank "
                "and what it communicates"
            )
        else:
            lines.append(
                f"signature   {self.signature}; {len(self.program.graph_module.graph.nodes)} nodes, "
                "compiled without a record to explain"
            )
        return "\n".join(wrap(line) for line in lines)

    __repr__ = __str__

    def dumps(self, **options) -> str:
        return json.dumps(self.to_json(), **{"indent": 1, **options})
