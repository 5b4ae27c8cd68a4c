"""What `.grad` of the parameters holds between two steps: nothing, a reduced gradient or an unsynced one (see
`tedfx/runtime/gradients.py`). What somebody takes goes to them instead (`tedfx/runtime/leaving.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tedfx.runtime.leaving import Leaving
from tedfx.state.parameters import Placed, local_of


class Accumulated:
    """Of the parameters of one ParallelModule. placed, parameter: as of the gradient boundary. dtype: of what
    is kept, by default the gradients' own."""

    def __init__(
        self,
        placed: Mapping[str, Placed],
        parameter: Callable[[str], nn.Parameter],
        dtype: torch.dtype | None,
        leaving: Leaving,
    ):
        self._placed, self._parameter, self._dtype, self._leaving = placed, parameter, dtype, leaving

    def add(self, name: str, value: Tensor, placements: tuple) -> None:
        """Add a gradient with these placements (this rank's share of a sum, or its part of one) to what is
        there, which has the same."""
        parameter, placed = self._parameter(name), self._placed[name]
        if tuple(placements) == placed.share.placements and self._leaving.of(name) is not None:
            self.leave([(name, value)])
            return
        value = value.to(self._dtype or value.dtype)
        if parameter.grad is None:
            parameter.grad = placed.dtensor(value.contiguous(), placements)
        else:
            local_of(parameter.grad).add_(value.view(placed.extent(placements).held))

    def leave(self, values: Iterable[tuple[str, Tensor]], work: dist.Work | None = None) -> None:
        """Send this rank's shares of sums to who takes them, when `work` is done."""
        sent = [(name, value.to(self._dtype or value.dtype)) for name, value in values]
        if sent:
            self._leaving.send(sent, work)

    def pop_unsynced(self, name: str) -> Tensor | None:
        """The unsynced gradient, flat, which is taken out of `.grad`; None where there is none."""
        parameter = self._parameter(name)
        if parameter.grad is None or not self._is_unsynced(parameter.grad, self._placed[name]):
            return None
        held, parameter.grad = local_of(parameter.grad).reshape(-1), None
        return held

    def make_unsynced(self, name: str) -> None:
        """A reduced gradient becomes a partial sum of the same value: it is kept on one rank, zeroed on the
        others, and nothing is sent."""
        placed, parameter = self._placed[name], self._parameter(name)
        if parameter.grad is None or self._is_unsynced(parameter.grad, placed):
            return
        local, parameter.grad = local_of(parameter.grad), None
        if placed.share_dim is not None:  # shares are apart: their sum over the ranks is the whole
            share, local = local, local.new_zeros(placed.local_held)
            placed.share_of(local).copy_(share)
        elif not _is_first(placed):
            local.zero_()
        parameter.grad = placed.dtensor(local, placed.unsynced)

    def _is_unsynced(self, grad: Tensor, placed: Placed) -> bool:
        assert isinstance(grad, DTensor)
        return placed.reduce_axes != () and tuple(grad.placements) == placed.unsynced


def _is_first(placed: Placed) -> bool:
    """Whether this rank is coordinate 0 of the axes that the gradient is summed over."""
    mesh = placed.mesh
    return all(
        index == 0
        for axis, index in zip(mesh.mesh_dim_names, mesh.get_coordinate())
        if axis in placed.reduce_axes
    )
