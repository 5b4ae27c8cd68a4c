"""What a rank holds of the entries of a state dict, and copies of it in host memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.tensor import DTensor

from tedfx.state.pieces import PiecedTensor


def pieces_of(entry: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
    """(offsets, tensor) of what this rank holds of an entry of a state dict."""
    if isinstance(entry, PiecedTensor):
        return entry.pieces
    if isinstance(entry, DTensor):
        (chunk,), local = entry.__create_chunk_list__(), entry.to_local()
        return [(tuple(chunk.offsets), local.view(chunk.sizes))]
    return [((0,) * entry.dim(), entry)]


def on_host(entry: Tensor, fill: bool) -> PiecedTensor:
    """The same pieces in host memory of their own; `fill`: with their values."""
    copy = (
        (lambda t: t.detach().to("cpu", copy=True))
        if fill
        else (lambda t: torch.empty(t.shape, dtype=t.dtype))
    )
    return PiecedTensor(
        entry.shape,
        [(offsets, copy(piece)) for offsets, piece in pieces_of(entry)],
        None,
        (),
        entry.dtype,
        torch.device("cpu"),
    )


class HostCopy(AsyncStager):
    """What `dcp.async_save` writes while training goes on: each piece copied, not the storage that pieces
    share."""

    _synchronize_after_execute = False

    def stage(self, state_dict):
        copied = {
            key: on_host(entry, fill=True) if isinstance(entry, Tensor) else entry
            for key, entry in state_dict.items()
            if key != "model"
        }
        return {
            "model": {name: on_host(entry, fill=True) for name, entry in state_dict["model"].items()},
            **copied,
        }

    def close(self) -> None:
        pass
