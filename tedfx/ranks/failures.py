"""A rank that fails alone: the others raise its line.

Where the ranks are about to meet on the CPU anyway (`tedfx/ranks/meeting.py`), the one that cannot go on
takes part with its line in hand. Where they wait for it elsewhere, in a collective of the graph, it leaves a
note in the job's store: who then loses it, or waits in vain, finds the note.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch.distributed as dist

from tedfx import _torch
from tedfx.errors import TedfxError

__all__ = [
    "RankFailed",
    "RanksDisagree",
    "clear_note",
    "failure_line",
    "leave_note",
    "lost_rank",
    "note_of",
    "noting",
]

_left = False


class RanksDisagree(TedfxError):
    """The ranks of one call were not called alike."""


class RankFailed(RanksDisagree):
    """Another rank failed; the text is that rank's line."""


def failure_line(error: BaseException) -> str:
    """An error in one line: a refusal's text; the class and text of any other error."""
    text = " ".join(str(error).split())
    return (
        text
        if isinstance(error, TedfxError) and text
        else f"{type(error).__name__}: {text[:300]}".rstrip(": ")
    )


def lost_rank(error: BaseException) -> str | None:
    """The line for the error of a collective whose partner ended or did not come; None for any other
    error."""
    if isinstance(error, RanksDisagree):
        return None
    if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
        return (
            "a rank ended, or did not come in time, while this one waited for it in a collective "
            f"({first_line(error)}); see that rank's output"
        )
    return None


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def leave_note(error: BaseException) -> None:
    """Say in the job's store why this rank cannot go on."""
    global _left
    with contextlib.suppress(
        RuntimeError
    ):  # the store may be gone with the rank that held it; the error itself is raised anyhow
        _torch.default_store().set(_key(dist.get_rank()), failure_line(error))
        _left = True


def clear_note() -> None:
    """This rank goes on after all: somebody caught its error."""
    global _left
    if _left:
        _torch.default_store().delete_key(_key(dist.get_rank()))
        _left = False


def note_of(ranks: Iterable[int]) -> str | None:
    """`rank 3: <its line>` of the first of these ranks that left a note."""
    with contextlib.suppress(RuntimeError):  # as above: then there is nothing to be read
        store = _torch.default_store()
        for rank in ranks:
            if store.check([_key(rank)]):
                return f"rank {rank}: {store.get(_key(rank)).decode(errors='replace')}"
    return None


@contextlib.contextmanager
def noting(ranks: Iterable[int]) -> Iterator[None]:
    """What fails inside is noted for the other ranks; what fails because one of them did is raised as that
    one's line."""
    try:
        yield
    except Exception as error:
        if lost_rank(error) is None:
            if not isinstance(error, RanksDisagree):
                leave_note(error)
            raise
        told = note_of(ranks)
        raise (RankFailed(told) if told else RanksDisagree(lost_rank(error))) from error


def _key(rank: int) -> str:
    return f"tedfx/failed/{rank}"
