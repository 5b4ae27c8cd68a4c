"""What tedfx raises. Every message is one line of cause, the user's own line, and what to do about it."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import re
import sysconfig
import traceback
import warnings
from typing import Any

import torch.distributed as dist

__all__ = [
    "CallError",
    "CaptureError",
    "ConfigError",
    "ContractError",
    "TedfxError",
    "TraceError",
    "TypeCheckError",
    "user_line",
    "warn",
]


class TedfxError(Exception):
    """Base of everything tedfx refuses."""


class TraceError(TedfxError):
    """The model cannot be traced into one graph."""


class CallError(TraceError):
    """A call does not fit what was traced: its sizes, or values that are looked up."""


class CaptureError(TedfxError):
    """A mixture-of-experts layer was not captured, or its captured form computes something else."""


class ContractError(TedfxError):
    """Two passes stand in an order that one of them cannot accept."""


class ConfigError(TedfxError):
    """An option, a mesh or a role makes no sense together with the model."""


class TypeCheckError(TedfxError):
    """A value's placement does not fit the operation that uses it."""


def warn(text: str) -> None:
    """A warning of what is the same on every rank: one rank of a job says it."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        warnings.warn(text, stacklevel=3)


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


@functools.cache
def _machinery() -> tuple[str, ...]:
    """Where the code of torch and of tedfx lies: by the packages' own places, since a user's folder may have
    any name."""
    return tuple(
        os.path.join(place, "")
        for name in ("torch", "tedfx", "tedfx.passes")
        if (spec := importlib.util.find_spec(name)) is not None
        for place in spec.submodule_search_locations or ()
    )


@functools.cache
def is_machinery(filename: str) -> bool:
    """Whether a frame of this file is torch's or tedfx's own, not the user's model."""
    return filename.startswith(("<frozen", "<string", "<eval", *_machinery()))


_INSTALLED = re.compile(r".*[/\\](?:site|dist)-packages[/\\][^/\\]+")


@functools.cache
def _package(filename: str) -> str:
    """The installed package that a file belongs to; "" for the user's own."""
    found = _INSTALLED.match(filename)
    return found.group() if found else "python" if filename.startswith(sysconfig.get_path("stdlib")) else ""


def is_installed(filename: str) -> bool:
    """Whether a file belongs to an installed package or to Python."""
    return _package(filename) != ""


def model_frames(frames: list, above: str) -> list:
    """Of the frames of a call, those of the model: below the last one of the file `above`, in the user's own
    code or in a package that has a `forward` among them.

    So a helper of the model is its own line, and a library that it calls is the line of the call.
    """
    start = max((i for i, f in enumerate(frames) if f.filename == above), default=-1) + 1
    inside = [f for f in frames[start:] if not is_machinery(f.filename)]
    packages = {"", *(_package(f.filename) for f in inside if f.name == "forward")}
    return [f for f in inside if _package(f.filename) in packages]


def line_below(above: str) -> str:
    """`file:line` of the model's code that is running, below the last frame of the file `above`."""
    frames = model_frames(traceback.extract_stack(), above)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown line"


def user_line(source: Any) -> str:
    """`file:line` of the model's code behind a node (by its stack trace) or behind an exception."""
    if isinstance(source, BaseException):
        frames, seen, error = [], set(), source
        while error is not None and id(error) not in seen:
            seen.add(id(error))
            found, tb = [], error.__traceback__
            while tb is not None:
                found.append((tb.tb_frame.f_code.co_filename, tb.tb_lineno))
                tb = tb.tb_next
            frames = [f for f in found if not is_machinery(f[0])] or frames
            error = error.__cause__ or error.__context__
    else:
        text = getattr(source, "meta", {}).get("stack_trace") or ""
        frames = [(f, int(n)) for f, n, _ in _FRAME.findall(text) if not is_machinery(f)]
    if not frames:
        return "an unknown line"
    return f"{frames[-1][0]}:{frames[-1][1]}"


def line_of_definition(function) -> str:
    """`file:line` of where a function of the model is defined."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return "an unknown line" if code is None else f"{code.co_filename}:{code.co_firstlineno}"
