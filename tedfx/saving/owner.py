"""Which run writes to a folder of checkpoints: at most one at a time.

    folder/owner   a line that says who it is; locked by that process for as long as it lives

The lock is the system's own (`fcntl.lockf`), so it goes with the process however that ends: a run that was
killed and is resumed finds it free, a second run beside a living one does not, on this host or, where the
file system has locks for all hosts (NFS, Lustre, GPFS), on another. No times are compared and nothing has to
be kept fresh. A process may have any number of `Checkpointer`s in one folder.
"""

from __future__ import annotations

import errno
import os
import socket
import time
import warnings
import weakref
from pathlib import Path

OWNER = "owner"
PATIENCE = 5.0  # seconds for the last owner's process to go, where it is just ending
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_held: weakref.WeakValueDictionary[tuple[int, int, int], Owner] = weakref.WeakValueDictionary()


class Owner:
    """A lock that this process holds, until it is dropped. A second one of the same file would drop it too:
    closing any descriptor of a file does."""

    def __init__(self, descriptor: int):
        self._close = weakref.finalize(self, os.close, descriptor)


def claim(folder: Path) -> Owner | str:
    """The folder is this process's, or the line of whose it is."""
    deadline = time.monotonic() + PATIENCE
    while True:
        if (held := _mine(folder)) is not None:
            return held
        descriptor = os.open(folder / OWNER, os.O_RDWR | os.O_CREAT, 0o666)
        if not _lock(descriptor, shared=False):
            told = _read(descriptor)
            os.close(descriptor)
            if time.monotonic() > deadline:
                return told
            time.sleep(0.2)
            continue
        key = _key(os.fstat(descriptor))
        if _there(folder) != key:  # somebody removed the file in between
            os.close(descriptor)
            continue
        os.ftruncate(descriptor, 0)
        os.pwrite(
            descriptor,
            f"process {os.getpid()} on {socket.gethostname()}, since "
            f"{time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}\n".encode(),
            0,
        )
        _held[key] = owner = Owner(descriptor)
        return owner


def other(folder: Path) -> str | None:
    """The line of a living owner that is not this process; nothing is claimed."""
    if _mine(folder) is not None or not (folder / OWNER).exists():
        return None
    descriptor = os.open(folder / OWNER, os.O_RDONLY)
    try:
        return None if _lock(descriptor, shared=True) else _read(descriptor)
    finally:
        os.close(descriptor)


def _mine(folder: Path) -> Owner | None:
    there = _there(folder)
    return None if there is None else _held.get(there)


def _there(folder: Path) -> tuple[int, int, int] | None:
    try:
        return _key(os.stat(folder / OWNER))
    except FileNotFoundError:
        return None


def _key(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, os.getpid()  # a forked process has no lock of its parent's


def _lock(descriptor: int, shared: bool) -> bool:
    import fcntl

    try:
        fcntl.lockf(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"the file system of the checkpoints has no locks ({error.strerror}): two runs in one "
            "folder are not told apart",
            stacklevel=2,
        )
    return True


def _read(descriptor: int) -> str:
    return (
        os.pread(descriptor, 300, 0).decode(errors="replace").strip()
        or "a process that has not said its name yet"
    )
