"""Adam and AdamW by one kernel for many tiles (`tedfx/kernels/adam.py`): cast, clipping, update and the
rounding to the parameter in one pass, where torch's own step wants a gradient in the masters' dtype, already
scaled. It needs no memory beside the tiles', so that it takes many batches at once.

The states are those that torch's class made in its first step: checkpoints and `state_dict()` are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tedfx import _torch, kernels

if TYPE_CHECKING:
    from tedfx.optim.tiles import Batch, Staging, Tile

TOGETHER = 2**27
"""Elements of a launch where updated shares are gathered, so that gathers run beside the next launch."""


def runs(
    batches: list[Batch], grads: Mapping[str, Tensor], options: Mapping[str, Any]
) -> Iterator[tuple[list[Batch], bool]]:
    """The batches in order: those that a launch takes together, and the others one by one (False). options:
    hyperparameters now."""
    together: list[Batch] = []
    room = 0
    for batch in batches:
        tiles = batch.with_gradient(grads)
        if not tiles or not _takes(batch.inner, options, tiles, grads):
            if together:
                yield together, True
            together = []
            yield [batch], False
            continue
        if together and room <= 0:
            yield together, True
            together = []
        room = (room if together else TOGETHER) - sum(t.stop - t.start for t in tiles if t.share.travels)
        together.append(batch)
    if together:
        yield together, True


def _takes(
    inner: torch.optim.Optimizer, options: Mapping[str, Any], tiles: list[Tile], grads: Mapping[str, Tensor]
) -> bool:
    """Whether the kernel does what `inner.step()` would: Adam or AdamW themselves, fused, without amsgrad,
    once torch has made the states, of tiles whose weights are in place."""
    if type(inner) not in (torch.optim.Adam, torch.optim.AdamW):
        return False
    if not options["fused"] or options["amsgrad"]:
        return False
    if any(isinstance(value, Tensor) for value in (options["lr"], *options["betas"])):
        return False  # a number on the device, which the kernel would have to be given from the host
    return all(
        tile.state
        and not tile.provisional
        and kernels.takes(grads[tile.share.name], tile.state["exp_avg"], tile.share.local())
        and not tile.share.host
        and (tile.share.master is not None or tile.share.flat() is not None)
        for tile in tiles
    )


def step(
    batches: list[Batch],
    options: Mapping[str, Any],
    grads: Mapping[str, Tensor],
    factor: Tensor | None,
    staging: Staging,
) -> None:
    """One step of the batches' tiles. options: hyperparameters now; factor: 0-dim on the device, what the
    gradients are multiplied by."""
    from tedfx.kernels.adam import Bases, Entry, update

    tiles = [tile for batch in batches for tile in batch.with_gradient(grads)]
    _torch.add_to_all([tile.state["step"] for tile in tiles], 1)
    alike: dict[tuple, tuple[Bases, list[Entry]]] = {}  # by dtypes: a launch
    at = lambda flat, tile: flat.data_ptr() + tile.start * flat.element_size()
    for tile in tiles:
        share, flat, state = tile.share, tile.share.flat(), tile.state
        weights = flat if share.master is None else share.master
        low = flat if share.master is not None else None
        grad, moments = grads[share.name], state["exp_avg"]
        assert weights is not None  # `_takes`
        bases = Bases(weights, grad, moments, low)
        kind = tuple(None if x is None else x.dtype for x in bases)
        alike.setdefault(kind, (bases, []))[1].append(
            Entry(
                at(weights, tile),
                at(grad, tile),
                moments.data_ptr(),
                state["exp_avg_sq"].data_ptr(),
                0 if low is None else at(low, tile),
                state["step"].data_ptr(),
                tile.stop - tile.start,
            )
        )
    for bases, entries in alike.values():
        update(
            entries,
            bases,
            factor.float() if factor is not None else None,
            lr=options["lr"],
            betas=options["betas"],
            eps=options["eps"],
            weight_decay=options["weight_decay"],
            decoupled=options["decoupled_weight_decay"],
            maximize=options["maximize"],
        )
    for tile in tiles:
        share = tile.share
        if share.master is not None and share.flat() is None:  # the parameter's elements are apart
            staging.send(share, tile.start, tile.stop, share.master[tile.start : tile.stop])
    # A graph that has saved a parameter must see that it was written to.
    torch.autograd.graph.increment_version([s.local() for s in {tile.share: None for tile in tiles}])
