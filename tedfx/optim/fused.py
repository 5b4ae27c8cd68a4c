"""Adam and AdamW by one kernel per tile (`tedfx/kernels/adam.py`): cast, clipping, update and the rounding to
the parameter in one pass, where torch's own step wants a gradient in the masters' dtype, already scaled.

The states are those that torch's class made in its first step: checkpoints and `state_dict()` are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tedfx import _torch, kernels

if TYPE_CHECKING:
    from tedfx.optim.tiles import Staging, Tile


def takes(inner: torch.optim.Optimizer, tiles: list[Tile], grads: Mapping[str, Tensor]) -> bool:
    """Whether the kernel does what `inner.step()` would: Adam or AdamW themselves, fused, without amsgrad,
    once torch has made the states."""
    group = inner.param_groups[0]
    if type(inner) not in (torch.optim.Adam, torch.optim.AdamW) or not group["fused"] or group["amsgrad"]:
        return False
    if any(isinstance(value, Tensor) for value in (group["lr"], *group["betas"])):
        return False  # a number on the device, which the kernel would have to be given from the host
    return all(
        tile.state
        and not tile.provisional
        and kernels.takes(grads[tile.share.name], tile.state["exp_avg"], tile.share.local())
        and (tile.share.master is None or kernels.takes(tile.share.master))
        for tile in tiles
    )


def step(
    inner: torch.optim.Optimizer,
    tiles: list[Tile],
    grads: Mapping[str, Tensor],
    factor: Tensor | None,
    staging: Staging,
) -> None:
    """One step of the tiles. factor: 0-dim on the device, what the gradients are multiplied by."""
    from tedfx.kernels import adam

    group: dict[str, Any] = inner.param_groups[0]
    counts = [tile.state["step"] for tile in tiles]
    _torch.add_to_all(counts, 1)
    factor = factor.float() if factor is not None else None
    for tile, count in zip(tiles, counts):
        share, flat = tile.share, tile.share.flat()
        weight = tile.weights()
        low = flat[tile.start : tile.stop] if share.master is not None and flat is not None else None
        adam.update(
            weight,
            grads[share.name][tile.start : tile.stop],
            tile.state["exp_avg"].view(-1),
            tile.state["exp_avg_sq"].view(-1),
            low,
            factor,
            count,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            maximize=group["maximize"],
        )
        if flat is None:  # the parameter's elements are apart
            staging.send(share, tile.start, tile.stop, weight)
        else:  # a graph that has saved the parameter must see that it was written to
            torch.autograd.graph.increment_version(share.local())
