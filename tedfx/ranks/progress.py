"""A line on a terminal that says what is being traced, checked or compiled, for as long as it takes.

One rank opens the line around what the user waits for; what works under it says what it does by `now`,
without knowing whether anybody looks.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator
from typing import TextIO

__all__ = ["line", "now"]

_open: list[_Line] = []


class _Line:
    def __init__(self, title: str, stream: TextIO):
        self.title, self.stream, self.start = title, stream, time.perf_counter()

    def write(self, what: str) -> None:
        seconds = time.perf_counter() - self.start
        text = f"{self.title}: {what} ({seconds:.0f} s)"[: shutil.get_terminal_size().columns - 1]
        # back to its start: what others print in the meantime takes its place
        self.stream.write(f"\r\x1b[K{text}\r")
        self.stream.flush()

    def erase(self) -> None:
        self.stream.write("\r\x1b[K")
        self.stream.flush()


@contextlib.contextmanager
def line(title: str, wanted: bool) -> Iterator[None]:
    """The line is there while the block runs, where it is wanted, stderr is a terminal, and none is there
    already."""
    if not wanted or _open or not sys.stderr.isatty():
        yield
        return
    _open.append(_Line(title, sys.stderr))
    try:
        yield
    finally:
        _open.pop().erase()


def now(what: str) -> None:
    """What is being done."""
    if _open:
        _open[-1].write(what)
