"""Numbers that a model makes from sizes: an expert's capacity is `int(1.25 * tokens / experts)`, and the
sizes are free while tracing.

Three things would fix such a number to that of the example, or bound the sizes by it:

- python's `int()` and `float()` must return an int and a float. In the modules of the model whose source
  calls them, these names stand, while tracing, for a stand-in that leaves a size a size, truncates a number
  made from sizes as `math.trunc` does and makes a float of it as `torch.sym_float` does. They are types
  still: `isinstance(x, int)` and `int(x)` of anything else are what they were. `math.ceil`, `math.floor`,
  `round`, `//` need no help.
- `max()` and `min()` ask which of two numbers is larger. Of a number that was rounded the answer would hold
  for the example alone: in those modules it is `torch.sym_max`, `torch.sym_min`. Of plain sizes they are
  asked as ever, and what they answer bounds the sizes.
- `one_hot` takes a number of classes. With a size it is traced as what it means, `ids[..., None] ==
  arange(classes)`. So is one with as many classes as the data ask for, of which the first are taken
  (tedfx/frontends/wide.py).

`int()` of a number made from sizes in any other module is refused, with the line.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, cast

import sympy
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from tedfx.errors import TraceError
from tedfx.frontends.wide import WideOneHots

__all__ = ["Capacities"]

_CALL = r"(?<![\w.]){}\("
_AS_TYPE = r"(\bis|dtype\s*=|\.to\()\s*{}\b(?!\()"  # where only the very type will do
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
        wide = WideOneHots()

        def larger(*args, **kwargs):
            found = None if kwargs else wide.larger(args)
            return _extreme(builtins.max, torch.sym_max, args, kwargs) if found is None else found

        stand_ins: dict[str, Any] = {"int": Whole, "float": Real, "max": larger, "min": smaller}
        with contextlib.ExitStack() as stack:
            for module in sorted(modules, key=lambda m: m.__name__):
                for name in _called(module, stand_ins):
                    stack.enter_context(_global(module, name, stand_ins[name]))
            stack.enter_context(_refused())
            stack.enter_context(_OneHot())
            stack.enter_context(wide)
            yield

    def reference(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def captured(self, model: nn.Module) -> list[str]:
        return []


class _NumberType(type):
    """A type of numbers that is python's, but for sizes."""

    python: type

    def __instancecheck__(cls, value) -> bool:
        return isinstance(value, cls.python)

    def __subclasscheck__(cls, other) -> bool:
        return issubclass(other, cls.python)

    def __eq__(cls, other) -> bool:  # type(x) == int, type(x) in (int, float)
        return other is cls or other is cls.python

    def __hash__(cls) -> builtins.int:
        return hash(cls.python)


class _WholeType(_NumberType):
    python = builtins.int

    def __call__(cls, *args, **kwargs):
        if len(args) == 1 and isinstance(args[0], torch.SymInt):
            return args[0]
        if len(args) == 1 and isinstance(args[0], torch.SymFloat):
            return math.trunc(args[0])
        return builtins.int(*args, **kwargs)


class Whole(metaclass=_WholeType):
    """`int`, but a size stays a size."""


class _RealType(_NumberType):
    python = builtins.float

    def __call__(cls, *args, **kwargs):
        if len(args) == 1 and isinstance(args[0], (torch.SymInt, torch.SymFloat)):
            return torch.sym_float(args[0])
        return builtins.float(*args, **kwargs)


class Real(metaclass=_RealType):
    """`float`, but a number made from sizes stays one."""


def smaller(*args, **kwargs):
    """`min`."""
    return _extreme(builtins.min, torch.sym_min, args, kwargs)


def _extreme(python: Callable, sizes: Callable, args: tuple, kwargs: dict) -> Any:
    """`max` or `min`; of numbers of which one was rounded, without asking which it is."""
    numbers = all(isinstance(x, (builtins.int, builtins.float, torch.SymInt, torch.SymFloat)) for x in args)
    if len(args) < 2 or kwargs or not numbers or not any(map(_rounded, args)):
        return python(*args, **kwargs)
    return functools.reduce(sizes, args)


def _rounded(value: object) -> bool:
    """Whether a number was made from sizes by arithmetic of floats."""
    if isinstance(value, torch.SymInt):
        return any("ToInt" in type(part).__name__ for part in sympy.preorder_traversal(value.node.expr))
    return isinstance(value, torch.SymFloat)


def _called(module: ModuleType, names: Iterable[str]) -> list[str]:
    """Those of the names that a module's source calls, and needs for nothing but a call."""
    if _MACHINERY.match(module.__name__) or module is builtins:
        return []
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return []
    return [
        name
        for name in names
        if re.search(_CALL.format(name), source) and not re.search(_AS_TYPE.format(name), source)
    ]


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
