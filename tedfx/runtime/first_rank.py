"""The first rank's values on every rank: what a ParallelModule is filled with when it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tedfx.errors import ConfigError
from tedfx.ranks.meeting import Meeting
from tedfx.state.parameters import Placed, materialize

_DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
_MAX_DIMS = 8


def parameters_of(
    placed: Mapping[str, Placed],
    broadcast: Callable[[str], Tensor] | None,
    like: Callable[[str], Tensor],
    device,
) -> Iterator[tuple[str, nn.Parameter]]:
    """(layout name, this rank's parameter), one after another. broadcast: a collective that gives a full
    tensor; None: they have no values yet, and the dtype of `like`'s."""
    for name, each in placed.items():
        yield name, allocate(each, like, device) if broadcast is None else materialize(each, broadcast)


def allocate(placed: Placed, source: Callable[[str], Tensor], device: torch.device) -> nn.Parameter:
    """This rank's parameter without values, in the dtype of `source`'s tensor (on the meta device)."""
    layout = placed.layout
    like = source(layout.names[0])
    want = layout.user_shape
    if tuple(like.shape) != want:
        raise ConfigError(
            f"parameter {layout.names[0]} has shape {tuple(like.shape)}, the layout of {layout.name} "
            f"expects {want}"
        )
    return nn.Parameter(
        placed.dtensor(torch.empty(placed.kept.shape, dtype=like.dtype, device=device)),
        requires_grad=layout.requires_grad,
    )


def broadcast_from_first(
    name: str, source: Callable[[str], Tensor], meeting: Meeting, group, device
) -> Tensor:
    """The mesh's first rank's `source(name)`, on every rank, on `device`; never the user's own storage.

    A header goes ahead, so that the other ranks need no tensor of their own and an error on the first rank is
    one on all. Collective over the mesh.
    """
    first = dist.get_rank() == meeting.ranks[0]
    header, problem, full = [0] * (2 + _MAX_DIMS), None, None
    if first:
        try:
            value = source(name).detach()
            if isinstance(value, DTensor):
                raise ConfigError(f"{name} is a DTensor already: parallelize takes the single-device model")
            if value.is_meta:
                raise ConfigError(f"{name} is on the meta device: give it values before it is distributed")
            if value.dtype not in _DTYPES or value.dim() > _MAX_DIMS:
                raise ConfigError(f"{name}: {value.dim()} dims of {value.dtype} cannot be distributed")
            full = torch.empty(value.shape, dtype=value.dtype, device=device)
            full.copy_(value)
            header = [_DTYPES.index(value.dtype) + 1, value.dim(), *value.shape, *header[2 + value.dim() :]]
        except Exception as error:  # told to the other ranks, then raised
            problem = error
    header = meeting.exchange(header, "parallelize")[meeting.ranks[0]]
    if header[0] == 0:
        raise problem or ConfigError(f"{name}: the first rank of the mesh could not read it; see its error")
    if full is None:
        full = torch.empty(header[2 : 2 + header[1]], dtype=_DTYPES[header[0] - 1], device=device)
    if group is not None:
        flat = full.reshape(-1)
        flat = (
            flat.view(torch.uint8) if full.element_size() == 1 else flat
        )  # bool and 8-bit floats: no backend need know
        dist.broadcast(flat, src=meeting.ranks[0], group=group)
    return full
