"""The tiled update (TED, arXiv 2303.06318, section 4): tile by tile, gradients are up-cast, unscaled and
clipped, weights updated and cast down, and all that is freed again.

A tile is a range of a share's flat elements; a batch is tiles of at most `tile` elements in all, with one
inner optimizer, which sees nothing but flat tensors. What a step allocates is what one batch needs, however
many experts there are. This is right for optimizers that update every element by itself, which
`tedfx/optim/probe.py` checks.

States that the inner optimizer makes are moved, once, into one tensor per share (`Share.homes`), of which the
tiles' entries are views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tedfx.errors import TedfxError
from tedfx.optim.shares import Share


class Staging:
    """Two host buffers of a tile through which updated shares leave for the device: the host fills one while
    the other is being copied."""

    def __init__(self):
        self._buffers: list[tuple[Tensor, Any]] = []

    def send(self, share: Share, start: int, stop: int, values: Tensor) -> None:
        device = share.parameter.device
        if values.device == device:  # nothing to stage
            share.write(start, stop, values)
            return
        size, dtype = stop - start, share.parameter.dtype
        buffer, event = self._buffers.pop(0) if len(self._buffers) == 2 else (None, None)
        if event is not None:
            event.synchronize()
        if buffer is None or buffer.numel() < size * dtype.itemsize:
            buffer = torch.empty(size * dtype.itemsize, dtype=torch.uint8, pin_memory=True)
        staged = buffer[: size * dtype.itemsize].view(dtype).copy_(values)
        share.write(start, stop, staged, asynchronous=True)
        event = torch.get_device_module(device).Event()
        event.record()
        self._buffers.append((buffer, event))


class Tile:
    """Elements [start, stop) of a share: a parameter of an inner optimizer."""

    def __init__(self, share: Share, start: int, stop: int, shape=None):
        self.share, self.start, self.stop, self.shape = share, start, stop, shape or (stop - start,)
        self.parameter = nn.Parameter(self._none() if self._apart() else self.weights().view(self.shape))
        self.provisional: tuple[str, ...] = ()  # keys that create_state made and nothing has been loaded into
        self.inner: torch.optim.Optimizer | None = None  # whose parameter it is; set by its batch

    @property
    def state(self) -> dict[str, Any]:
        """Of the inner optimizer; {} where there is none yet."""
        return {} if self.inner is None else self.inner.state.get(self.parameter, {})

    def _none(self) -> Tensor:
        return torch.empty(0, dtype=self.share.dtype, device=self.share.device)

    def _apart(self) -> bool:
        return self.share.master is None and self.share.flat() is None

    def weights(self) -> Tensor:
        """[stop - start]: of the master, or of the parameter, copied out where its elements are apart."""
        share = self.share
        flat = share.master if share.master is not None else share.flat()
        if flat is None:  # copied out
            flat = share.read(
                self.start,
                self.stop,
                torch.empty(self.stop - self.start, dtype=share.dtype, device=share.device),
            )
            return flat
        return flat[self.start : self.stop]

    def open(self, grad: Tensor, factor: Tensor | None) -> None:
        """Weights and gradient, ready for the inner optimizer. factor: 0-dim, what the gradient is multiplied
        by; None for one."""
        share = self.share
        if share.master is None:
            weights = self.weights().view(self.shape)
            if (
                weights.data_ptr() != self.parameter.data_ptr()
            ):  # copied out, or the parameter's storage is another
                self.parameter.data = weights
        mine = grad[self.start : self.stop]
        ready = mine.to(share.device).to(share.dtype)  # moved in the fewer bytes
        if factor is not None:
            ready = ready * factor if ready.data_ptr() == mine.data_ptr() else ready.mul_(factor)
        self.parameter.grad = ready.view(self.shape)

    def close(self, staging: Staging) -> None:
        share, self.parameter.grad = self.share, None
        if share.master is not None:
            staging.send(share, self.start, self.stop, self.parameter.detach().view(-1))
        elif self._apart():
            share.write(self.start, self.stop, self.parameter.detach().view(-1))
            self.parameter.data = self._none()


class Batch:
    """Tiles that are updated together. make: [tensors] -> an inner optimizer. finishing: shares whose last
    tile is here, in order."""

    def __init__(self, tiles: list[Tile], make: Callable[[list[Tensor]], torch.optim.Optimizer]):
        self.tiles = tiles
        self.finishing = [tile.share for tile in tiles if tile is tile.share.tiles[-1]]
        for (
            tile
        ) in tiles:  # an optimizer may make states as soon as it is made, of the weights that it then sees
            tile.parameter.data = tile.weights().view(tile.shape) if tile._apart() else tile.parameter.data
        self.inner = make([tile.parameter for tile in tiles])
        for tile in tiles:
            tile.inner, tile.parameter.data = (
                self.inner,
                tile._none() if tile._apart() else tile.parameter.data,
            )
        self._settle(tiles)

    def with_gradient(self, grads: Mapping[str, Tensor]) -> list[Tile]:
        return [tile for tile in self.tiles if tile.share.name in grads]

    def step(
        self, options: dict[str, Any], grads: dict[str, Tensor], factor: Tensor | None, staging: Staging
    ) -> None:
        """options: hyperparameters now. grads: by the share's name; shares without one stay as they are."""
        self.inner.param_groups[0].update(options)
        tiles = self.with_gradient(grads)
        for tile in tiles:
            tile.open(grads[tile.share.name], factor)
            for key in tile.provisional:
                del tile.state[key]
            tile.provisional = ()
        if tiles:
            self.inner.step()
        for tile in tiles:
            tile.close(staging)
        self._settle(tiles)

    def _settle(self, tiles: Iterable[Tile]) -> None:
        """Move state tensors of a tile's shape to their homes."""
        for tile in tiles:
            for key, value in tile.state.items():
                if not isinstance(value, Tensor) or value.shape != torch.Size(tile.shape):
                    continue
                share = tile.share
                home = share.homes.get(key)
                if home is None and len(share.tiles) == 1:
                    share.homes[key] = value.view(-1)
                    continue
                if home is None:
                    home = share.homes[key] = torch.empty(share.numel, dtype=value.dtype, device=value.device)
                place = home[tile.start : tile.stop].view(tile.shape)
                if place.data_ptr() != value.data_ptr():
                    place.copy_(value)
                    tile.state[key] = place

    def create(self, options: dict[str, Any], wanted: set[str]) -> None:
        """The states of these shares' tiles as they are before the first step: a step on copies, of which the
        first value written under each key is kept."""
        tiles = [tile for tile in self.tiles if tile.share.name in wanted and not tile.state]
        if not tiles:
            return
        self.inner.param_groups[0].update(options)
        before = [tile.parameter.data for tile in tiles]
        for tile in tiles:
            tile.parameter.data = torch.zeros(
                tile.shape, dtype=tile.share.dtype, device=tile.share.device
            ).copy_(tile.weights().view(tile.shape))
            tile.parameter.grad = torch.zeros_like(tile.parameter)
            self.inner.state[tile.parameter] = First()
        self.inner.step()
        for tile, data in zip(tiles, before):
            tile.parameter.grad, tile.parameter.data = None, data
            found = tile.state
            if not isinstance(found, First):
                raise TedfxError(
                    f"{type(self.inner).__name__} puts another state in the place of a parameter's, so "
                    "what it starts from cannot be known"
                )
            self.inner.state[tile.parameter] = dict(found.values_then)
            tile.provisional = tuple(tile.state)
        self._settle(tiles)

    def drop(self, names: set[str]) -> None:
        """Forget the states of these shares; the homes are the caller's."""
        for tile in self.tiles:
            if tile.share.name in names:
                self.inner.state.pop(tile.parameter, None)
                tile.provisional = ()


