"""Where ranks meet on the CPU before a collective can go wrong: a line instead of a hang.

Every exchange begins with a flag: a rank that refuses or fails before it (`telling`) takes part all the same,
and all raise its line.

A rank that does not come: the others wait `timeout` seconds. Who waits longer than a moment leaves a mark in
the job's store; at the end, those without a mark are named.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from tedfx import _torch
from tedfx.ops.groups import begun, group_among
from tedfx.options import Options
from tedfx.ranks.failures import (
    RankFailed,
    RanksDisagree,
    clear_note,
    failure_line,
    first_line,
    leave_note,
    note_of,
)
from tedfx.ranks.wording import by_value, ranks_text, said

# How long a rank waits before it leaves a mark, and for the marks of others when its time is over.
MOMENT = 2.0
# Numbers of one exchange besides the flag: all exchanges are of one size, so that a rank that fails need not
# know which one the others are in.
WIDTH = 15
# How many times longer ranks wait for each other when a call was compiled: compiling takes minutes, and not
# the same on all.
AFTER_COMPILING = 10

_GROUPS: dict[tuple, dist.ProcessGroup] = {}


class Meeting:
    """The ranks of a mesh, meeting on the CPU. Collective over the job to construct."""

    def __init__(self, mesh, timeout: float = Options.check_timeout):
        self.ranks = mesh.mesh.flatten().tolist()
        self.mesh, self.timeout, self._calls = mesh, timeout, 0
        self.alone = len(self.ranks) == 1 or dist.get_backend() == "fake"
        if not self.alone:
            key = (dist.group.WORLD, tuple(self.ranks))
            if key not in _GROUPS:
                self._come()
                _GROUPS[key] = group_among(
                    [self.ranks],
                    backend="gloo",
                    timeout=datetime.timedelta(days=1),
                    group_desc="tedfx_checks",
                )
            self._group = _GROUPS[key]
            self._order = dist.get_process_group_ranks(self._group)

    def _come(self) -> None:
        """Wait for the others before a group is made with them, which would wait for as long as it takes."""
        store, key = _torch.default_store(), f"tedfx/coming/{self.ranks}"
        store.set(f"{key}/{dist.get_rank()}", "1")
        try:
            store.wait(
                [f"{key}/{rank}" for rank in self.ranks],
                datetime.timedelta(seconds=self.timeout * AFTER_COMPILING),
            )
        except RuntimeError as error:
            missing = [rank for rank in self.ranks if not store.check([f"{key}/{rank}"])]
            raise RanksDisagree(
                f"parallelize: {ranks_text(missing)} did not come within "
                f"{self.timeout * AFTER_COMPILING:.0f} s; every rank of the mesh must make the same calls in "
                "the same order (timeout: "
                f"{AFTER_COMPILING} x check_timeout={self.timeout:g})"
            ) from error

    def exchange(self, numbers: Sequence[int], what: str, patience: float = 1) -> dict[int, list[int]]:
        """{rank: its numbers}, at most `WIDTH`; or a line: of the rank that failed before, or who did not
        come to `what` in `patience` times the timeout."""
        if self.alone:
            return {rank: list(numbers) for rank in self.ranks}
        found = self._gather([0, *numbers, *[0] * (WIDTH - len(numbers))], what, patience)
        failed = [rank for rank, values in found.items() if values[0]]
        if failed:
            raise RankFailed(
                said({rank: text for rank, text in self.texts("", what).items() if rank in failed})
            )
        clear_note()
        return {rank: values[1 : 1 + len(numbers)] for rank, values in found.items()}

    @contextlib.contextmanager
    def telling(self, what: str) -> Iterator[None]:
        """What this rank does by itself before an exchange: if it fails, it takes part in the exchange that
        the others are in, which raises its line there."""
        try:
            yield
        except Exception as error:
            self.fail(error, what)
            raise

    def fail(self, error: BaseException, what: str) -> None:
        """Tell the others that this rank cannot go on, and why."""
        if self.alone or isinstance(error, RanksDisagree):  # that one they have seen
            return
        leave_note(error)
        with contextlib.suppress(
            RanksDisagree
        ):  # they are elsewhere, or gone: the note is there for them, and the caller raises the error itself
            self._gather([1, *[0] * WIDTH], what)
            self.texts(failure_line(error), what)

    def texts(self, text: str, what: str) -> dict[int, str]:
        """{rank: its text}, cut to a fixed size."""
        if self.alone:
            return {rank: text for rank in self.ranks}
        data = text.encode()[:4096].ljust(4096, b"\0")
        numbers = torch.frombuffer(bytearray(data), dtype=torch.int64).tolist()
        found = self._gather(numbers, what)
        return {
            r: torch.tensor(v).numpy().tobytes().rstrip(b"\0").decode(errors="ignore")
            for r, v in found.items()
        }

    def _gather(self, numbers: Sequence[int], what: str, patience: float = 1) -> dict[int, list[int]]:
        mine = torch.tensor(numbers, dtype=torch.int64)
        self._calls += 1
        every = [torch.empty_like(mine) for _ in self._order]
        self._wait(
            lambda: begun(dist.all_gather(every, mine, group=self._group, async_op=True)),
            what,
            self.timeout * patience,
        )
        return {rank: values.tolist() for rank, values in zip(self._order, every)}

    def agree(self, text: str, what: str, remedy: str) -> None:
        """Every rank passes the same text, or a line says who passed what."""
        numbers = self.exchange([fingerprint(text)], what)
        if len({tuple(n) for n in numbers.values()}) > 1:
            raise RanksDisagree(f"{what} differs between ranks: {by_value(self.texts(text, what))}. {remedy}")

    def _wait(self, begin: Callable[[], dist.Work], what: str, timeout: float) -> None:
        start, others = time.monotonic(), [rank for rank in self._order if rank != dist.get_rank()]
        try:
            work = begin()
            if _done(work, min(MOMENT, timeout)):
                return
            store, key = _torch.default_store(), f"tedfx/waiting/{self.ranks[0]}/{self._calls}"
            store.set(f"{key}/{dist.get_rank()}", "1")
            if _done(work, timeout - (time.monotonic() - start)):
                return
            missing = [rank for rank in self._order if not store.check([f"{key}/{rank}"])]
        except RuntimeError as error:
            if told := note_of(others):
                raise RankFailed(told) from error
            raise RanksDisagree(
                f"{what}: a rank ended while this one waited for it ({first_line(error)}); see that "
                "rank's output"
            ) from error
        if told := note_of(missing):
            raise RankFailed(told)
        waited = time.monotonic() - start
        raise RanksDisagree(
            f"{what}: {ranks_text(missing)} did not come within {waited:.0f} s while "
            f"{ranks_text(sorted(set(self._order) - set(missing)))} "
            "waited; every rank of the mesh must make the same calls in the same order (timeout: "
            f"check_timeout={self.timeout:g})"
        )


def told(what: str) -> Callable:
    """For a function of a model and a mesh, collective over the mesh: where it fails on one rank, the others
    raise that rank's line."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def telling(model, mesh, *args, **kwargs):
            try:
                return function(model, mesh, *args, **kwargs)
            except Exception as error:
                if (
                    dist.is_initialized()
                    and getattr(mesh, "mesh_dim_names", None)
                    and mesh.get_coordinate() is not None
                    and not isinstance(error, RanksDisagree)
                ):
                    with contextlib.suppress(
                        RanksDisagree
                    ):  # the others are gone; this rank's own error is raised
                        Meeting(mesh, _patience(kwargs)).fail(error, what)
                raise

        return telling

    return decorate


def _patience(given: Mapping[str, Any]) -> float:
    """The check_timeout of a call's keywords, which may be what is refused."""
    seconds = given.get("check_timeout", getattr(given.get("options"), "check_timeout", None))
    return seconds if isinstance(seconds, (int, float)) and seconds > 0 else Options.check_timeout


def fingerprint(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _done(work: dist.Work, seconds: float) -> bool:
    """Whether `work` ended within so many seconds; RuntimeError where it failed."""
    if seconds <= 0:
        return work.is_completed()
    try:
        work.wait(datetime.timedelta(seconds=seconds))
        return True
    except RuntimeError as error:
        if work.is_completed() or "timed out" not in str(error).lower():
            raise
        return False
