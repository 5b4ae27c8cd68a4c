"""Which attributes a model's forward reads while it is traced, and what they hold.

While `recording` is open, modules (and the plain objects that they hold, configs for one) report each
attribute that is read or written. What was read before it was written is what the traced graph depends on:
`observed` says where it is, by names that hold for any instance of the model, and its value now.

A value is compared as in `tedfx/trace/values.py`; containers by content; what is compared by identity is kept
as it is.
"""

from __future__ import annotations

import collections
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tedfx import _torch
from tedfx.errors import is_installed
from tedfx.trace.named import MISSING, named_outside
from tedfx.trace.values import is_plain, is_scalar


class Reads:
    """What was read and written, by (id of the owner's attributes, name)."""

    def __init__(self):
        self.active = False
        self.owners: dict[int, tuple[dict, Any]] = {}  # both kept, so that the id stays its own
        self.read: dict[tuple[int, str], None] = {}
        self.written: dict[tuple[int, str], bool] = {}  # whether the first access was the write
        self.used: set[tuple[int, str]] = set()  # read again after it was written
        self._patched: list[tuple[type, Any]] = []
        self._kinds: set[type] = set()

    def _see(self, owner: Any, table: dict, name: str) -> None:
        key = (id(table), name)
        if key in self.written:
            self.used.add(key)
        elif key not in self.read:
            self.read[key] = None
            self.owners.setdefault(id(table), (table, owner))

    def _patch(self, cls: type, module: bool = False) -> None:
        """Report what is read of the instances of a class."""
        original: Callable[[Any, str], Any] = getattr(cls, "__getattribute__")  # unbound, as of any class
        own = vars(cls).get("__getattribute__")
        table_of, see, kinds = object.__getattribute__, self._see, self._kinds

        def get(this, name):
            if not self.active or name[:2] == "__":
                return original(this, name)
            try:
                value = original(this, name)
            except AttributeError:
                see(this, table_of(this, "__dict__"), name)
                raise
            see(this, table_of(this, "__dict__"), name)
            kind = type(value)
            if kind not in kinds:
                kinds.add(kind)
                if is_plain(value) and kind.__flags__ & 1 << 9:  # a class made in Python
                    self._patch(kind)
            return value

        setattr(cls, "__getattribute__", get)
        self._patched.append((cls, own))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        set_attribute = nn.Module.__setattr__

        def write(this, name, value):
            if (
                self.active and name != "__dict__"
            ):  # a stand-in of torch.fx for a shared module takes its attributes over
                table = this.__dict__
                key = (id(table), name)
                self.written.setdefault(key, key not in self.read)
                self.owners.setdefault(id(table), (table, this))
                if (
                    name in table.get("_buffers", ())
                    and isinstance(value, torch.Tensor)
                    and not isinstance(value, nn.Parameter)
                ):
                    table["_buffers"][name] = (
                        # not by way of export's own hook, which knows buffers of the outermost module alone
                        # and writes them one after another
                        value
                    )
                    return
            set_attribute(this, name, value)

        self._patch(nn.Module)
        setattr(nn.Module, "__setattr__", write)
        try:
            yield
        finally:
            nn.Module.__setattr__ = set_attribute
            while self._patched:
                cls, own = self._patched.pop()
                if own is None:
                    del cls.__getattribute__
                else:
                    setattr(cls, "__getattribute__", own)

    def stash(self, table: int, name: str) -> bool | None:
        """Of an attribute that was written: None, it was read first; else whether it was read afterwards."""
        key = (table, name)
        return (key in self.used) if self.written.get(key, False) else None


# ---- what they hold ----------------------------------------------------------------------------------------


def _file(table: Any) -> str:
    """The file of the module whose globals, or of a class whose attributes, a table is."""
    return (
        table.get("__file__") or getattr(sys.modules.get(table.get("__module__", "")), "__file__", None) or ""
    )


CODE = "<code>"
Place = tuple[str, ...]  # the module's name, then attributes; or CODE and a label of `named_outside`


