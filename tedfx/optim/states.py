"""What a sharded optimizer keeps, in and out: by the user's names for users, by layout names for checkpoints.

`state_dict()` is {"state": {user's name: {key: entry}}, "param_groups": [{"params": [user's names], option:
value}]}. An entry of a parameter's shape is what `pm.state_dict()` has for the parameter: a DTensor, or a
PiecedTensor where plain placements cannot say the layout, of this rank's share and of the optimizer's own
storage. Others are 0-dim tensors or numbers. `named_state()` is the same by layout name, before it is taken
apart into the user's tensors. `master` is a key beside the optimizer's own where a parameter has master
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tedfx.errors import TedfxError
from tedfx.optim.gathering import Gathering
from tedfx.optim.probe import SHAPE, elementwise, state_kinds
from tedfx.optim.scaling import LossScale
from tedfx.optim.shares import Share
from tedfx.optim.tiles import Batch, Staging
from tedfx.runtime.state_dict import StateError
from tedfx.state.pieces import PiecedTensor

MASTER = "master"


class SavedStates(torch.optim.Optimizer):
    """Base of ShardedOptimizer, which makes what is declared here."""

    tile: int | None
    _shares: dict[str, Share]
    _names: dict[int, str]
    _batches: list[list[Batch]]
    _scaler: LossScale | None
    _staging: Staging
    _gathering: Gathering

    def _inner(self, group: Mapping[str, Any]) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
        raise NotImplementedError

    def _current(self, group: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _settle(self) -> None:
        raise NotImplementedError

    # ---- out -----------------------------------------------------------------------------------------------

    def named_state(self) -> dict[str, dict[str, Any]]:
        """{layout name: {key: DTensor in the parameter's held shape with the share's placements, or a 0-dim
        tensor, or a number}}, of the optimizer's own storage.

        Who writes into these tensors calls `states_changed()` afterwards.
        """
        return {name: self._held(share) for name, share in self._shares.items()}

    def _held(self, share: Share) -> dict[str, Any]:
        state: dict[str, Any] = {}
        if share.widened and share.master is not None:
            state[MASTER] = share.dtensor(share.master)
        for key, value in self._first(share).items():
            state[key] = share.dtensor(share.homes[key]) if key in share.homes else value
        return state

    def _first(self, share: Share) -> dict[str, Any]:
        """The inner state of the share's first tile: all keys, and the values of those that are not per
        element."""
        return share.tiles[0].state

    def state_dict(self) -> dict[str, Any]:
        """This rank's part, by the user's names; of the optimizer's storage. Goes through
        torch.distributed.checkpoint."""
        state: dict[str, dict[str, Any]] = {}
        for share in self._shares.values():
            for key, value in self._held(share).items():
                entries = (
                    self._entries(share, value)
                    if isinstance(value, DTensor)
                    else dict.fromkeys(share.names, value)
                )
                for name in share.names:
                    state.setdefault(name, {})[key] = entries[name]
        return {
            "state": state,
            "param_groups": [
                {"params": self._users(group), **self._current(group)} for group in self.param_groups
            ],
        }

    def _entries(self, share: Share, held: DTensor) -> dict[str, Tensor]:
        return share.placed.share.entries(held)

    def _users(self, group: Mapping[str, Any]) -> list[str]:
        return [
            name for parameter in group["params"] for name in self._shares[self._names[id(parameter)]].names
        ]

    def hyperparameters(self) -> list[dict[str, Any]]:
        """Per group: {"names": [layout names], option: value}."""
        return [
            {"names": [self._names[id(p)] for p in group["params"]], **self._current(group)}
            for group in self.param_groups
        ]

    def scaler_state(self) -> dict[str, float | int]:
        """Of the loss scale; {} where there is none."""
        return {} if self._scaler is None else self._scaler.state()

    # ---- in ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def create_state(self) -> None:
        """Allocate the states that do not exist yet, with the values that they have before a first step.
        Parameters and step counts stay as they are.

        A state that is not loaded into (`states_changed`) is made anew by the first step, so that this
        changes no result: SGD's first momentum is the gradient, not a sum with zeros.
        """
        self._create(set(self._shares))

    def _create(self, names: set[str]) -> None:
        for group, batches in zip(self.param_groups, self._batches):
            for batch in batches:
                batch.create(self._current(group), names)

    @torch.no_grad()
    def states_changed(self, names: Iterable[str] | None = None) -> None:
        """The tensors of `named_state()` were written to (of these layouts; by default of all): step counts
        go to all tiles, masters into the parameters. Collective."""
        names = set(self._shares if names is None else names)
        for batches in self._batches:
            for batch in batches:
                for tile in batch.tiles:
                    if tile.share.name in names:
                        tile.provisional = ()
                        mine = tile.state
                        for key, value in self._first(tile.share).items():
                            if key not in tile.share.homes:
                                mine[key] = (
                                    value.clone()
                                    if isinstance(value, Tensor) and tile is not tile.share.tiles[0]
                                    else value
                                )
        self.masters_changed(names)

    @torch.no_grad()
    def masters_changed(self, names: Iterable[str] | None = None) -> None:
        """Write the masters into the parameters, on all ranks of these layouts (by default of all).
        Collective."""
        for name in self._shares if names is None else [name for name in self._shares if name in set(names)]:
            share = self._shares[name]
            if share.master is not None:
                step = self.tile or max(share.numel, 1)
                for start in range(0, share.numel, step):
                    stop = min(start + step, share.numel)
                    self._staging.send(share, start, stop, share.master[start:stop])
                self._gathering.add(share)
        self._settle()

    @torch.no_grad()
    def follow_parameters(self) -> None:
        """Masters take over what was written into the parameters; `step` does this by itself. A master that
        rounds to its parameter's value is kept."""
        for share in self._shares.values():
            share.follow(self.tile or max(share.numel, 1))

    def load_hyperparameters(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Of `hyperparameters()`: the same groups of the same parameters."""
        groups = list(groups)
        mine = [group["names"] for group in self.hyperparameters()]
        if [sorted(group["names"]) for group in groups] != [sorted(names) for names in mine]:
            raise StateError(
                f"the optimizer's groups do not fit: {_sizes(groups, 'names')}, here "
                f"{[len(names) for names in mine]} parameters per group, or others"
            )
        for group, saved in zip(self.param_groups, groups):
            group.update((key, value) for key, value in saved.items() if key != "names")

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        """Of `scaler_state()`."""
        if bool(state) != (self._scaler is not None):
            raise StateError(
                "the saved optimizer had "
                + ("a loss scale, this one has none" if state else "no loss scale, this one has one")
            )
        if self._scaler is not None:
            self._scaler.load(state)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Of `state_dict()`, of this or another mesh, stage or tile, or with full tensors. Collective.
        Everything is checked before the first value is changed.

        Parameters that it has no state for have none afterwards, as in torch. Masters go into the parameters.
        The loss scale is not in it: see `load_scaler_state`.
        """
        groups, state = state_dict.get("param_groups", []), state_dict.get("state", {})
        problems = []
        if [sorted(group["params"]) for group in groups] != [
            sorted(self._users(group)) for group in self.param_groups
        ]:
            problems.append(
                f"groups of {_sizes(groups, 'params')} parameters, expected "
                f"{[len(self._users(group)) for group in self.param_groups]}, of the same names"
            )
        known = {name for share in self._shares.values() for name in share.names}
        problems += [f"unexpected parameter {name}" for name in state if name not in known]
        given = {}
        for group in self.param_groups:
            kinds = None
            for parameter in group["params"]:
                share = self._shares[self._names[id(parameter)]]
                have = [name for name in share.names if state.get(name)]
                if have:
                    kinds = self._kinds(group, share) if kinds is None or self.tile is None else kinds
                    problems += self._misfits(share, have, state, kinds)
                    given[share.name] = share
        if problems:
            raise StateError(
                "the optimizer's state does not fit: "
                + "; ".join(problems[:5])
                + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            )

        stepped = {name for name, share in given.items() if set(state[share.names[0]]) - {MASTER}}
        gone = set(self._shares) - stepped
        for batches in self._batches:
            for batch in batches:
                batch.drop(gone)
        for name in gone:
            self._shares[name].homes = {}
            self.state.pop(self._shares[name].parameter, None)
        self._create(stepped)
        for share in given.values():
            for key, value in self._held(share).items():
                if isinstance(value, DTensor):
                    mine = self._entries(share, value)
                    for name in share.names:
                        _copy(share, mine[name], value, name, state[name][key])
                else:
                    saved = state[share.names[0]][key]
                    if isinstance(value, Tensor):
                        value.copy_(saved) if isinstance(saved, Tensor) else value.fill_(saved)
                    else:
                        self._first(share)[key] = saved.item() if isinstance(saved, Tensor) else saved
        self.states_changed(given)
        for group, saved in zip(self.param_groups, groups):
            group.update((key, value) for key, value in saved.items() if key != "params")

    def _kinds(self, group, share: Share) -> dict[str, Any]:
        """Which states a parameter of this group has, without touching any."""
        make = self._inner(group)
        whole = self.tile is None and elementwise(make, share.device) is not None
        shape = tuple(share.placed.share.shape) if whole else SHAPE
        found = state_kinds(make, share.device, share.dtype, shape)
        return {
            key: isinstance(value, Tensor) and tuple(value.shape) == shape for key, value in found.items()
        }

    def _misfits(self, share: Share, have: list[str], state, kinds: Mapping[str, bool]) -> list[str]:
        if len(have) < len(share.names):
            missing = next(name for name in share.names if name not in have)
            return [f"{missing} has no state, but {have[0]}, which is stacked with it, has"]
        problems = []
        for name in share.names:
            wanted = {**kinds, **({MASTER: True} if share.widened else {})}
            entries = {key: value for key, value in state[name].items()}
            if share.widened and set(entries) == {MASTER}:
                wanted = {MASTER: True}  # never stepped
            if set(entries) != set(wanted):
                problems.append(
                    f"{name} has {', '.join(sorted(entries))}, expected {', '.join(sorted(wanted))}"
                )
                continue
            for key, full in wanted.items():
                shape = tuple(getattr(entries[key], "shape", ()))
                if full and shape != tuple(share.shape):
                    problems.append(f"{name}: {key} has shape {shape}, expected {tuple(share.shape)}")
        first, *others = share.names
        for key in (key for key, full in kinds.items() if not full and key in state[first]):
            value, more = state[first][key], [state[name].get(key) for name in others]
            if value is not None and any(x is not None and float(x) != float(value) for x in more):
                problems.append(f"{first} and what is stacked with it differ in {key}")
        return problems


def _copy(share: Share, mine: Tensor, held: DTensor, name: str, value) -> None:
    if isinstance(mine, PiecedTensor) and isinstance(value, PiecedTensor):
        mine.copy_pieces_(value)
        return
    if (
        isinstance(value, DTensor)
        and isinstance(mine, DTensor)
        and value.device_mesh == mine.device_mesh
        and value.placements == mine.placements
    ):
        mine.to_local().copy_(value.to_local())
        return
    full = value.full_tensor() if isinstance(value, (DTensor, PiecedTensor)) else value
    if not isinstance(full, Tensor):
        raise TedfxError(
            f"{name}: a state of the parameter's shape must be a tensor, not {type(full).__name__}"
        )
    share.placed.share.cut(name, full, held.to_local().view(share.placed.share.shape))


def _sizes(groups, key: str) -> list[int]:
    return [len(group.get(key, ())) for group in groups]
