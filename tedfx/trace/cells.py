"""Mutable things: a shallow copy of what one holds, how to read that later, and how to put it back."""

from __future__ import annotations

import collections
import inspect
import itertools
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tedfx import _torch
from tedfx.trace.values import is_plain

ARRAY_BYTES = 2**24  # larger numpy arrays are not copied

Entries = Iterable[tuple[str, Any]]  # (path, value) of what a thing holds


@dataclass
class Cell:
    """One mutable thing: its name, a copy of what it holds, how to read that and how to put it back. shown:
    from a key to the name of its entry. owner: the attributes of a module or an object, if it is these."""

    path: str
    saved: Any
    read: Callable[[], Any]
    write: Callable[[Any], None]
    shown: Callable[[Any], str]
    owner: Any = None


def cell_of(path: str, value: Any, replace: Callable[[Any, Any], None]) -> tuple[Cell | None, Entries]:
    """The cell of a value, None where it cannot change; and what it holds. replace(old, new): puts another
    object in the place of one that cannot go back."""
    here = lambda key: path
    if isinstance(value, torch.Tensor):
        if type(value) is not torch.Tensor or value.is_inference():
            return None, ()
        version = lambda: _torch.version_of(value)
        return Cell(path, version(), version, _not_back, here), ()
    if isinstance(value, dict):
        at = lambda key: f"{path}[{key!r}]"
        cell = Cell(path, _items(value), lambda: _items(value), lambda saved: _set_items(value, saved), at)
        return cell, ((at(key), v) for key, v in cell.saved.items())
    if isinstance(value, (list, collections.deque)):
        cell = Cell(path, list(value), lambda: list(value), lambda saved: _refill(value, saved), here)
        return cell, _numbered(path, value)
    if isinstance(value, set):
        return Cell(path, set(value), lambda: value, lambda saved: _refill(value, saved), here), ()
    if isinstance(value, (tuple, frozenset)):
        return None, _numbered(path, value)
    if type(value).__module__ == "numpy" and type(value).__name__ == "ndarray":
        if value.nbytes > ARRAY_BYTES:
            return None, ()
        put = lambda saved: value.__setitem__(..., saved)
        return Cell(path, value.copy(), lambda: value, put, here), ()
    if isinstance(value, itertools.count):
        fresh = eval(repr(value), {"count": itertools.count})
        put = lambda saved: replace(value, fresh)
        return Cell(path, repr(value), lambda: repr(value), put, here), ()
    if isinstance(value, types.GeneratorType):
        state = lambda: repr((value.gi_frame and value.gi_frame.f_lasti, inspect.getgeneratorlocals(value)))
        return Cell(path, state(), state, _not_back, here), ()
    if is_plain(value):
        table = vars(value)
        at = lambda key: f"{path}.{key}"
        cell = Cell(path, dict(table), lambda: table, lambda saved: _set_items(table, saved), at, table)
        return cell, ((at(key), v) for key, v in table.items())
    return None, ()


def module_cell(name: str, module: nn.Module) -> Cell:
    """Of the attributes of a module that torch does not make itself."""
    table = vars(module)
    path = f"{name}." if name else ""
    own = lambda: {k: v for k, v in table.items() if k == "training" or k not in _torch.MODULE_ATTRIBUTES}

    def write(saved: dict) -> None:
        for key in [k for k in own() if k not in saved]:
            del table[key]
        table.update(saved)

    return Cell(path, own(), own, write, lambda key: path + str(key), table)


def _not_back(saved: Any) -> None:
    """A tensor that was written to, an iterator that moved: no way back."""


def _numbered(path: str, values: Iterable[Any]) -> Entries:
    return ((f"{path}[{i}]", v) for i, v in enumerate(values))


def _refill(value: Any, saved: Any) -> None:
    value.clear()
    (value.update if isinstance(value, set) else value.extend)(saved)


def _items(value: dict) -> dict:
    """The entries of a dict as it holds them, whatever its class makes of them."""
    return dict(dict.items(value))


def base_of(value: dict) -> type[dict]:
    """The class whose methods write to a dict as it holds its entries, whatever its own class makes of
    them."""
    return collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict


def _set_items(value: dict, saved: dict) -> None:
    base = base_of(value)
    now = _items(value)
    for key in now:
        if key not in saved:
            base.__delitem__(value, key)
    for key, its in saved.items():
        if key not in now or now[key] is not its:
            base.__setitem__(value, key, its)
