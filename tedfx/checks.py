"""Agreement between ranks before a collective can go wrong: a line instead of a hang.

A call exchanges one fixed-size fingerprint on a CPU (gloo) group of its own: a number for what is called (arguments,
types, flags), one for the shapes, one for scalars that every rank must share, one for the data. Ranks that stand at the
same batch coordinate must have the same data. Where fingerprints differ, every rank sees it and takes part in a second
exchange of the texts behind the numbers, so that the message can say who has what.

A rank that does not come: the others wait `timeout` seconds. Who waits longer than a moment leaves a mark in the job's
store; at the end, those without a mark are named.
"""

from __future__ import annotations

import datetime
import hashlib
import time
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tedfx import _torch
from tedfx.dtypes import as_real, has_gradient
from tedfx.errors import TedfxError

# How long a rank waits before it leaves a mark, and for the marks of others when its time is over.
MOMENT = 2.0
# Elements of one tensor that its checksum reads; of a longer one, every k-th.
CHECKSUM_ELEMENTS = 2**20


class RanksDisagree(TedfxError):
    """The ranks of one call were not called alike."""


_GROUPS: dict[tuple, dist.ProcessGroup] = {}


class Meeting:
    """The ranks of a mesh, meeting on the CPU. Collective over the job to construct."""

    def __init__(self, mesh, timeout: float = 60.0):
        self.ranks = mesh.mesh.flatten().tolist()
        self.mesh, self.timeout, self._calls = mesh, timeout, 0
        self.alone = len(self.ranks) == 1 or dist.get_backend() == "fake"
        if not self.alone:
            key = (dist.group.WORLD, tuple(self.ranks))
            if key not in _GROUPS:
                _GROUPS[key] = dist.new_group(
                    self.ranks, backend="gloo", timeout=datetime.timedelta(days=1), group_desc="tedfx_checks"
                )
            self._group = _GROUPS[key]
            self._order = dist.get_process_group_ranks(self._group)

    def exchange(self, numbers: Sequence[int], what: str) -> dict[int, list[int]]:
        """{rank: its numbers}, or a line that names who did not come to `what` in time."""
        mine = torch.tensor(numbers, dtype=torch.int64)
        if self.alone:
            return {rank: list(numbers) for rank in self.ranks}
        self._calls += 1
        every = [torch.empty_like(mine) for _ in self._order]
        work = dist.all_gather(every, mine, group=self._group, async_op=True)
        self._wait(work, what)
        return {rank: values.tolist() for rank, values in zip(self._order, every)}

    def texts(self, text: str, what: str) -> dict[int, str]:
        """{rank: its text}, cut to a fixed size."""
        data = text.encode()[:4096].ljust(4096, b"\0")
        numbers = torch.frombuffer(bytearray(data), dtype=torch.int64).tolist()
        found = self.exchange(numbers, what)
        return {r: torch.tensor(v).numpy().tobytes().rstrip(b"\0").decode(errors="ignore") for r, v in found.items()}

    def agree(self, text: str, what: str, remedy: str) -> None:
        """Every rank passes the same text, or a line says who passed what."""
        numbers = self.exchange([fingerprint(text)], what)
        if len({tuple(n) for n in numbers.values()}) > 1:
            raise RanksDisagree(f"{what} differs between ranks: {_by_value(self.texts(text, what))}. {remedy}")

    def _wait(self, work: dist.Work, what: str) -> None:
        start = time.monotonic()
        try:
            if _done(work, min(MOMENT, self.timeout)):
                return
            store, key = _torch.default_store(), f"tedfx/waiting/{self.ranks[0]}/{self._calls}"
            store.set(f"{key}/{dist.get_rank()}", "1")
            if _done(work, self.timeout - (time.monotonic() - start)):
                return
            missing = [rank for rank in self._order if not store.check([f"{key}/{rank}"])]
        except RuntimeError as error:
            raise RanksDisagree(f"{what}: a rank ended while this one waited for it ({_line(error)}); see that rank's output") from error
        waited = time.monotonic() - start
        raise RanksDisagree(
            f"{what}: {_ranks(missing)} did not come within {waited:.0f} s while {_ranks(sorted(set(self._order) - set(missing)))} "
            f"waited; every rank of the mesh must make the same calls in the same order (timeout: check_timeout={self.timeout:g})"
        )


class CallCheck:
    """Before any collective of a forward: all ranks made the same call, with the data that belongs to their coordinate."""

    def __init__(self, meeting: Meeting, batch_axes: Sequence[str]):
        self.meeting = meeting
        mesh = meeting.mesh
        batch = [mesh.mesh_dim_names.index(axis) for axis in batch_axes]
        self._coordinate = {}
        for place in torch.cartesian_prod(*(torch.arange(n) for n in mesh.mesh.shape)).reshape(-1, mesh.mesh.dim()).tolist():
            self._coordinate[int(mesh.mesh[tuple(place)])] = tuple(place[dim] for dim in batch)

    def __call__(self, signature: str, tensors: Mapping[str, Tensor]) -> None:
        if self.meeting.alone:
            return
        call = signature + " with " + ", ".join(f"{key} {_kind(t)}{list(t.shape)}" for key, t in tensors.items())
        scalars, data = checksums(tensors)
        found = self.meeting.exchange([fingerprint(call), scalars, data], "forward")
        if len({numbers[0] for numbers in found.values()}) > 1:
            texts = self.meeting.texts(call, "forward")
            raise RanksDisagree(
                f"forward was called differently: {_by_value(texts)}. Give every rank the same arguments, the same shapes "
                "(pad, or drop the last batch) and the same train() or eval() mode"
            )
        if len({numbers[1] for numbers in found.values()}) > 1:
            texts = self.meeting.texts(", ".join(f"{k}={t.item()}" for k, t in tensors.items() if t.dim() == 0), "forward")
            raise RanksDisagree(f"scalar inputs differ between ranks: {_by_value(texts)}. They are global values: reduce them first")
        rows: dict[tuple, dict[int, int]] = {}
        for rank, numbers in found.items():
            rows.setdefault(self._coordinate[rank], {})[rank] = numbers[2]
        wrong = [sorted(row) for row in rows.values() if len(set(row.values())) > 1]
        if wrong:
            raise RanksDisagree(
                f"{_ranks(wrong[0])} have the same batch coordinate but were given different data; "
                "shard the data by pm.batch_coordinate (index, count), not by the rank"
            )


def checksums(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """(of the scalars, of the rest): order-sensitive sums of the bits, one host copy. No protection against intent."""
    sums = [[], []]
    for tensor in tensors.values():
        bits = _bits(tensor.detach())
        step = -(-bits.numel() // CHECKSUM_ELEMENTS) or 1
        bits = bits[::step].to(torch.int64)
        weights = torch.arange(bits.numel(), device=bits.device) * 0x9E3779B1 + 0x85EBCA6B
        sums[tensor.dim() > 0].append((bits * weights).sum())
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    zero = torch.zeros((), dtype=torch.int64, device=device)
    totals = [sum((s * (2 * i + 3) for i, s in enumerate(part)), zero) for part in sums]
    scalars, data = torch.stack(totals).tolist()
    return scalars, data


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    if not has_gradient(flat.dtype):
        return flat
    flat = as_real(flat).reshape(-1)
    return flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])


def lost_rank(error: BaseException) -> str | None:
    """The line for the error of a collective whose partner ended or did not come; None for any other error."""
    if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
        return f"a rank ended, or did not come in time, while this one waited for it in a collective ({_line(error)}); see that rank's output"
    return None


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


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
