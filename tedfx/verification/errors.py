"""How far two runs are apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tedfx.dtypes import widest
from tedfx.state.parameters import as_dtensor, local_of


def relative(actual: float, expected: float) -> float:
    error = abs(actual - expected) / max(abs(expected), 1e-30)
    return error if error == error else float("inf")


def errors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Per name: norm of the difference over the larger of the reference's norm and 1e-6 of the total norm.

    A tensor that one side lacks counts as zero there.
    """
    norms = {name: widest(e).norm() for name, e in expected.items()}
    total = float(torch.stack(list(norms.values())).norm()) if norms else 0.0
    found = {}
    for name in {**expected, **actual}:
        sides = [widest(side[name]) for side in (actual, expected) if name in side]
        difference = sides[0] - sides[1] if len(sides) == 2 else sides[0]
        error = float(difference.norm() / max(float(norms.get(name, 0.0)), 1e-6 * total, 1e-300))
        found[name] = error if error == error else float("inf")
    return found


def digests(module: nn.Module) -> dict[tuple, str]:
    """{(name, coordinates on the axes that shard it): digest of the bits} of this rank's parameters,
    gradients and buffers."""
    found = {}
    for name, p in module.named_parameters():
        found[name, _where(as_dtensor(p))] = _digest(local_of(p.detach()))
        if p.grad is not None:
            found[f"gradient of {name}", _where(as_dtensor(p.grad))] = _digest(local_of(p.grad))
    found.update(((name, ()), _digest(b.detach())) for name, b in module.named_buffers())
    return found


def _where(held: DTensor) -> tuple[tuple[str, int], ...]:
    """This rank's coordinates on the axes that shard it."""
    mesh = held.device_mesh
    names, coordinate = mesh.mesh_dim_names, mesh.get_coordinate()
    assert names is not None and coordinate is not None, mesh  # as `parallelize` asks of a mesh
    return tuple((axis, at) for axis, at, each in zip(names, coordinate, held.placements) if each.is_shard())


def _digest(tensor: Tensor) -> str:
    bits = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(bits.numpy().tobytes(), digest_size=16).hexdigest()
