"""The exact norm of the global gradient: every element is counted once, on whatever mesh."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from tedfx import _torch
from tedfx.optim.shares import Share

CHUNK = 2**26  # elements: what a cast of a gradient for the norm may take


def counts(share: Share) -> bool:
    """Whether this rank's elements of the share are counted here: it is coordinate 0 on the axes over which
    other ranks hold the same."""
    mesh = share.placed.mesh
    return all(
        index == 0
        for axis, index in zip(mesh.mesh_dim_names, mesh.get_coordinate())
        if axis not in share.placed.share.axes
    )


def gradient_norm(grads: Iterable[tuple[Share, Tensor]], group, device, chunk: int | None) -> Tensor:
    """0-dim float64: the 2-norm over all ranks, of gradients as they are. One all-reduce of one number over
    `group` (None for one rank).

    Sums run in float32 (float64 for float64) inside a chunk and in float64 over chunks and parameters. Not
    finite as soon as any rank's gradient is not.
    """
    alike: dict[tuple, list[Tensor]] = {}  # by dtype and device: one launch for all of them
    for share, grad in grads:
        if counts(share) and grad.numel():
            parts = grad.split(min(chunk or CHUNK, CHUNK))
            alike.setdefault((grad.dtype, grad.device), []).extend(parts)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for (dtype, _), parts in alike.items():
        norms = _torch.norms(parts, torch.float64 if dtype == torch.float64 else torch.float32)
        total += torch.stack(norms).double().square().sum().to(device)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total.sqrt()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """As torch.nn.utils.clip_grad_norm_ computes it."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)
