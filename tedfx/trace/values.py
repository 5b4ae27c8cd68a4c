"""What kind of thing a value is, and whether two values are the same."""

from __future__ import annotations

import collections
import enum
import random
import types
from typing import Any

import torch
from torch import nn

SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, range)
# Their contents are their own affair: nothing that a forward computes with.
OPAQUE = (
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
_FOREIGN = tuple(
    """torch. logging threading _thread concurrent. multiprocessing. queue io _io weakref functools _abc re
    typing""".split()
)


def is_scalar(value: Any) -> bool:
    return type(value) in SCALARS or isinstance(value, enum.Enum)


def is_plain(value: Any) -> bool:
    """Whether an object is of a class that somebody wrote to hold attributes, such as a config."""
    if isinstance(
        value,
        (nn.Module, torch.Tensor, *OPAQUE, *SCALARS, list, dict, tuple, set, frozenset, collections.deque),
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
