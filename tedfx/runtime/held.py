"""What a rank holds of a model, under the user's names: parameters (DTensors), their gradients, buffers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tedfx.ops.context import RankContext
from tedfx.options import Options
from tedfx.ranks.meeting import Meeting
from tedfx.runtime.gradients import GradientBoundary
from tedfx.runtime.mirror import Mirror, Part, owner_of
from tedfx.state.parameters import ParameterLayout, Placed, local_of


class Held(Mirror):
    """Base of a ParallelModule. Collective over the mesh to construct.

    placed: the layouts on the mesh, by layout name. parameters, buffers: (name, tensor), which may be made
    one at a time. non_persistent: buffers that are no part of the state dict.

    placed      {layout name: Placed}: where each parameter is, and which of the user's tensors it holds.
    boundary    the GradientBoundary: process groups, and what becomes of gradients.
    """

    def __init__(
        self,
        placed: Mapping[str, Placed],
        parameters: Iterable[tuple[str, nn.Parameter]],
        buffers: Iterable[tuple[str, Tensor]],
        non_persistent: Iterable[str],
        device: torch.device,
        ranks: RankContext,
        meeting: Meeting,
        options: Options,
    ):
        super().__init__()
        self._placed, self._non_persistent = dict(placed), frozenset(non_persistent)
        self._device, self._context, self._meeting, self._options = device, ranks, meeting, options
        self._mesh = meeting.mesh
        for name, parameter in parameters:
            if options.gradient_dtype is not None:
                parameter.grad_dtype = options.gradient_dtype
            self._place_parameter(name, parameter)
        for name, tensor in buffers:
            self._place_buffer(name, tensor)
        self._boundary = GradientBoundary(self._placed, self.get_parameter, options)

    placed = property(lambda self: self._placed, doc="{layout name: Placed}, in the order of the layouts.")
    boundary = property(lambda self: self._boundary, doc="The GradientBoundary of the parameters.")
    device_mesh = property(lambda self: self._mesh, doc="The user's mesh.")
    device = property(
        lambda self: self._device, doc="Where this rank's parameters are and its inputs must be."
    )
    context = property(lambda self: self._context, doc="The RankContext that programs run in.")

    @property
    def layouts(self) -> list[ParameterLayout]:
        """A ParameterLayout per parameter."""
        return [placed.layout for placed in self._placed.values()]

    # ---- by name -------------------------------------------------------------------------------------------

    def get_parameter(self, target: str) -> nn.Parameter:
        """The parameter (a DTensor) of a layout, or under another of the user's names."""
        module, last = owner_of(self, target)
        found = module._parameters[last]
        assert found is not None
        return found

    def get_buffer(self, target: str) -> Tensor:
        module, last = owner_of(self, target)
        found = module._buffers[last]
        assert found is not None
        return found

    def held(self, name: str) -> DTensor:
        """The parameter of a layout as the DTensor that it is."""
        parameter = self.get_parameter(name)
        assert isinstance(parameter, DTensor)
        return parameter

    def local(self, name: str) -> Tensor:
        """This rank's piece of a parameter, without a gradient; of the same storage."""
        return local_of(self.get_parameter(name)).detach().view(self._placed[name].kept.shape)

    def buffer_names(self, persistent: bool = False) -> list[str]:
        """All of them, or those of the state dict."""
        names = [name for name, _ in self.named_buffers(remove_duplicate=False)]
        return [name for name in names if not (persistent and name in self._non_persistent)]

    # ---- putting there -------------------------------------------------------------------------------------

    def _place_parameter(self, name: str, parameter: nn.Parameter) -> None:
        for each in dict.fromkeys((name, *self._placed[name].layout.aliases)):
            self._place(each, parameter)

    def _place_buffer(self, name: str, tensor: Tensor) -> None:
        self._place(name, nn.Buffer(tensor, persistent=name not in self._non_persistent))

    def _place(self, name: str, tensor: Tensor) -> None:
        """Register under a dotted name, in modules made as needed.

        By setattr, which unlike `register_*` does not mind a user's name that is also an attribute of this
        class.
        """
        *path, last = name.split(".")
        module: nn.Module = self
        for i, part in enumerate(path):
            if part not in module._modules:
                setattr(module, part, Part(self, ".".join(path[: i + 1])))
            child = module._modules[part]
            assert child is not None
            module = child
        setattr(module, last, tensor)

    def _place_anew(self) -> None:
        """Zeros in the place of all parameters and buffers."""
        for name, placed in self._placed.items():
            old = self.get_parameter(name)
            local = torch.zeros(placed.kept.shape, dtype=old.dtype, device=self._device)
            self._place_parameter(name, nn.Parameter(placed.dtensor(local), requires_grad=old.requires_grad))
        for name, buffer in list(self.named_buffers()):
            self._place_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=self._device))
