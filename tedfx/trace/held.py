"""What a model holds beside parameters and buffers: a snapshot, what differs from it later, and the way back.

Held are the attributes of its modules, what those hold in turn (containers, plain objects such as configs),
attributes of the modules' classes, and what the code of those classes names outside of itself: globals, cells
of closures, defaults of arguments (see `tedfx/trace/named.py`).

A snapshot keeps a shallow copy of every mutable thing that it meets, each once, so that cycles end and a
change is found where it was made. Tensors are compared by identity and version, numbers and strings by value,
all else by identity. At most `LIMIT` things are kept, nearest first.
"""

from __future__ import annotations

import collections
import enum
import inspect
import itertools
import random
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tedfx import _torch
from tedfx.trace.named import MISSING, Named, named_outside

LIMIT = 300_000
SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, range)
# Their contents are their own affair: nothing that a forward computes with.
_OPAQUE = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    torch.Generator,
    random.Random,
    enum.Enum,
    torch.optim.Optimizer,
)
_FOREIGN = (
    "torch.",
    "logging",
    "threading",
    "_thread",
    "concurrent.",
    "multiprocessing.",
    "queue",
    "io",
    "_io",
    "weakref",
    "functools",
    "_abc",
    "re",
    "typing",
)


def is_scalar(value: Any) -> bool:
    return type(value) in SCALARS or isinstance(value, enum.Enum)


def is_plain(value: Any) -> bool:
    """Whether an object is of a class that somebody wrote to hold attributes, such as a config."""
    if isinstance(
        value,
        (nn.Module, torch.Tensor, *_OPAQUE, *SCALARS, list, dict, tuple, set, frozenset, collections.deque),
    ):
        return False
    place = type(value).__module__ or ""
    return (
        isinstance(getattr(value, "__dict__", None), dict)
        and place != "torch"
        and not place.startswith(_FOREIGN)
    )


def same(a: Any, b: Any, depth: int = 6) -> bool:
    """Whether two values are one, or equal ones of plain types. Never asks a symbolic size."""
    if a is b:
        return True
    if type(a) is not type(b) or depth == 0:
        return False
    if is_scalar(a):
        return a == b or (isinstance(a, float) and a != a and b != b)
    if isinstance(a, (list, tuple, collections.deque)):
        return len(a) == len(b) and all(same(x, y, depth - 1) for x, y in zip(a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k], depth - 1) for k in a)
    if isinstance(a, (set, frozenset)):
        return len(a) == len(b) and all(is_scalar(x) for x in (*a, *b)) and a == b
    if is_plain(a):
        return same(vars(a), vars(b), depth - 1)
    return False


@dataclass
class _Cell:
    """One mutable thing: its name, a copy of what it holds, how to read that and how to put it back."""

    path: str
    saved: Any
    read: Callable[[], Any]
    write: Callable[[Any], None]
    shown: Callable[[Any], str]
    owner: Any = None


@dataclass(frozen=True)
class Change:
    """`path`: what differs; `old`, `new`: its values, MISSING where it was or is not there. `table`: the
    attributes of a module, of which it is `key`."""

    path: str
    key: Any
    old: Any
    new: Any
    table: int = 0
    put: Callable[[], None] = lambda: None