def observed(model: nn.Module, reads: Reads, steady: set[tuple[int, str]]) -> dict[Place, Any]:
    """{place: frozen value} of what was read. `steady`: attributes that forward itself sets to what they then
    stay."""
    roots: dict[int, Place] = {
        id(vars(module)): (name,) for name, module in reversed(list(model.named_modules()))
    }
    by_owner = collections.defaultdict(list)
    for table, name in reads.read:
        by_owner[table].append(name)
    found: dict[Place, Any] = {}
    todo, seen = (
        sorted((roots[t], t) for t in by_owner if t in roots),
        set(),
    )  # the shortest name of what several modules hold
    while todo:
        place, table = todo.pop(0)
        if table in seen:
            continue
        seen.add(table)
        attributes, owner = reads.owners[table]
        for name in by_owner[table]:
            value = (
                owner.training == model.training
                if name == "training" and isinstance(owner, nn.Module)
                else look(attributes, owner, name)
            )
            if (table, name) in steady or value is _NOT_DATA:
                continue
            found[*place, name] = freeze(value)
            if is_plain(value) and id(vars(value)) in by_owner:
                todo.append(((*place, name), id(vars(value))))
    for named in named_outside(model):
        for label, value in named.read().items():
            where = named.where(label)
            if is_data(value) and (
                is_scalar(value) or value is MISSING or where is None or not is_installed(_file(where[0]))
            ):
                found[CODE, label] = freeze(value)
    return found


def is_data(value: Any) -> bool:
    """Whether something named outside of the modules is compared: what is read of objects there, nobody
    records."""
    return is_scalar(value) or value is MISSING or isinstance(value, (list, tuple, dict, set))


_NOT_DATA = type("NotData", (), {})()


def look(attributes: dict, owner: Any, name: str) -> Any:
    """The value of an attribute as far as it is one to compare; `_NOT_DATA` for parameters, buffers, methods
    and what torch keeps."""
    if name in attributes:
        if isinstance(owner, nn.Module) and name in _torch.MODULE_ATTRIBUTES:
            return tuple(attributes[name].values()) if name == "_modules" else _NOT_DATA
        return attributes[name]
    if isinstance(owner, nn.Module):
        if name in attributes["_modules"]:
            return attributes["_modules"][name]
        if name in attributes["_parameters"] or name in attributes["_buffers"]:
            return _NOT_DATA
    for cls in type(owner).__mro__:
        if cls is nn.Module:
            return _NOT_DATA if name in vars(cls) or hasattr(object, name) else MISSING
        if name in vars(cls):
            value = vars(cls)[name]
            return value if is_data(value) else _NOT_DATA
    if not isinstance(owner, nn.Module) and type(owner).__getattribute__ is not object.__getattribute__:
        value = getattr(
            owner, name, MISSING
        )  # a name that the class translates, as configs of transformers do
        return value if is_data(value) else _NOT_DATA
    return MISSING


def freeze(value: Any, depth: int = 8) -> Any:
    """What to compare a value by, also with that of another instance of the model: modules, functions and
    other objects by their kind alone."""
    if is_scalar(value) or value is MISSING:
        return value
    if isinstance(value, torch.Tensor):
        return ("tensor", Held(value))
    if isinstance(value, nn.Module) or depth == 0:
        return ("object", _kind(value))
    if isinstance(value, dict):
        # What it holds, not what `items` of its class makes: transformers' tables then load every model.
        held = (
            collections.OrderedDict.items(value)
            if isinstance(value, collections.OrderedDict)
            else dict.items(value)
        )
        return (type(value), tuple((freeze(k, depth - 1), freeze(v, depth - 1)) for k, v in held))
    if isinstance(value, (set, frozenset)):
        return (type(value), tuple(sorted(map(repr, value))))
    if isinstance(value, (list, tuple, collections.deque)):
        return (type(value), tuple(freeze(v, depth - 1) for v in value))
    if is_plain(value) and depth < 8:  # in a container: nothing said which of its attributes are read
        return (type(value), tuple((k, freeze(v, depth - 1)) for k, v in vars(value).items()))
    return ("object", _kind(value))


def _kind(value: Any) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


class Held:
    """A tensor that compares by its values."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def __eq__(self, other: Any) -> bool:
        a, b = self.tensor, other.tensor if isinstance(other, Held) else None
        return (
            a is b
            or b is not None
            and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
            and not a.is_meta
            and bool(torch.equal(a, b))
        )

    def __repr__(self) -> str:
        return f"{str(self.tensor.dtype).removeprefix('torch.')}{list(self.tensor.shape)}"


def equal(a: Any, b: Any) -> bool:
    """Whether two frozen values are one: as python has it, but True is not 1, and nan is nan."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return a == b or (isinstance(a, float) and a != a and b != b)


__all__ = ["CODE", "MISSING", "Place", "Reads", "equal", "freeze", "look", "observed"]