class First(dict):
    """A dict that remembers the first value that was put under each key."""

    def __init__(self):
        super().__init__()
        self.values_then: dict[str, Any] = {}

    def __setitem__(self, key, value):
        if key not in self.values_then:
            self.values_then[key] = value.clone() if isinstance(value, Tensor) else value
        super().__setitem__(key, value)


def cut(shares: list[Share], tile: int | None) -> list[list[Tile]]:
    """Tiles in batches of at most `tile` elements, in order. A share that fits into a batch is not cut; one
    that does not is cut at multiples of `tile`, from an own batch on.

    With None: one batch, one tile per share, in the share's own shape. A share without elements on this rank
    has a tile too: its states exist, empty.
    """
    if tile is None:
        for share in shares:
            share.tiles = [Tile(share, 0, share.numel, tuple(share.placed.share.shape))]
        return [[tile for share in shares for tile in share.tiles]] if shares else []
    batches: list[list[Tile]] = [[]]
    room = tile
    for share in shares:
        share.tiles, at = [], 0
        while at < share.numel or not share.tiles:
            if batches[-1] and share.numel - at > room:
                batches.append([])
                room = tile
            size = min(share.numel - at, room)
            share.tiles.append(Tile(share, at, at + size))
            batches[-1].append(share.tiles[-1])
            at, room = at + size, room - size
    return [batch for batch in batches if batch]
