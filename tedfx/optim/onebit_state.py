"""What 1-bit Adam keeps, in and out.

Moments, masters and step counts are as any optimizer's: in the parameters' shapes, on any mesh. Beside them
stand the **phase** (steps done, which parameters are exact, the volume) and the **errors** of the
compression. Errors are a rank's own: a worker's of its gradients, a server's of the row it serves. On the
mesh that they were saved on they go on bit by bit. Another mesh has other ranks and rows, to which they do
not belong: `tedfx.Checkpointer` sets them to zero there, with a warning. That loses what was not yet
delivered of one momentum, once (DeepSpeed resets them at every load).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tedfx.optim.compression import CompressedMean
from tedfx.optim.onebit_step import OneBitSteps
from tedfx.optim.shares import Share
from tedfx.optim.volume import Volume
from tedfx.runtime.state_dict import StateError
from tedfx.saving.folder import CheckpointError

Exchange = tuple[CompressedMean, list[Share]]


class OneBitState(OneBitSteps):
    """Base of OneBitAdam, which makes what is declared here: the interface of
    `tedfx/saving/optimizer_state.py`, and torch's."""

    steps: int
    warmup_steps: int
    volume: Volume
    _bucket: int
    _exchanges: list[Exchange]
    _incoming: list[Exchange]

    def _make_exchanges(self, exact: Iterable[str]) -> list[Exchange]:
        raise NotImplementedError

    def _compress(self, exact: list[str], exchanges: list[Exchange]) -> None:
        raise NotImplementedError

    # ---- in the parameters' shapes -------------------------------------------------------------------------

    def named_state(self) -> dict[str, dict[str, Any]]:
        """{layout name: {step: 0-dim tensor, exp_avg, exp_avg_sq and for 16-bit parameters master: DTensor in
        the held shape}}, of the optimizer's own storage."""
        return {name: self.state[share.parameter] for name, share in self._shares.items()}

    def create_state(self) -> None:
        """Nothing is missing: states are made with the optimizer."""

    @torch.no_grad()
    def states_changed(self, names: Iterable[str] | None = None) -> None:
        """The tensors of `named_state()` were written to: masters go into the parameters."""
        for name in self._shares if names is None else names:
            share = self._shares[name]
            self._written(share)
            share.seen = share.version()

    def hyperparameters(self) -> list[dict[str, Any]]:
        """Per group: {"names": [layout names], option: value}."""
        return [
            {
                "names": [self._names[id(p)] for p in group["params"]],
                **{key: value for key, value in group.items() if key not in ("params", "param_names")},
            }
            for group in self.param_groups
        ]

    def load_hyperparameters(self, groups: list[dict[str, Any]]) -> None:
        for group, given in zip(self.param_groups, groups):
            group.update((key, value) for key, value in given.items() if key != "names")

    # ---- the phase, and what is a rank's own ---------------------------------------------------------------

    def phase_state(self) -> dict[str, Any]:
        """Plain values, the same on every rank but for the volume."""
        mesh = self._module.device_mesh
        return {
            "steps": self.steps,
            "warmup_steps": self.warmup_steps,
            "bucket": self._bucket,
            "exact": list(self._exact),
            "volume": vars(self.volume).copy(),
            "mesh": tuple(zip(mesh.mesh_dim_names, mesh.mesh.shape)),
        }

    def check_phase(self, phase: Mapping[str, Any]) -> None:
        if phase["warmup_steps"] != self.warmup_steps:
            raise CheckpointError(
                f"the optimizer was saved with warmup_steps={phase['warmup_steps']}, this run has "
                f"{self.warmup_steps}: the variance is frozen at that step; resume with the same"
            )
        if phase["bucket"] != self._bucket and self.same_ranks(phase):
            raise CheckpointError(
                f"the optimizer was saved with bucket={phase['bucket']}, this run has {self._bucket}: "
                "the errors of the compression lie in buckets; resume with the same"
            )

    def same_ranks(self, phase: Mapping[str, Any]) -> bool:
        """Whether errors saved in this phase are those of the ranks here."""
        return phase["mesh"] == self.phase_state()["mesh"]

    def rank_state(self, phase: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """{"{bucket}/worker_error" and "/server_error": tensor}, this rank's, of the optimizer's own storage.
        phase: a saved one, to be loaded: zeros to be filled, which `load_phase` takes over."""
        exchanges = self._exchanges
        if phase is not None:
            exchanges = self._incoming = (
                self._make_exchanges(phase["exact"]) if phase["steps"] >= phase["warmup_steps"] else []
            )
        return {
            f"{index}/{key}": getattr(exchange, key)
            for index, (exchange, _) in enumerate(exchanges)
            for key in ("worker_error", "server_error")
        }

    def load_phase(self, phase: Mapping[str, Any]) -> None:
        """After `rank_state(phase)`: the run goes on in this phase, with the errors that were filled in;
        backward is told to sum gradients, or not to."""
        self.steps = phase["steps"]
        self.volume = type(self.volume)(**phase["volume"])
        self._compress(phase["exact"], self._incoming)
        self._incoming = []
        if self._exchanges and not self.same_ranks(phase):
            warnings.warn(
                "1-bit Adam was saved on another mesh: the errors of its compression are its ranks' own "
                "and start from zero here",
                stacklevel=2,
            )

    # ---- as torch has it -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's, by layout names, for the same rank of the same mesh, errors included; of the
        optimizer's own storage. `tedfx.Checkpointer` changes meshes."""
        groups = [{"params": group.pop("names"), **group} for group in self.hyperparameters()]
        return {
            "state": self.named_state(),
            "param_groups": groups,
            "phase": self.phase_state(),
            "errors": self.rank_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """What `state_dict` gave, on the same mesh; all names and shapes are compared before anything is
        changed. StateError if it does not fit."""
        phase, mine, given = state_dict["phase"], self.named_state(), state_dict["state"]
        if not self.same_ranks(phase):
            raise StateError(
                f"the state of 1-bit Adam is of the mesh {phase['mesh']}, errors of the compression are "
                "its ranks' own: change the mesh with tedfx.Checkpointer"
            )
        try:
            self.check_phase(phase)
        except CheckpointError as error:
            raise StateError(str(error)) from error
        names = [group["params"] for group in state_dict["param_groups"]]
        if names != [group["names"] for group in self.hyperparameters()]:
            raise StateError("the state of 1-bit Adam has other parameters, or other groups of them")
        errors = self.rank_state(phase)
        pairs = [
            (f"{name}: {key}", value, given.get(name, {}).get(key))
            for name, state in mine.items()
            for key, value in state.items()
        ]
        pairs += [(f"error {key}", value, state_dict["errors"].get(key)) for key, value in errors.items()]
        problems = [
            what
            for what, here, there in pairs
            if there is None or tuple(_own(here).shape) != tuple(_own(there).shape)
        ]
        if problems:
            raise StateError(
                f"the state of 1-bit Adam does not fit: {', '.join(problems[:5])}"
                + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")
            )
        for _, here, there in pairs:
            _own(here).copy_(_own(there))
        self.load_hyperparameters(
            [
                {key: value for key, value in group.items() if key != "params"}
                for group in state_dict["param_groups"]
            ]
        )
        self.states_changed()
        self.load_phase(phase)


def _own(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
