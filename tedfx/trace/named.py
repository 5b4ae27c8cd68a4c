"""What the code of a model's classes names outside of itself: globals of its files, attributes of its
classes, cells of closures, defaults of arguments.

Found by the names in the code objects of the classes' functions, of the functions that modules hold (hooks
among them), and of the functions and classes that those name in turn, as far as they are the user's own: code
of torch, of Python and of an installed package other than the model's own file is not followed.
"""

from __future__ import annotations

import builtins
import collections
import dis
import functools
import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from tedfx.errors import is_installed, is_machinery

MISSING = type("MISSING", (), {"__repr__": lambda self: "nothing"})()


@dataclass(frozen=True)
class Named:
    """Such things that lie together. `read()` gives {what it is called: its value}, MISSING for what is not
    there; `write` sets them so; `get` is for one; `where` is the table that has it and its key, if there is
    such a table."""

    read: Callable[[], dict[str, Any]]
    write: Callable[[dict[str, Any]], None]
    get: Callable[[str], Any]
    where: Callable[[str], tuple[Any, str] | None] = lambda label: None


def named_outside(model: nn.Module) -> list[Named]:
    """Each of them once, in an order that depends on the code alone."""
    walk = _Walk()
    for cls in dict.fromkeys(type(module) for module in model.modules()):
        walk.classes(cls)
    for module in model.modules():
        for value in list(vars(module).values()):
            walk.held(value)
    walk.run()
    return list(walk.found.values())


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[tuple[str, str | None], ...]:
    """(global name, attribute of it that is read or written next, or None) of a code object and those inside
    of it."""
    found: dict[tuple[str, str | None], None] = {}
    instructions = list(dis.get_instructions(code))
    for this, after in zip(instructions, [*instructions[1:], None]):
        if this.opname in ("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME"):
            found[this.argval, None] = None
            if after is not None and after.opname in ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR"):
                found[this.argval, after.argval] = None
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found.update(dict.fromkeys(_names(constant)))
    return tuple(found)


def _is_data(value: Any) -> bool:
    """Whether a name stands for a value, not for code."""
    return not isinstance(
        value,
        (
            type,
            types.ModuleType,
            types.FunctionType,
            types.BuiltinFunctionType,
            staticmethod,
            classmethod,
            property,
        ),
    ) and not (hasattr(type(value), "__get__") or callable(value) and not isinstance(value, nn.Module))


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

    def held(self, value: Any, depth: int = 2) -> None:
        """The code that an attribute of a module holds: a function, a hook, an object that is called."""
        if isinstance(value, types.FunctionType):
            self._functions.extend((value, inspect.unwrap(value)))
        elif isinstance(value, types.MethodType):
            self.held(value.__func__, depth)
        elif isinstance(value, functools.partial):
            self.held(value.func, depth)
        elif isinstance(value, (dict, list, tuple)) and depth:
            for each in list(value.values() if isinstance(value, dict) else value):
                self.held(each, depth - 1)
        elif not isinstance(value, (nn.Module, type)) and callable(value):
            self._class(type(value))

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
        self.found.setdefault(("class", cls), _attributes_of(cls))

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
                label = f"{name} of {function.__qualname__}"
                self._add(
                    ("cell", id(cell)),
                    label,
                    lambda c=cell: c.cell_contents,
                    lambda v, c=cell: setattr(c, "cell_contents", v),
                )
        arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
        defaults = function.__defaults__ or ()
        for name, value in [
            *zip(arguments[len(arguments) - len(defaults) :], defaults),
            *(function.__kwdefaults__ or {}).items(),
        ]:
            if isinstance(value, (list, dict, set)):
                self._add(
                    ("default", id(value)),
                    f"{name} of {function.__qualname__}",
                    lambda v=value: v,
                    lambda v: None,
                )
        for key in [k for k in vars(function) if k != "__wrapped__" and _is_data(vars(function)[k])]:
            self._add(
                ("function", id(function), key),
                f"{function.__qualname__}.{key}",
                lambda f=function, k=key: vars(f).get(k, MISSING),
                lambda v, f=function, k=key: setattr(f, k, v),
            )
        for name, attribute in _names(function.__code__):
            if attribute is None:
                self._global(function.__globals__, name)
            elif (
                isinstance(module := function.__globals__.get(name), types.ModuleType)
                and (file := getattr(module, "__file__", None))
                and self._own(file)
            ):
                self._global(vars(module), attribute)

    def _global(self, table: dict, name: str) -> None:
        value = table.get(name, MISSING)
        if name.startswith("__") or (value is MISSING and hasattr(builtins, name)):
            return
        if isinstance(value, types.FunctionType):
            self._functions.extend((value, inspect.unwrap(value)))
        elif isinstance(value, type):
            self._class(value)
        elif _is_data(value):

            def write(v: Any) -> None:
                if v is MISSING:
                    table.pop(name, None)
                else:
                    table[name] = v

            self._add(
                ("global", id(table), name),
                f"{name} of {table.get('__name__', '')}",
                lambda: table.get(name, MISSING),
                write,
                (table, name),
            )

    def _add(
        self,
        key: tuple,
        label: str,
        get: Callable[[], Any],
        put: Callable[[Any], None],
        where: tuple | None = None,
    ) -> None:
        self.found.setdefault(
            key,
            Named(lambda: {label: get()}, lambda saved: put(saved[label]), lambda _: get(), lambda _: where),
        )


def _attributes_of(cls: type) -> Named:
    """The data among the attributes of a class. Export calls modules through stand-ins whose classes inherit
    from it: what is set on those counts as its own."""

    def tables() -> list[type]:
        return [
            cls,
            *(
                sub
                for sub in cls.__subclasses__()
                if len(sub.__bases__) == 2 and sub.__bases__[0].__module__.startswith("torch.")
            ),
        ]

    def read() -> dict[str, Any]:
        return {
            f"{cls.__qualname__}.{name}": value
            for table in tables()
            for name, value in list(vars(table).items())
            if not name.startswith(("__", "_abc_")) and _is_data(value)
        }

    def write(saved: dict[str, Any]) -> None:
        for name in list(read()):
            key = name.rpartition(".")[2]
            for table in tables():
                if key in vars(table) and (table is not cls or name not in saved):
                    delattr(table, key)
        for name, value in saved.items():
            key = name.rpartition(".")[2]
            if vars(cls).get(key, MISSING) is not value:
                setattr(cls, key, value)

    return Named(
        read,
        write,
        lambda label: vars(cls).get(label.rpartition(".")[2], MISSING),
        lambda label: (vars(cls), label.rpartition(".")[2]),
    )


__all__ = ["MISSING", "Named", "named_outside"]
