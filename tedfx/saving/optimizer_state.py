"""The state of an optimizer over the parameters of a ParallelModule, under the user's names: the same on
every mesh.

A moment, or any other state in a parameter's shape, is a DTensor; the parameter's layout says which of the
user's tensors it consists of, as it does for the parameter itself: `optimizer/{user's name}/{key}`. Numbers
(`step`) and the hyperparameters of groups are small: they are kept by the user's names as well, and loaded
where all agree that one parameter here holds (the experts of a stack).

`OptimizerState` serves any `torch.optim.Optimizer`, and an optimizer that shards its own state and says so
itself: `SaysItsState`, with a loss scaler `HasScaler`, and `HasPhase` where there are tensors that are a
rank's own and have no place in a parameter's shape (errors of a compression).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tedfx.saving.folder import CheckpointError
from tedfx.state.parameters import as_dtensor
from tedfx.state.pieces import PiecedTensor

__all__ = ["HasPhase", "HasScaler", "OptimizerState", "SaysItsState"]

RANK = "optimizer_rank/"
"""Keys of what is a rank's own: {key: [ranks of the mesh, *shape]}, a row for each rank; {rank/key: [*shape]}
where the ranks' shapes differ."""

# How a step is computed, not what: stays as it is here.
_IMPLEMENTATION = {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}


class SaysItsState(Protocol):
    """An optimizer that says what its state is. It may have a `kind`, a text: that of a checkpoint must be
    the same; by default the name of its class."""

    def named_state(self) -> dict[str, dict[str, Any]]:
        """{layout name: {key: DTensor in the held shape, placed as it likes, or 0-dim tensor or number}}."""
        ...

    def create_state(self) -> None:
        """Allocate what is missing."""
        ...

    def states_changed(self) -> None:
        """The values of `named_state()` were written to."""
        ...

    def hyperparameters(self) -> list[dict[str, Any]]:
        """Per group: {"names": [layout names], "lr": .., ...}."""
        ...

    def load_hyperparameters(self, groups: list[dict[str, Any]]) -> None: ...


