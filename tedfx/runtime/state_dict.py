"""The state of a ParallelModule: parameters and buffers under the user's names, in and out.

`state_dict()` has an entry per name of the user's model (stacked experts one by one, tied tensors under each
name), in the user's shape: a DTensor where plain placements can say the layout, else a `PiecedTensor`. Both
go through `torch.distributed.checkpoint`, and a file written on one mesh loads on any other:

    state = pm.state_dict(); dcp.load(state, checkpoint_id=path); pm.load_state_dict(state)

`load_state_dict` takes the same, or full tensors: the state dict of the single-device model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tedfx.errors import TedfxError
from tedfx.runtime.pretrained import Pretrained
from tedfx.state.parameters import Placed, as_dtensor
from tedfx.state.pieces import PiecedTensor


class StateError(TedfxError, RuntimeError):
    """A state dict does not fit the module."""


class LoadResult(NamedTuple):
    missing_keys: list[str]
    unexpected_keys: list[str]


class StateDicts(Pretrained):
    """`state_dict`, `load_state_dict`, and full parameters and gradients."""

    def state_dict(
        self,
        *,
        destination: dict | None = None,
        prefix: str = "",
        keep_vars: bool = False,
        to_fill: bool = False,
    ) -> dict[str, Tensor]:
        """This rank's share under the user's names; shares storage with the module. `keep_vars` must be
        False.

        `to_fill`: entries may have no values yet (a model from the meta device), for
        `torch.distributed.checkpoint.load` to write into; hand the result to `load_state_dict`.
        """
        if not to_fill:
            self.require_weights("state_dict")
        if keep_vars:
            raise TedfxError(
                "state_dict(keep_vars=True): entries in the user's shape are not the parameters; use "
                "named_parameters()"
            )
        state = {} if destination is None else destination
        for name, placed in self._placed.items():
            for user_name, entry in placed.entries(self.held(name)).items():
                state[prefix + user_name] = entry
        for name in self.buffer_names(persistent=True):
            state[prefix + name] = self.get_buffer(name).detach()
        return state

    @torch.no_grad()
    def gather_parameters(self, buffers: bool = False) -> dict[str, Tensor]:
        """{user's name: full tensor} on every rank, tied names included. A collective.

        With `buffers`, the persistent ones too: the state dict of the single-device model.
        """
        self.require_weights("gather_parameters")
        full = {}
        for name, placed in self._placed.items():
            full.update((k, v.clone()) for k, v in placed.gather(self.held(name)).items())
        if buffers:
            full.update((name, self.get_buffer(name).clone()) for name in self.buffer_names(persistent=True))
        return full

    @torch.no_grad()
    def gather_gradients(self) -> dict[str, Tensor]:
        """{user's name: full gradient of the global loss} on every rank; parameters without one are left out.

        A gradient that `no_sync()` left unsynced is summed for the answer and stays as it is. A collective.
        """
        full = {}
        for name, placed in self._placed.items():
            parameter, taker = self.get_parameter(name), self._boundary.leaving.of(name)
            taken = taker.taken(name) if taker is not None else None
            found = (
                {}
                if parameter.grad is None
                else {k: v.clone() for k, v in placed.gather(as_dtensor(parameter.grad)).items()}
            )
            if taken is not None:  # this rank's share is with an optimizer, on the host
                share = placed.dtensor(
                    taken.to(parameter.device).view(placed.share.shape), placed.share.placements
                )
                found = {
                    k: v + found[k] if k in found else v.clone() for k, v in placed.gather(share).items()
                }
            full.update(found)
        return full

    # ---- in ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> LoadResult:
        """Copy values in, from entries as `state_dict()` gives them or from the user's full tensors.

        Every key and shape is checked before the first value is copied. One name of a tied tensor is enough.
        A DTensor or a PiecedTensor of another layout is gathered first, a collective. `strict=False` returns
        what did not fit by name; a wrong shape is an error all the same.
        """
        if assign:
            raise TedfxError(
                "load_state_dict(assign=True): parameters of a ParallelModule keep their place; values "
                "are copied"
            )
        wanted: dict[str, torch.Size] = {}
        groups: list[
            tuple[str, Placed | None, tuple[str, ...]]
        ] = []  # (parameter or buffer, its layout, tied names)
        for name, placed in self._placed.items():
            layout = placed.layout
            wanted.update((user_name, torch.Size(layout.user_shape)) for user_name in layout.names)
            groups.extend((name, placed, names) for names in layout.groups)
        for name in self.buffer_names(persistent=True):
            wanted[name] = self.get_buffer(name).shape
            groups.append((name, None, (name,)))
        missing = [names[0] for _, _, names in groups if not any(n in state_dict for n in names)]
        unexpected = [key for key in state_dict if key not in wanted]
        shapes = [
            f"{key} {tuple(value.shape)}, expected {tuple(wanted[key])}"
            for key, value in state_dict.items()
            if key in wanted and tuple(value.shape) != tuple(wanted[key])
        ]
        problems = [f"missing: {_few(missing)}"] * (strict and bool(missing))
        problems += [f"unexpected: {_few(unexpected)}"] * (strict and bool(unexpected))
        problems += [f"wrong shape: {_few(shapes)}"] * bool(shapes)
        if problems:
            raise StateError("the state dict does not fit: " + "; ".join(problems))
        self._fill_buffers()
        current = {name: placed.entries(self.held(name)) for name, placed in self._placed.items()}
        for name, placed, names in groups:
            given = next((n for n in names if n in state_dict), None)
            if given is None:
                continue
            if placed is None:
                value = state_dict[given]
                self.get_buffer(name).copy_(value.full_tensor() if isinstance(value, DTensor) else value)
            else:
                self._copy(name, placed, current[name][given], given, state_dict[given])
            self._absent.discard(names[0])
        return LoadResult(missing, unexpected)

    def _copy(self, name: str, placed: Placed, mine: Tensor, given: str, value: Tensor) -> None:
        if isinstance(mine, PiecedTensor) and isinstance(value, PiecedTensor):
            mine.copy_pieces_(value)
            return
        if isinstance(value, DTensor) and isinstance(mine, DTensor):
            if value.device_mesh == mine.device_mesh and value.placements == mine.placements:
                mine.to_local().copy_(value.to_local())
                return
        full = value.full_tensor() if isinstance(value, (DTensor, PiecedTensor)) else value
        placed.kept.cut(given, full, self.local(name))


def _few(items: list[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
