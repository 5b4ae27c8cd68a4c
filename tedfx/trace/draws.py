"""Generators that a forward draws from on the host: Python's, numpy's, torch's own and objects that modules
hold. The traced graph has no such draw: each call would have the trace's."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

from tedfx._torch import with_values
from tedfx.errors import is_installed, is_machinery

# What it is called, its state, how to set that.
_Generator: TypeAlias = tuple[str, Callable[[], Any], Callable[[Any], object]]


def _generators(model: nn.Module) -> list[_Generator]:
    found: list[_Generator] = [("Python's random", random.getstate, random.setstate)]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        found.append(
            (
                "numpy.random",
                lambda: _hashable(numpy.random.get_state(legacy=False)),
                lambda s: numpy.random.set_state(_thawed(numpy, s)),
            )
        )
    found.append(
        (
            "torch's default generator",
            lambda: _bits(torch.random.get_rng_state()),
            lambda s: torch.random.set_rng_state(_tensor(s)),
        )
    )
    for module_name, module in model.named_modules():
        for key, value in vars(module).items():
            path = f"{module_name}.{key}" if module_name else key
            if isinstance(value, random.Random):
                found.append((path, value.getstate, value.setstate))
            elif isinstance(value, torch.Generator):
                found.append(
                    (path, lambda g=value: _bits(g.get_state()), lambda s, g=value: g.set_state(_tensor(s)))
                )
            elif numpy is not None and isinstance(value, numpy.random.RandomState):
                found.append(
                    (
                        path,
                        lambda g=value: _hashable(g.get_state(legacy=False)),
                        lambda s, g=value: g.set_state(_thawed(numpy, s)),
                    )
                )
            elif numpy is not None and isinstance(value, numpy.random.Generator):
                found.append(
                    (
                        path,
                        lambda g=value: _hashable(g.bit_generator.state),
                        lambda s, g=value: setattr(g.bit_generator, "state", _thawed(numpy, s)),
                    )
                )
    return found


def _bits(state: torch.Tensor) -> bytes:
    with with_values():
        return state.numpy().tobytes()


def _tensor(bits: bytes) -> torch.Tensor:
    with with_values():
        return torch.frombuffer(bytearray(bits), dtype=torch.uint8)


def _hashable(state: Any) -> Any:
    """Numpy's state with arrays as bytes, so that states compare."""
    if isinstance(state, dict):
        return ("dict", tuple((k, _hashable(v)) for k, v in state.items()))
    return (
        ("array", str(state.dtype), state.tobytes())
        if hasattr(state, "tobytes") and getattr(state, "shape", ())
        else state
    )


def _thawed(numpy: Any, state: Any) -> Any:
    if isinstance(state, tuple) and state and state[0] == "dict":
        return {k: _thawed(numpy, v) for k, v in state[1]}
    if isinstance(state, tuple) and state and state[0] == "array":
        return numpy.frombuffer(state[2], dtype=state[1]).copy()
    return state


class Draws:
    """The states of the generators when it was made."""

    def __init__(self, model: nn.Module):
        self._generators = _generators(model)
        self._states = [get() for _, get, _ in self._generators]
        self._files = {
            getattr(sys.modules.get(type(m).__module__), "__file__", None) for m in model.modules()
        }
        self._files = {file for file in self._files if file is not None and not is_machinery(file)}

    def moved(self) -> str | None:
        """What has drawn since."""
        return next(
            (name for (name, get, _), state in zip(self._generators, self._states) if get() != state), None
        )

    def restore(self) -> None:
        for (_, get, put), state in zip(self._generators, self._states):
            if get() != state:
                put(state)

    def line(self, call: Callable[[], Any]) -> str:
        """The line of the model from which `call` draws first; it is run again for that."""
        found: list[str] = []
        last = ["an unknown line"]

        def step(frame, event, argument):
            if not found and self.moved():
                found.append(last[0])
            if event == "line":
                last[0] = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            return None if found else step

        def enter(frame, event, argument):
            file = frame.f_code.co_filename
            return (
                None
                if found or not (file in self._files or not (is_machinery(file) or is_installed(file)))
                else step
            )

        before = sys.gettrace()
        sys.settrace(enter)
        try:
            call()
        finally:
            sys.settrace(before)
            last_line = found[0] if found else last[0]
            self.restore()
        return last_line


__all__ = ["Draws"]
