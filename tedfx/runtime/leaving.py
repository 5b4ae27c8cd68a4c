"""Summed gradients that leave the device instead of staying in `.grad` (ZeRO-Offload, arXiv 2101.06840).

A **taker** takes the gradients of some parameters: `take(name, value)` is called, bucket by bucket while
backward runs, with this rank's share of a sum, flat; several backwards give several values, which it adds up.
On a GPU the calls are made on a stream of their own, behind the bucket's collective, so that copies overlap
backward; `value` may be freed as soon as what the taker launched there has run. `.grad` of such a parameter
stays None, but for what `no_sync()` has not summed yet.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Taker(Protocol):
    def take(self, name: str, value: Tensor) -> None:
        """Add this to the gradient of a layout."""

    def taken(self, name: str) -> Tensor | None:
        """The gradient so far, flat; None where there is none."""

    def drop(self, name: str, zero: bool) -> None:
        """Forget the gradient, or make it zero."""


class Leaving:
    """Who takes what. Takers are held weakly: when one is gone, gradients are in `.grad` again."""

    def __init__(self):
        self._takers: dict[str, weakref.ref] = {}
        self._streams: dict[torch.device, torch.Stream] = {}

    def to(self, taker: Taker, names: Iterable[str]) -> None:
        self._takers.update(dict.fromkeys(names, weakref.ref(taker)))

    def of(self, name: str) -> Taker | None:
        found = self._takers.get(name)
        return found() if found is not None else None

    def ready(self, work: dist.Work, device: torch.device) -> bool:
        """Whether waiting for a collective stops neither the host nor the stream that backward runs on."""
        return device.type != "cpu" and dist.get_backend() == "nccl" or work.is_completed()

    def send(self, values: Iterable[tuple[str, Tensor]], work: dist.Work | None = None) -> None:
        """Each to its taker, when `work` is done. Where the host has to wait for work, it waits here."""
        values = list(values)
        device = values[0][1].device if values else torch.device("cpu")
        if device.type == "cpu":
            if work is not None:
                work.wait()
            self._give(values)
            return
        streams = torch.get_device_module(device)
        if device not in self._streams:
            self._streams[device] = streams.Stream(device)
        side = self._streams[device]
        if work is None:
            side.wait_stream(streams.current_stream(device))
        with streams.stream(side):
            if work is not None:
                work.wait()
            self._give(values)
        for _, value in values:
            value.record_stream(side)

    def _give(self, values: list[tuple[str, Tensor]]) -> None:
        for name, value in values:
            if (taker := self.of(name)) is not None:
                taker.take(name, value.reshape(-1))

    def drop(self, zero: bool) -> None:
        """`zero_grad` of the module."""
        for name in self._takers:
            if (taker := self.of(name)) is not None:
                taker.drop(name, zero)
