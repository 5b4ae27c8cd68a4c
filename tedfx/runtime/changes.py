"""What of a model's Python changes after `parallelize`: the attributes, globals and closures that a trace
read, compared at every call with what they are now.

The user's model stays the place of its attributes: `model.coef = ..` and `model.config.router_aux_loss_coef =
..` count at the next call, as they do on a single device. A value that was not traced yet is a call signature
of its own: the model is traced and compiled for it, once, and a warning says so. A tensor or a submodule
cannot be another one: refused.

A call costs a look at each attribute that was read; containers are compared by content. See
`tedfx/trace/reads.py` for what is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tedfx import _torch
from tedfx.errors import ConfigError
from tedfx.trace.named import MISSING, Named, named_outside
from tedfx.trace.reads import CODE, Place, equal, freeze, look
from tedfx.trace.values import is_plain, is_scalar


def name_of(place: Place) -> str:
    """`layers.0.drop.p`, or what a global is called."""
    return place[1] if place[0] == CODE else ".".join(part for part in place if part)


def fits(model: nn.Module, observed: Mapping[Place, Any], own_mode: bool) -> bool:
    """Whether a trace that read this holds for `model` as it is."""
    now = Changes(model)
    now.watch(observed, own_mode)
    return not now.differences()


class Changes:
    """Of one model, over all its traces."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._base: dict[Place, Any] = {}
        self._values: dict[
            Place, list
        ] = {}  # every value that a place had, in order: what has no text of its own is known by its number
        self._identities: list[tuple[dict, str, Any]] = []
        self._tensors: list[tuple[str, torch.Tensor, int]] = []
        self._contents: list[tuple[Callable[[], Any], Any]] = []
        self._differ: dict[Place, tuple[Any, str]] = {}
        self._warned = False
        self._broken = ""  # why no trace can follow any more

    def watch(self, observed: Mapping[Place, Any], own_mode: bool = True) -> None:
        """From now on these too, with the values of the trace. `own_mode`: it was traced in the model's own
        training mode, so flags of submodules count."""
        new = {
            place: value
            for place, value in observed.items()
            if place not in self._base and (own_mode or place[-1] != "training")
        }
        if new:
            self._base.update(new)
            self._resolve()

    def now(self, training: bool) -> tuple[tuple[str, str], ...]:
        """(name, value) of what differs from the first trace that read it. ConfigError where a trace cannot
        follow."""
        if self._broken:
            raise ConfigError(self._broken)
        if self._moved():
            before = dict(self._differ)
            self._resolve()
            for place, (value, text) in self._differ.items():
                if place not in before or before[place][1] != text:
                    self._announce(place, value, text)
        own = training == self._model.training
        return tuple(
            (name_of(place), text)
            for place, (_, text) in self._differ.items()
            if own or place[-1] != "training"
        )

    def asks(self, place: Place) -> bool:
        """Whether a trace read this."""
        return place in self._base

    def differences(self) -> list[str]:
        return [name_of(place) for place in self._differ]

    def _announce(self, place: Place, value: Any, text: str) -> None:
        base, name = self._base[place], name_of(place)
        if (
            isinstance(base, tuple)
            and base[:1] == ("tensor",)
            or isinstance(value, tuple)
            and value[:1] == ("tensor",)
        ):
            self._refuse(_constant(name))
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{name} of the model changed after parallelize ({base!r}, now {text}): each new value "
                "costs a trace and a compilation; what changes often should be a 0-dim tensor "
                "argument of forward, or a buffer",
                stacklevel=6,
            )

    def _refuse(self, line: str) -> None:
        self._broken = line
        raise ConfigError(line)

    def _moved(self) -> bool:
        for table, name, value in self._identities:
            if table.get(name, MISSING) is not value:
                return True
        for name, tensor, version in self._tensors:
            if _torch.version_of(tensor) != version:
                self._refuse(_constant(name))
        return any(not equal(freeze(get()), value) for get, value in self._contents)

    def _resolve(self) -> None:
        """Look everything up anew, as the model is now."""
        modules = dict(self._model.named_modules())
        outside: dict[str, Named] = {}
        for named in named_outside(self._model) if any(place[0] == CODE for place in self._base) else []:
            outside.update((label, named) for label in named.read())
        identities, self._tensors, self._contents = {}, [], []
        had, self._differ = self._identities, {}
        for place, base in self._base.items():
            if place[0] == CODE:
                value = self._outside(outside.get(place[1]), place[1], identities)
            else:
                owner: Any = modules.get(place[0], MISSING)
                for name in place[1:-1]:
                    owner = (
                        look(vars(owner), owner, name)
                        if isinstance(getattr(owner, "__dict__", None), dict)
                        else MISSING
                    )
                if not isinstance(getattr(owner, "__dict__", None), dict):
                    continue  # an object above it is another one; that is a difference by itself
                value = self._follow(owner, place[-1], identities)
            frozen = freeze(value)
            if isinstance(value, torch.Tensor) and not value.is_inference():
                self._tensors.append((name_of(place), value, _torch.version_of(value)))
            if not equal(frozen, base):
                self._differ[place] = (frozen, self._text(place, frozen))
        self._identities = list(identities.values())
        self._replaced({(id(table), name): value for table, name, value in had})

    def _outside(self, named: Named | None, label: str, identities: dict) -> Any:
        if named is None:
            return MISSING
        value, where = named.get(label), named.where(label)
        if where is not None and (is_scalar(value) or value is MISSING):
            identities[id(where[0]), where[1]] = (*where, value)
        else:
            self._contents.append((lambda: named.get(label), freeze(value)))
        return value

    def _follow(self, owner: Any, name: str, identities: dict) -> Any:
        attributes = vars(owner)
        if name == "training":
            identities[id(attributes), name] = (attributes, name, owner.training)
            return owner.training == self._model.training
        value = look(attributes, owner, name)
        if name == "_modules":
            for key, module in attributes["_modules"].items():
                identities[id(attributes["_modules"]), key] = (attributes["_modules"], key, module)
            return value
        table = (
            attributes
            if name in attributes or not isinstance(owner, nn.Module) or name not in attributes["_modules"]
            else attributes["_modules"]
        )
        if name in table and (
            is_scalar(value) or is_plain(value) or not isinstance(value, (list, tuple, dict, set))
        ):
            identities[id(table), name] = (table, name, value)
        else:
            self._contents.append((lambda: look(attributes, owner, name), freeze(value)))
        return value

    def _replaced(self, had: dict) -> None:
        """A submodule that is not the one of the trace any more has other parameters than this rank holds."""
        for table, name, value in self._identities:
            before = had.get((id(table), name))
            if isinstance(before, nn.Module) and before is not value:
                self._refuse(
                    f"submodule {name} of the model was replaced after parallelize | {name} "
                    f"({type(value).__name__}) | parallelize the model again"
                )

    def _text(self, place: Place, frozen: Any) -> str:
        if is_scalar(frozen):
            return repr(frozen)
        seen = self._values.setdefault(place, [])
        number = next((i for i, value in enumerate(seen) if equal(value, frozen)), len(seen))
        if number == len(seen):
            seen.append(frozen)
        return f"value {number + 1}"


def _constant(name: str) -> str:
    return (
        f"{name} of the model, a tensor that is neither parameter nor buffer, changed after parallelize "
        f"| attribute {name} | register it as a buffer, and write to pm's"
    )


__all__ = ["Changes", "fits", "name_of"]
