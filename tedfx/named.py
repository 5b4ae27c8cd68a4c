"""What the code of a model's classes names outside of itself: globals of its files, attributes of its classes, cells of closures, defaults of arguments.

Found by the names in the code objects of the classes' functions, and of the functions and classes that those name in turn, as far as they are the user's own: code of torch,
of Python and of an installed package other than the model's own file is not followed.
"""

from __future__ import annotations

import collections
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from tedfx.errors import is_installed, is_machinery


@dataclass(frozen=True)
class Named:
    """One such thing. `get(default)` reads it now; `set(value)` writes it."""

    label: str
    get: Callable[[Any], Any]
    set: Callable[[Any], None]


def named_outside(model: nn.Module) -> list[Named]:
    """Each of them once, in an order that depends on the code alone."""
    walk = _Walk()
    for cls in dict.fromkeys(type(module) for module in model.modules()):
        walk.classes(cls)
    walk.run()
    return list(walk.found.values())


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_data(value: Any) -> bool:
    """Whether a name stands for a value, not for code."""
    return not isinstance(value, (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, staticmethod, classmethod, property)) and not (
        hasattr(type(value), "__get__") or callable(value) and not isinstance(value, nn.Module)
    )


class _Walk:
    def __init__(self):
        self.found: dict[tuple, Named] = {}
        self._functions: collections.deque = collections.deque()
        self._seen: set[int] = set()
        self._files: set[str] = set()  # installed files that hold a class of the model

    def classes(self, cls: type) -> None:
        """The functions and attributes of a class of the model and of those that it inherits from."""
        for each in cls.__mro__:
            self._class(each, own=True)

    def run(self) -> None:
        while self._functions:
            self._function(self._functions.popleft())

    def _own(self, filename: str) -> bool:
        return filename in self._files or not (is_machinery(filename) or is_installed(filename))

    def _class(self, cls: type, own: bool = False) -> None:
        module = sys.modules.get(cls.__module__)
        file = getattr(module, "__file__", None)
        if id(cls) in self._seen or file is None or is_machinery(file) or not (own or self._own(file)):
            return
        self._seen.add(id(cls))
        if own:
            self._files.add(file)
        for name, value in list(vars(cls).items()):
            function = inspect.unwrap(value) if isinstance(value, types.FunctionType) else value
            for f in (value, function, getattr(value, "__func__", None), getattr(value, "fget", None)):
                if isinstance(f, types.FunctionType):
                    self._functions.append(f)
            if not name.startswith("__") and not name.startswith("_abc_") and _is_data(value):
                self._add(("class", cls, name), Named(f"{cls.__qualname__}.{name}", lambda d, c=cls, n=name: vars(c).get(n, d), lambda v, c=cls, n=name: setattr(c, n, v)))

    def _function(self, function: types.FunctionType) -> None:
        if id(function.__code__) in self._seen and not function.__closure__:
            return
        if id(function) in self._seen or not self._own(function.__code__.co_filename):
            return
        self._seen |= {id(function), id(function.__code__)}
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            try:
                value = cell.cell_contents
            except ValueError:  # not bound yet
                continue
            if isinstance(value, types.FunctionType):
                self._functions.append(value)
            elif name != "__class__" and _is_data(value):
                self._add(("cell", id(cell)), Named(f"{name} of {function.__qualname__}", lambda d, c=cell: c.cell_contents, lambda v, c=cell: setattr(c, "cell_contents", v)))
        names = inspect.getfullargspec(function).args if function.__defaults__ else []
        for name, value in [*zip(names[len(names) - len(function.__defaults__ or ()) :], function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]:
            if isinstance(value, (list, dict, set)):
                self._add(("default", id(value)), Named(f"{name} of {function.__qualname__}", lambda d, v=value: v, lambda v: None))
        for code in _codes(function.__code__):
            modules = [function.__globals__]
            for name in code.co_names:
                value = function.__globals__.get(name)
                file = getattr(value, "__file__", None) if isinstance(value, types.ModuleType) else None
                if file is not None and self._own(file):
                    modules.append(vars(value))
            for table in modules:
                for name in code.co_names:
                    if name in table and not name.startswith("__"):
                        self._global(table, name)

    def _global(self, table: dict, name: str) -> None:
        value = table[name]
        if isinstance(value, types.FunctionType):
            self._functions.append(inspect.unwrap(value))
        elif isinstance(value, type):
            self._class(value)
        elif _is_data(value):
            place = table.get("__name__", "")
            self._add(("global", id(table), name), Named(f"{name} of {place}", lambda d: table.get(name, d), lambda v: table.__setitem__(name, v)))

    def _add(self, key: tuple, named: Named) -> None:
        self.found.setdefault(key, named)


__all__ = ["Named", "named_outside"]
