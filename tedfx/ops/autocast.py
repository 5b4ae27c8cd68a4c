"""A region of torch.autocast, as a value."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Autocast:
    """A region in which autocast is on: for tensors of which device type, and to which dtype."""

    device_type: str
    dtype: torch.dtype

    @classmethod
    def around(cls, device_type: str) -> "Autocast | None":
        """The region that this code runs in, if there is one for `device_type`."""
        return (
            cls(device_type, torch.get_autocast_dtype(device_type))
            if device_type != "meta" and torch.is_autocast_enabled(device_type)
            else None
        )

    def __str__(self) -> str:
        return f"autocast {str(self.dtype).removeprefix('torch.')}"


def region(autocast: Autocast | None, device_type: str) -> contextlib.AbstractContextManager:
    """`autocast` around what runs under it, or none where it is None, whatever is around this call."""
    if autocast is not None:
        return torch.autocast(autocast.device_type, autocast.dtype, cache_enabled=False)
    return (
        torch.autocast(device_type, enabled=False)
        if Autocast.around(device_type)
        else contextlib.nullcontext()
    )
