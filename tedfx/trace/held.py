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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from tedfx.trace.cells import Cell, cell_of, module_cell
from tedfx.trace.named import MISSING, Named, named_outside
from tedfx.trace.values import OPAQUE, is_scalar, same

LIMIT = 300_000


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


_Todo: TypeAlias = collections.deque[tuple[str, Any]]  # (path, value) of what is still to be looked at


class Snapshot:
    """What `model` holds now."""

    def __init__(self, model: nn.Module):
        self._cells: list[Cell] = []
        self._seen: dict[int, Any] = {}
        self.complete = True
        todo: _Todo = collections.deque()
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

    def _module(self, name: str, module: nn.Module, todo: _Todo) -> None:
        table = vars(module)
        if id(table) not in self._seen:
            self._seen[id(table)] = table
            cell = module_cell(name, module)
            self._cells.append(cell)
            todo.extend((cell.shown(key), value) for key, value in cell.saved.items())

    def _named(self, named: Named, todo: _Todo) -> None:
        self._cells.append(Cell("", named.read(), named.read, named.write, str))
        todo.extend(self._cells[-1].saved.items())

    def _visit(self, path: str, value: Any, todo: _Todo) -> None:
        if is_scalar(value) or isinstance(value, (OPAQUE, nn.Module)) or id(value) in self._seen:
            return
        if isinstance(value, (nn.Parameter, nn.Buffer)):
            return
        cell, entries = cell_of(path, value, self._replace)
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


def _putter(cell: Cell, key: Any, new: Any) -> Callable[[], None]:
    def put() -> None:
        now = dict(cell.read())
        now.pop(key, None)
        if new is not MISSING:
            now[key] = new
        cell.write(now)

    return put