@runtime_checkable
class HasScaler(Protocol):
    """An optimizer with a loss scaler."""

    def scaler_state(self) -> dict[str, Any]: ...

    def load_scaler_state(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class HasPhase(Protocol):
    """An optimizer with tensors that are a rank's own, which mean something in one phase of it."""

    def phase_state(self) -> dict[str, Any]:
        """Plain values; the first rank's is kept."""
        ...

    def check_phase(self, phase: Mapping[str, Any]) -> None:
        """CheckpointError where it does not fit."""
        ...

    def same_ranks(self, phase: Mapping[str, Any]) -> bool:
        """Whether these ranks saved it; else what is a rank's own is not read."""
        ...

    def rank_state(self, phase: Mapping[str, Any] | None) -> dict[str, Tensor]:
        """{key: tensor}, this rank's; of a phase: tensors to read into."""
        ...

    def load_phase(self, phase: Mapping[str, Any]) -> None:
        """Go on in it, with what was read."""
        ...


class _TorchOptimizer:
    """The same of a `torch.optim.Optimizer`; states are made as the checkpoint describes them."""

    def __init__(self, pm, optimizer: torch.optim.Optimizer):
        self.optimizer, self.parameters = optimizer, {name: pm.get_parameter(name) for name in pm.placed}
        self._name = {parameter: name for name, parameter in self.parameters.items()}
        if any(
            parameter not in self._name for group in optimizer.param_groups for parameter in group["params"]
        ):
            raise CheckpointError(
                f"{type(optimizer).__name__} holds a parameter that is not the module's: make it from "
                "pm.parameters()"
            )

    def named_state(self) -> dict[str, dict[str, Any]]:
        found = {}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                name, state = self._name[parameter], self.optimizer.state.get(parameter, {})
                for key, value in state.items():
                    fits = (
                        value.shape == parameter.shape
                        if isinstance(value, DTensor)
                        else not isinstance(value, Tensor) or value.dim() == 0
                    )
                    if not fits or not isinstance(value, (Tensor, int, float, type(None))):
                        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
                        raise CheckpointError(
                            f"{type(self.optimizer).__name__} keeps {key} of {name} as a "
                            f"{type(value).__name__}{shape}, neither a number nor in the "
                            f"parameter's shape {tuple(parameter.shape)}: such a state has no meaning "
                            "on another mesh and is not saved; use another optimizer"
                        )
                found[name] = dict(state)
        return found

    def replace(self, tensors: dict[str, dict[str, DTensor]], numbers: dict[str, dict[str, Any]]) -> None:
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            on_device = group.get("capturable") or group.get("fused")
            for parameter in group["params"]:
                name = self._name[parameter]
                state = {**tensors.get(name, {}), **numbers.get(name, {})}
                for key, value in state.items():
                    if isinstance(value, Tensor) and not isinstance(value, DTensor):
                        state[key] = value.to(parameter.device if on_device else "cpu", copy=True)
                if state:
                    self.optimizer.state[parameter] = state

    def hyperparameters(self) -> list[dict[str, Any]]:
        return [
            {
                "names": [self._name[p] for p in group["params"]],
                **{k: v for k, v in group.items() if k not in _IMPLEMENTATION},
            }
            for group in self.optimizer.param_groups
        ]

    def load_hyperparameters(self, groups: list[dict[str, Any]]) -> None:
        for group, given in zip(self.optimizer.param_groups, groups):
            for key, value in given.items():
                if key == "names":
                    continue
                if isinstance(group.get(key), Tensor):
                    group[key].copy_(torch.as_tensor(value))
                else:
                    group[key] = value.item() if isinstance(value, Tensor) else value


class OptimizerState:
    """Out: `tensors()`, `numbers()`, `groups()`. In: `targets(saved)`, then `check(small)`, then
    `load(small)`."""

    def __init__(self, pm, optimizer):
        self.pm, self.optimizer, self.kind = (
            pm,
            optimizer,
            getattr(optimizer, "kind", type(optimizer).__name__),
        )
        self.state: SaysItsState | _TorchOptimizer
        if hasattr(optimizer, "named_state"):
            self.state = optimizer
        elif isinstance(optimizer, torch.optim.Optimizer):
            self.state = _TorchOptimizer(pm, optimizer)
        else:
            raise CheckpointError(
                f"{self.kind} is no torch.optim.Optimizer and has no named_state(): its state cannot be saved"
            )
        self._targets: dict[str, dict[str, DTensor]] = {}
        # The phase of the checkpoint that is being loaded, and who goes on in it.
        self._phase: tuple[HasPhase, dict[str, Any]] | None = None

    def _users(self, name: str) -> tuple[str, ...]:
        """The user's names of a parameter; of a tied one, the first."""
        layout = self.pm.placed[name].layout
        return layout.sources or (layout.name,)

    # ---- out -----------------------------------------------------------------------------------------------

    def read(self) -> dict[str, dict[str, Any]]:
        if not isinstance(self.state, _TorchOptimizer):
            self.state.create_state()
        return self.state.named_state()

    def tensors(self, state: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
        """{optimizer/{user's name}/{key}: DTensor or PiecedTensor in the user's shape}; shares storage with
        the state."""
        found = {}
        for name, values in state.items():
            for key, value in values.items():
                if isinstance(value, DTensor):
                    entries = self.pm.placed[name].entries(value)
                    found.update((f"optimizer/{user}/{key}", entries[user]) for user in self._users(name))
        if isinstance(self.state, HasPhase) and self._same_ranks():
            phase = None if self._phase is None else self._phase[1]
            found.update(self._of_rank(key, value) for key, value in self.state.rank_state(phase).items())
        return found

    def _same_ranks(self) -> bool:
        """Whether what is a rank's own is these ranks': of a run, or of the checkpoint that is loaded."""
        if self._phase is None:
            return True
        state, phase = self._phase
        return state.same_ranks(phase)

    @cached_property
    def _own(self) -> str:
        """How the names of what is this rank's own begin where the ranks hold unequal pieces; "" where the
        sizes are the same on all of them, so that each has a row of one tensor."""
        return f"{RANK}{self._index}/" if any(each.uneven for each in self.pm.placed.values()) else ""

    @property
    def _index(self) -> int:
        mesh = self.pm.device_mesh
        return mesh.mesh.flatten().tolist().index(mesh.get_rank())

    def _of_rank(self, key: str, value: Tensor) -> tuple[str, PiecedTensor]:
        mesh, shape, offsets = self.pm.device_mesh, tuple(value.shape), (0,) * value.dim()
        if not self._own:
            shape, offsets, value = (mesh.size(), *shape), (self._index, *offsets), value.unsqueeze(0)
        axes = tuple(mesh.mesh_dim_names)
        pieced = PiecedTensor(shape, [(offsets, value)], mesh, axes, value.dtype, value.device)
        return (self._own or RANK) + key, pieced

    def reads(self, key: str) -> bool:
        """Whether a key of the checkpoint is read here: not what is another rank's own. After `check`."""
        return not key.startswith(RANK) or (self._same_ranks() and key.startswith(self._own))

    def small(self, state: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Numbers, groups and the scaler, in plain Python and CPU tensors, by the user's names."""
        plain = lambda value: value.detach().cpu().clone() if isinstance(value, Tensor) else value
        numbers = {}
        for name, values in state.items():
            mine = {key: plain(value) for key, value in values.items() if not isinstance(value, DTensor)}
            numbers.update((user, mine) for user in self._users(name) if mine)
        groups = [
            {
                **{
                    key: plain(value)
                    for key, value in group.items()
                    if key != "names" and key not in _IMPLEMENTATION
                },
                "names": [u for n in group["names"] for u in self._users(n)],
            }
            for group in self.state.hyperparameters()
        ]
        scaler = self.state.scaler_state() if isinstance(self.state, HasScaler) else None
        phase = self.state.phase_state() if isinstance(self.state, HasPhase) else None
        return {"kind": self.kind, "numbers": numbers, "groups": groups, "scaler": scaler, "phase": phase}

    # ---- in ------------------------------------------------------------------------------------------------

    def targets(self, saved: dict[str, torch.dtype]) -> dict[str, Tensor]:
        """Entries to read into. `saved`: dtypes of the checkpoint's `optimizer/...` keys.

        Of torch's optimizers, new tensors: the state that the checkpoint describes, whether a step was made
        here or not.
        """
        if not isinstance(self.state, _TorchOptimizer):
            return self.tensors(self.read())
        layout = {user: name for name in self.pm.placed for user in self._users(name)}
        self._targets = {}
        for path, dtype in saved.items():
            user, _, key = path.removeprefix("optimizer/").partition("/")
            if user in layout:
                state = self._targets.setdefault(layout[user], {})
                if key not in state:
                    like = self.state.parameters[layout[user]]
                    state[key] = as_dtensor(torch.zeros_like(like, dtype=dtype, requires_grad=False))
        return self.tensors(self._targets)

    def check(self, small: dict[str, Any]) -> None:
        """CheckpointError where the optimizer is of another kind, or its groups hold other parameters or
        other options."""
        if small["kind"] != self.kind:
            raise CheckpointError(
                f"the checkpoint is of the optimizer {small['kind']}, this run has {self.kind}: resume "
                "with the same optimizer"
            )
        mine, theirs = self.small({})["groups"], small["groups"]
        if len(mine) != len(theirs):
            raise CheckpointError(
                f"the optimizer has {len(mine)} parameter groups, the checkpoint's has {len(theirs)}: "
                "make the same groups, in the same order"
            )
        for index, (here, there) in enumerate(zip(mine, theirs)):
            other = sorted(set(here["names"]) ^ set(there["names"]))
            if other:
                raise CheckpointError(
                    f"parameter group {index} holds {len(here['names'])} parameters, the checkpoint's "
                    f"{len(there['names'])}; they differ in {other[0]}: "
                    "make the same groups, in the same order"
                )
            options = sorted((here.keys() ^ there.keys()) - {"initial_lr"})
            if options:
                raise CheckpointError(
                    f"parameter group {index} and the checkpoint's do not have the same options: "
                    f"{', '.join(options)}; resume with the same optimizer"
                )
        for name in self.pm.placed:
            self._number(name, small["numbers"])
        if small.get("phase") is not None:
            if not isinstance(self.state, HasPhase):
                raise CheckpointError(
                    f"the checkpoint is of {self.kind} in a phase ({', '.join(small['phase'])}), of which "
                    "the optimizer of this run has none: resume with the same optimizer"
                )
            self.state.check_phase(small["phase"])
            self._phase = self.state, small["phase"]

    def _number(self, name: str, numbers: dict[str, dict[str, Any]]) -> dict[str, Any]:
        first, *rest = [numbers.get(user, {}) for user in self._users(name)]
        if any(
            {k: _value(v) for k, v in each.items()} != {k: _value(v) for k, v in first.items()}
            for each in rest
        ):
            raise CheckpointError(
                f"the tensors stacked in {name} have optimizer states of different steps in the "
                f"checkpoint, and one here: {self._users(name)[0]}, .."
            )
        return first

    def load(self, small: dict[str, Any]) -> None:
        """After the tensors are filled: numbers, hyperparameters, scaler."""
        numbers = {name: self._number(name, small["numbers"]) for name in self.pm.placed}
        layouts = [group["names"] for group in self.state.hyperparameters()]
        self.state.load_hyperparameters(
            [{**group, "names": names} for group, names in zip(small["groups"], layouts)]
        )
        if isinstance(self.state, _TorchOptimizer):
            self.state.replace(self._targets, numbers)
            self._targets = {}
        else:
            for name, values in self.state.named_state().items():
                for key, value in numbers[name].items():
                    if isinstance(values.get(key), Tensor):
                        values[key].copy_(torch.as_tensor(value))
                    else:
                        values[key] = value
            self.state.states_changed()
            if self._phase is not None:
                state, phase = self._phase
                if not state.same_ranks(phase):
                    state.rank_state(phase)  # nothing was read into them
                state.load_phase(phase)
        if small["scaler"] is not None and isinstance(self.state, HasScaler):
            self.state.load_scaler_state(small["scaler"])


def _value(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