class Snapshot:
    """What `model` holds now."""

    def __init__(self, model: nn.Module):
        self._cells: list[_Cell] = []
        self._seen: dict[int, Any] = {}
        self.complete = True
        todo: collections.deque = collections.deque()
        for name, module in model.named_modules():
            self._module(name, module, todo)
        for named in named_outside(model):
            self._named(named, todo)
        while todo:
            if len(self._cells) > LIMIT:
                self.complete = False
                break
            self._visit(*todo.popleft(), todo)

    # ---- taking it -----------------------------------------------------------------------------------------

    def _module(self, name: str, module: nn.Module, todo) -> None:
        table = vars(module)
        if id(table) in self._seen:
            return
        self._seen[id(table)] = table
        path = f"{name}." if name else ""
        own = lambda: {k: v for k, v in table.items() if k == "training" or k not in _torch.MODULE_ATTRIBUTES}

        def write(saved: dict) -> None:
            for key in [k for k in own() if k not in saved]:
                del table[key]
            table.update(saved)

        self._cells.append(_Cell(path, own(), own, write, lambda key: path + str(key), table))
        todo.extend((path + str(key), value) for key, value in self._cells[-1].saved.items())

    def _named(self, named: Named, todo) -> None:
        self._cells.append(_Cell("", named.read(), named.read, named.write, str))
        todo.extend(self._cells[-1].saved.items())

    def _visit(self, path: str, value: Any, todo) -> None:
        if is_scalar(value) or isinstance(value, (_OPAQUE, nn.Module)) or id(value) in self._seen:
            return
        if isinstance(value, (nn.Parameter, nn.Buffer)):
            return
        entries: Iterator[tuple[str, Any]] = iter(())
        cell = None
        if isinstance(value, torch.Tensor):
            if type(value) is torch.Tensor and not value.is_inference():
                cell = _Cell(
                    path,
                    _torch.version_of(value),
                    lambda: _torch.version_of(value),
                    lambda saved: None,
                    lambda key: path,
                )
        elif isinstance(value, dict):
            cell = _Cell(
                path,
                _items(value),
                lambda: _items(value),
                lambda saved: _set_items(value, saved),
                lambda key: f"{path}[{key!r}]",
            )
            entries = ((f"{path}[{key!r}]", v) for key, v in cell.saved.items())
        elif isinstance(value, (list, collections.deque)):

            def put(saved: list) -> None:
                value.clear()
                value.extend(saved)

            cell = _Cell(path, list(value), lambda: list(value), put, lambda key: path)
            entries = ((f"{path}[{i}]", v) for i, v in enumerate(value))
        elif isinstance(value, set):

            def put(saved: set) -> None:
                value.clear()
                value.update(saved)

            cell = _Cell(path, set(value), lambda: value, put, lambda key: path)
        elif isinstance(value, (tuple, frozenset)):
            entries = ((f"{path}[{i}]", v) for i, v in enumerate(value))
        elif type(value).__module__ == "numpy" and type(value).__name__ == "ndarray":
            if value.nbytes <= 2**24:
                cell = _Cell(
                    path,
                    value.copy(),
                    lambda: value,
                    lambda saved: value.__setitem__(..., saved),
                    lambda key: path,
                )
        elif isinstance(value, itertools.count):
            cell = _Cell(
                path,
                repr(value),
                lambda: repr(value),
                lambda saved, fresh=eval(repr(value), {"count": itertools.count}): self._replace(
                    value, fresh
                ),
                lambda key: path,
            )
        elif isinstance(value, types.GeneratorType):
            at = lambda: repr((value.gi_frame and value.gi_frame.f_lasti, inspect.getgeneratorlocals(value)))
            cell = _Cell(path, at(), at, lambda saved: None, lambda key: path)
        elif is_plain(value):
            table = vars(value)

            cell = _Cell(
                path,
                dict(table),
                lambda: table,
                lambda saved: _set_items(table, saved),
                lambda key: f"{path}.{key}",
                table,
            )
            entries = ((f"{path}.{key}", v) for key, v in table.items())
        self._seen[id(value)] = value  # kept, so that its id stays its own
        if cell is not None:
            self._cells.append(cell)
        todo.extend(entry for entry in entries if not is_scalar(entry[1]))

    # ---- later ---------------------------------------------------------------------------------------------

    def changes(self) -> list[Change]:
        """What differs now, in the order in which things were met."""
        found = []
        for cell in self._cells:
            now = cell.read()
            if isinstance(cell.saved, dict):
                for key in dict.fromkeys((*cell.saved, *now)):
                    old, new = cell.saved.get(key, MISSING), now.get(key, MISSING)
                    if not same(old, new):
                        found.append(
                            Change(cell.shown(key), key, old, new, id(cell.owner), _putter(cell, key, new))
                        )
            elif isinstance(cell.saved, (list, set)):
                if not same(cell.saved, now if isinstance(now, (list, set)) else None):
                    new = type(cell.saved)(now)
                    found.append(
                        Change(
                            cell.path, None, cell.saved, new, 0, lambda cell=cell, new=new: cell.write(new)
                        )
                    )
            elif isinstance(cell.saved, (int, str)):
                if cell.saved != now:
                    found.append(
                        Change(cell.path, None, MISSING, object(), 0)
                    )  # a tensor that was written to, an iterator that moved: no way back
            elif not (cell.saved == now).all():
                new = now.copy()
                found.append(
                    Change(cell.path, None, cell.saved, new, 0, lambda cell=cell, new=new: cell.write(new))
                )
        return found

    def restore(self) -> None:
        """Put back what differs."""
        for cell in self._cells:
            now = cell.read()
            if isinstance(cell.saved, dict):
                differs = cell.saved.keys() != now.keys() or any(cell.saved[k] is not now[k] for k in now)
            elif isinstance(cell.saved, list):
                differs = len(cell.saved) != len(now) or any(a is not b for a, b in zip(cell.saved, now))
            elif isinstance(cell.saved, str):
                differs = cell.saved != now
            else:
                differs = (
                    isinstance(cell.saved, set)
                    and cell.saved != now
                    or hasattr(cell.saved, "nbytes")
                    and not (cell.saved == now).all()
                )
            if differs:
                cell.write(cell.saved)

    def _replace(self, old: Any, new: Any) -> None:
        """Another object in the place of one that cannot go back."""
        for cell in self._cells:
            for key in [k for k, v in cell.saved.items() if v is old] if isinstance(cell.saved, dict) else []:
                cell.saved[key] = new
                cell.write(cell.saved)


def _items(value: dict) -> dict:
    """The entries of a dict as it holds them, whatever its class makes of them."""
    return dict(dict.items(value))


def _set_items(value: dict, saved: dict) -> None:
    base = collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict
    now = _items(value)
    for key in now:
        if key not in saved:
            base.__delitem__(value, key)
    for key, its in saved.items():
        if key not in now or now[key] is not its:
            base.__setitem__(value, key, its)


def _putter(cell: _Cell, key: Any, new: Any) -> Callable[[], None]:
    def put() -> None:
        now = dict(cell.read())
        now.pop(key, None)
        if new is not MISSING:
            now[key] = new
        cell.write(now)

    return put


__all__ = ["Change", "MISSING", "SCALARS", "Snapshot", "is_plain", "is_scalar", "same"]
