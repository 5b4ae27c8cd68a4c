"""An `Explanation` as plain values."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from tedfx._version import __version__
from tedfx.analysis.layers import path_of
from tedfx.placement.types import format_type
from tedfx.report.uncompiled import SCHEMA
from tedfx.report.words import ROLES, full_line_of, op_of

if TYPE_CHECKING:
    from tedfx.report.explanation import Explanation


def as_json(told: Explanation) -> dict[str, Any]:
    c, mesh = told.compilation, told.compilation.roles.mesh
    return {
        "schema": SCHEMA,
        "tedfx": __version__,
        "torch": torch.__version__,
        "title": told.view.title,
        "mesh": dict(zip(mesh.names, mesh.sizes)),
        "world": mesh.world,
        "roles": {role: list(getattr(c.roles, role)) for role in ROLES},
        "signature": told.signature,
        "outputs": list(c.setting.output_names),
        "sizes": dict(told.values),
        "parameters": told.parameters,
        "memory": told.memory.to_json(),
        "layers": [
            {
                "path": s.path,
                "count": len(s.members),
                "members": s.members,
                "nodes": [_node(told, n) for n in [*s.parameters, *s.nodes]],
            }
            for s in told.segments
            if s.like is None
        ],
        "totals": [
            {
                "phase": t.phase,
                "collective": t.op,
                "axes": list(t.axes),
                "ranks": t.ranks,
                "count": t.count,
                "formula": str(t.payload),
                "bytes": told.number(t.payload),
                "wire_formula": str(t.wire),
                "wire_bytes": told.number(t.wire),
                "expected": t.ragged,
            }
            for t in told.cost.totals()
        ],
        "accumulation": {
            "micro_batches": told.view.micro_batches,
            "schedules": [asdict(s) for s in told.schedules],
        }
        if told.schedules
        else None,
        "redundant": [
            {
                "axes": list(r.axes),
                "copies": list(r.copies),
                "formula": str(r.payload),
                "bytes": told.number(r.payload),
            }
            for r in told.cost.redundant()
        ],
        "passes": [
            {
                "name": r.name,
                "text": r.text,
                "matches": r.result.matches,
                "changes": r.result.changes,
                "notes": list(r.result.notes),
                "seconds": r.seconds,
            }
            for r in c.history
        ],
        "stages": dict(told.view.stages),
        "notes": [{"from": where, "note": note, "count": n} for (where, note), n in told.notes().items()],
    }


def _node(told: Explanation, node: fx.Node) -> dict[str, Any]:
    shape, value = told.sizes.shape(node), node.meta.get("val")
    type_, dims = node.meta.get("type"), node.meta.get("dims")
    return {
        "name": node.name,
        "state": told.state_name(node) if node.op == "placeholder" else None,
        "op": op_of(node),
        "line": full_line_of(node) or None,
        "module": path_of(node),
        "inputs": [i.name for i in node.all_input_nodes],
        "shape": None if shape is None else [s if isinstance(s, int) else str(s) for s in shape],
        "dtype": str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else None,
        "type": None
        if type_ is None
        else {axis: format_type({"": p}, dims).removeprefix(":") for axis, p in type_.items()},
        "region": node.meta.get("region"),
        "communication": [
            {
                "collective": item.op,
                "axes": list(item.axes),
                "ranks": item.ranks,
                "phase": item.phase,
                "formula": str(item.payload),
                "bytes": told.number(item.payload),
                "expected": item.ragged,
            }
            for item in told.cost.by_node.get(node.name, ())
        ],
    }
