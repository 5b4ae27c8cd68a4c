"""How far two runs are apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tedfx.dtypes import widest


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
        a, e = actual.get(name), expected.get(name)
        difference = (widest(a) if e is None else widest(e) if a is None else widest(a) - widest(e)).norm()
        error = float(difference / max(float(norms.get(name, 0.0)), 1e-6 * total, 1e-300))
        found[name] = error if error == error else float("inf")
    return found


def digests(module: nn.Module) -> dict[tuple, str]:
    """{(name, coordinates on the axes that shard it): digest of the bits} of this rank's parameters,
    gradients and buffers."""
    found = {}
    for name, p in module.named_parameters():
        coordinate = p.device_mesh.get_coordinate()
        where = lambda placements: tuple(
            (axis, at)
            for axis, at, placed in zip(p.device_mesh.mesh_dim_names, coordinate, placements)
            if placed.is_shard()
        )  # noqa: B023, E731
        found[name, where(p.placements)] = _digest(p.detach().to_local())
        if p.grad is not None:
            found[f"gradient of {name}", where(p.grad.placements)] = _digest(p.grad.to_local())
    found.update(((name, ()), _digest(b.detach())) for name, b in module.named_buffers())
    return found


def _digest(tensor: Tensor) -> str:
    bits = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(bits.numpy().tobytes(), digest_size=16).hexdigest()
