"""What tedfx raises. Every message is one line of cause, the user's own line, and what to do about it."""

from __future__ import annotations

import functools
import importlib.util
import os
import re

__all__ = ["CaptureError", "ConfigError", "ContractError", "TedfxError", "TraceError", "TypeCheckError", "user_line"]


class TedfxError(Exception):
    """Base of everything tedfx refuses."""


class TraceError(TedfxError):
    """The model cannot be traced into one graph."""


class CaptureError(TedfxError):
    """A mixture-of-experts layer was not captured, or its captured form computes something else."""


class ContractError(TedfxError):
    """Two passes stand in an order that one of them cannot accept."""


class ConfigError(TedfxError):
    """An option, a mesh or a role makes no sense together with the model."""


class TypeCheckError(TedfxError):
    """A value's placement does not fit the operation that uses it."""


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


@functools.cache
def _machinery() -> tuple[str, ...]:
    """Where the code of torch and of tedfx lies: by the packages' own places, since a user's folder may have any name."""
    places = [spec.submodule_search_locations for name in ("torch", "tedfx", "tedfx.passes") if (spec := importlib.util.find_spec(name))]
    return tuple(os.path.join(place, "") for group in places for place in group)


@functools.cache
def is_machinery(filename: str) -> bool:
    """Whether a frame of this file is torch's or tedfx's own, not the user's model."""
    return filename.startswith(("<frozen", "<string", "<eval", *_machinery()))


def user_line(source) -> str:
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
