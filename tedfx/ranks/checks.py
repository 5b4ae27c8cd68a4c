"""Agreement between ranks before a collective can go wrong: a line instead of a hang.

A call exchanges one fixed-size fingerprint on a CPU (gloo) group of its own: a number for what is called
(arguments, types, flags, shapes), one for inputs that every rank must share (scalars, and what has no batch
dim), one for the data. Ranks that stand at the same batch coordinate must have the same data. Where
fingerprints differ, every rank sees it and takes part in a second exchange of the texts behind the numbers,
so that the message can say who has what.

Every exchange begins with a flag: a rank that refuses or fails before it (`telling`) takes part all the same,
and all raise its line. A call that some rank has no program for is compiled after a first exchange and
compared again in a second, so that an error in one rank's compilation is seen too.

A rank that does not come: the others wait `timeout` seconds. Who waits longer than a moment leaves a mark in
the job's store; at the end, those without a mark are named.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tedfx import _torch
from tedfx.dtypes import as_real, has_gradient
from tedfx.ops.groups import group_among
from tedfx.options import Options
from tedfx.ranks.failures import (
    RankFailed,
    RanksDisagree,
    clear_note,
    failure_line,
    first_line,
    leave_note,
    lost_rank,
    note_of,
)

__all__ = ["CallCheck", "Meeting", "RankFailed", "RanksDisagree", "checksums", "lost_rank", "told"]

# How long a rank waits before it leaves a mark, and for the marks of others when its time is over.
MOMENT = 2.0
# Numbers of one exchange besides the flag: all exchanges are of one size, so that a rank that fails need not
# know which one the others are in.
WIDTH = 15
# How many times longer ranks wait for each other when a call was compiled: compiling takes minutes, and not
# the same on all.
AFTER_COMPILING = 10
# Elements of one tensor that its checksum reads; of a longer one, every k-th.
CHECKSUM_ELEMENTS = 2**20


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
                f"parallelize: {_ranks(missing)} did not come within {self.timeout * AFTER_COMPILING:.0f} s; "
                "every rank of the mesh must make the same calls in the same order (timeout: "
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
                _said({rank: text for rank, text in self.texts("", what).items() if rank in failed})
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
            lambda: dist.all_gather(every, mine, group=self._group, async_op=True),
            what,
            self.timeout * patience,
        )
        return {rank: values.tolist() for rank, values in zip(self._order, every)}

    def agree(self, text: str, what: str, remedy: str) -> None:
        """Every rank passes the same text, or a line says who passed what."""
        numbers = self.exchange([fingerprint(text)], what)
        if len({tuple(n) for n in numbers.values()}) > 1:
            raise RanksDisagree(
                f"{what} differs between ranks: {_by_value(self.texts(text, what))}. {remedy}"
            )

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
            f"{what}: {_ranks(missing)} did not come within {waited:.0f} s while "
            f"{_ranks(sorted(set(self._order) - set(missing)))} "
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


class CallCheck:
    """Before any collective of a forward: all ranks made the same call, with the data that belongs to their
    coordinate."""

    def __init__(self, meeting: Meeting, batch_axes: Sequence[str]):
        self.meeting, self._patience = meeting, 1
        mesh = meeting.mesh
        batch = [mesh.mesh_dim_names.index(axis) for axis in batch_axes]
        self._coordinate = {}
        for place in (
            torch.cartesian_prod(*(torch.arange(n) for n in mesh.mesh.shape))
            .reshape(-1, mesh.mesh.dim())
            .tolist()
        ):
            self._coordinate[int(mesh.mesh[tuple(place)])] = tuple(place[dim] for dim in batch)

    def __call__(
        self,
        signature: str,
        tensors: Mapping[str, Tensor],
        program: bool = True,
        shared: Collection[str] = (),
        data: tuple[int, int] | None = None,
    ) -> bool:
        """Whether some rank has no program for the call yet; then nothing but the call was compared.

        program: whether this rank has one. shared: inputs without a batch dim, apart from scalars. data: the
        `checksums` of the tensors, where they are known.
        """
        if self.meeting.alone:
            return not program
        call = (
            signature + " with " + ", ".join(f"{key} {_kind(t)}{list(t.shape)}" for key, t in tensors.items())
        )
        common, mine = (0, 0) if not program else checksums(tensors, shared)[:2] if data is None else data
        found = self.meeting.exchange(
            [not program, fingerprint(call), common, mine], "forward", self._patience
        )
        self._patience = 1
        if len({numbers[1] for numbers in found.values()}) > 1:
            texts = self.meeting.texts(call, "forward")
            raise RanksDisagree(
                f"forward was called differently: {_by_value(texts)}. Give every rank the same "
                "arguments, the same shapes "
                "(pad, or drop the last batch) and the same train() or eval() mode"
            )
        if any(numbers[0] for numbers in found.values()):
            self._patience = AFTER_COMPILING
            return True
        if len({numbers[2] for numbers in found.values()}) > 1:
            texts = self.meeting.texts(
                ", ".join(f"{k}={_value(t)}" for k, t in tensors.items() if t.dim() == 0 or k in shared),
                "forward",
            )
            kind = "inputs without a batch dim" if shared else "scalar inputs"
            raise RanksDisagree(
                f"{kind} differ between ranks: {_by_value(texts)}. They are global values: reduce them "
                "first, or give every rank the same"
            )
        rows: dict[tuple, dict[int, int]] = {}
        for rank, numbers in found.items():
            rows.setdefault(self._coordinate[rank], {})[rank] = numbers[3]
        wrong = [sorted(row) for row in rows.values() if len(set(row.values())) > 1]
        if wrong:
            raise RanksDisagree(
                f"{_ranks(wrong[0])} have the same batch coordinate but were given different data; "
                "shard the data by pm.batch_coordinate (index, count), not by the rank"
            )
        return False


def checksums(
    tensors: Mapping[str, Tensor], shared: Collection[str] = (), also: Sequence[Tensor] = ()
) -> tuple[int, ...]:
    """(of the scalars and what is shared, of the rest, the 0-dim integers `also`): order-sensitive sums of
    the bits, one host copy. No protection against intent."""
    sums = [[], []]
    for name, tensor in tensors.items():
        bits = _bits(tensor.detach())
        step = -(-bits.numel() // CHECKSUM_ELEMENTS) or 1
        bits = bits[::step].to(torch.int64)
        weights = torch.arange(bits.numel(), device=bits.device) * 0x9E3779B1 + 0x85EBCA6B
        sums[tensor.dim() > 0 and name not in shared].append((bits * weights).sum())
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    zero = torch.zeros((), dtype=torch.int64, device=device)
    totals = [sum((s * (2 * i + 3) for i, s in enumerate(part)), zero) for part in sums]
    return tuple(torch.stack([*totals, *also]).tolist())


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    if not has_gradient(flat.dtype):
        return flat
    flat = as_real(flat).reshape(-1)
    return flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])


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


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _value(tensor: Tensor) -> str:
    return (
        str(tensor.item())
        if tensor.dim() == 0
        else f"{list(tensor.shape)} with checksum {checksums({'': tensor})[1] % 2**32:08x}"
    )


def _said(texts: Mapping[int, str]) -> str:
    """`ranks 0, 1: <line>; rank 2: <line>`, of at most two lines."""
    groups: dict[str, list[int]] = {}
    for rank, text in sorted(texts.items()):
        groups.setdefault(text, []).append(rank)
    return "; ".join(f"{_ranks(ranks)}: {text}" for text, ranks in list(groups.items())[:2])


def _by_value(texts: Mapping[int, str]) -> str:
    """`ranks 0, 1: <text>; rank 2: <text>`."""
    groups: dict[str, list[int]] = {}
    for rank, text in sorted(texts.items()):
        groups.setdefault(text, []).append(rank)
    shown = dict(zip(groups, _where_they_differ(list(groups))))
    return "; ".join(f"{_ranks(ranks)}: {shown[text]}" for text, ranks in groups.items())


def _where_they_differ(texts: list[str], around: int = 80) -> list[str]:
    """Long texts cut to what stands about the first character in which they differ."""
    if max(map(len, texts)) <= 4 * around:
        return texts
    same = next((i for i, letters in enumerate(zip(*texts)) if len(set(letters)) > 1), min(map(len, texts)))
    start, stop = max(0, same - around), same + around
    return ["..." * (start > 0) + text[start:stop] + "..." * (stop < len(text)) for text in texts]


def _ranks(ranks: Sequence[int]) -> str:
    word = "rank" if len(ranks) == 1 else "ranks"
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"{word} {shown or 'none'}"
