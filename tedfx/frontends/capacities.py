"""Numbers that a model makes from sizes: an expert's capacity is `int(1.25 * tokens / experts)`, and the
sizes are free while tracing.

Two things would fix such a number to that of the example, silently:

- python's `int()` must return an int. In the modules of the model whose source calls it, the name `int`
  stands, while tracing, for a stand-in that leaves a size a size and truncates a number made from sizes as
  `math.trunc` does. It is a type still: `isinstance(x, int)` and `int(x)` of anything else are what they
  were. `math.ceil`, `math.floor`, `round`, `//` need no help.
- `one_hot` takes a number of classes. With a size it is traced as what it means, `ids[..., None] ==
  arange(classes)`.

`int()` of a number made from sizes in any other module is refused, with the line.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import math
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from tedfx.errors import TraceError

__all__ = ["Capacities"]

_CALL = re.compile(r"(?<![\w.])int\(")
_AS_TYPE = re.compile(r"(\bis|dtype\s*=|\.to\()\s*int\b(?!\()")  # where only the very type will do
_MACHINERY = re.compile(r"(torch|tedfx)(\.|$)")


class Capacities:
    """Frontend for any model."""

    name = "capacities"
    number_inputs = ()
    memories = ()

    def applies(self, model: nn.Module) -> bool:
        return True

    @contextlib.contextmanager
    def prepare(self, model: nn.Module, notes: list[str]) -> Iterator[None]:
        modules = {
            sys.modules[t.__module__]
            for m in model.modules()
            for t in type(m).__mro__
            if t.__module__ in sys.modules
        }
        with contextlib.ExitStack() as stack:
            for module in sorted((m for m in modules if _calls_int(m)), key=lambda m: m.__name__):
                stack.enter_context(_global(module, "int", Whole))
            stack.enter_context(_refused())
            stack.enter_context(_OneHot())
            yield

    def reference(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def captured(self, model: nn.Module) -> list[str]:
        return []


class _WholeType(type):
    def __call__(cls, *args, **kwargs):
        if len(args) == 1 and isinstance(args[0], torch.SymInt):
            return args[0]
        if len(args) == 1 and isinstance(args[0], torch.SymFloat):
            return math.trunc(args[0])
        return builtins.int(*args, **kwargs)

    def __instancecheck__(cls, value) -> bool:
        return isinstance(value, builtins.int)

    def __subclasscheck__(cls, other) -> bool:
        return issubclass(other, builtins.int)


class Whole(metaclass=_WholeType):
    """`int`, but a size stays a size."""


def _calls_int(module: ModuleType) -> bool:
    if _MACHINERY.match(module.__name__) or module is builtins:
        return False
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return False
    return bool(_CALL.search(source)) and not _AS_TYPE.search(source)


@contextlib.contextmanager
def _global(module: ModuleType, name: str, value) -> Iterator[None]:
    names = vars(module)
    if name in names:  # the module's own
        yield
        return
    names[name] = value
    try:
        yield
    finally:
        del names[name]


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """`int()` of a number made from sizes, which would be fixed to that of the example without a word."""

    def refuse(self):
        frame = sys._getframe(1)
        raise TraceError(
            "int() fixes a number made from sizes to that of the example | at "
            f"{frame.f_code.co_filename}:{frame.f_lineno} | "
            "write math.floor(..) or math.ceil(..)"
        )

    before = torch.SymFloat.__dict__.get("__int__")
    torch.SymFloat.__int__ = refuse
    try:
        yield
    finally:
        if before is None:
            del torch.SymFloat.__int__
        else:
            torch.SymFloat.__int__ = before


class _OneHot(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.one_hot:
            ids, classes = (*args, *kwargs.values())[:2] if len(args) + len(kwargs) > 1 else (args[0], -1)
            if isinstance(classes, torch.SymInt):
                count = cast(int, classes)  # torch's types take no size there
                return (ids.unsqueeze(-1) == torch.arange(count, device=ids.device)).to(torch.int64)
        return function(*args, **kwargs)
