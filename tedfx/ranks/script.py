"""`tedfx.run(main)`: a user's script, whose failure is one line of one rank.

Each rank that fails says in the job's store why: by its own error, because another rank told it, or because
it lost another rank in a collective. They wait a moment for each other; of those with the same cause the
lowest rank speaks, and who only lost somebody is silent where a cause is known. A refusal of tedfx is its
line, any other error its traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from tedfx import _torch
from tedfx.errors import TedfxError
from tedfx.ranks.failures import RankFailed, failure_line, leave_note, lost_rank, note_of

__all__ = ["run"]

Result = TypeVar("Result")
# How long ranks that fail wait for each other's causes, in seconds.
MOMENT = 2.0
OWN, TOLD, LOST = "own", "told", "lost"


def run(main: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """`main(*args, **kwargs)`, then the process group ends. An error becomes one line on stderr, of one rank,
    and exit status 1; no traceback per rank.

    The lowest rank that found the mistake prints its line, with the ranks that found it where those are not
    all. Errors that are not tedfx's have a traceback; TEDFX_TRACEBACK=1 prints that of every rank. A rank
    that fails ends at once, without the handlers of `atexit`: what is under way with ranks that are gone
    cannot be waited for.
    """
    try:
        result = main(*args, **kwargs)
    except Exception as error:  # said, and the process ends
        _end(error)
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


def _end(error: Exception) -> NoReturn:
    if threading.current_thread() is threading.main_thread():
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # torchrun ends all ranks when one has ended; the line takes a moment
    together = dist.is_initialized() and dist.get_world_size() > 1 and dist.get_backend() != "fake"
    text = "".join(traceback.format_exception(error))
    words = _together(error) if together else failure_line(error)
    if os.environ.get("TEDFX_TRACEBACK") == "1":
        print(text, file=sys.stderr, flush=True)
    if words is not None:
        if not isinstance(error, TedfxError) and (not together or lost_rank(error) is None):
            words = f"{text}{words}"
        print(words, file=sys.stderr, flush=True)
    sys.stdout.flush()
    if together:
        time.sleep(
            MOMENT / 4 if words is not None else MOMENT
        )  # who has the line prints it before torchrun ends all of them
        os._exit(1)
    raise SystemExit(1) from None


def _cause(error: Exception) -> tuple[str, str]:
    """(how this rank knows, what the cause is)."""
    if isinstance(error, RankFailed):
        return TOLD, str(error).partition(": ")[2]
    lost = lost_rank(error)
    if lost is None:
        return OWN, failure_line(error)
    told = note_of(range(dist.get_world_size()))
    return (TOLD, told.partition(": ")[2]) if told else (LOST, lost)


def _together(error: Exception) -> str | None:
    """This rank's words; None where another one says them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if lost_rank(error) is None and not isinstance(error, RankFailed):
        leave_note(error)
    try:
        store = _torch.default_store()
        store.set(f"tedfx/ended/{rank}", "\n".join(_cause(error)))
        found, until = {}, time.monotonic() + MOMENT
        while len(found) < world and time.monotonic() < until:
            time.sleep(0.05)
            for other in set(range(world)) - found.keys():
                if store.check([f"tedfx/ended/{other}"]):
                    found[other] = store.get(f"tedfx/ended/{other}").decode(errors="replace").split("\n", 1)
    except RuntimeError:  # the store is gone with the rank that held it
        found = {rank: _cause(error)}
    how, mine = found[rank]
    if how == LOST:
        if any(kind != LOST for kind, _ in found.values()) or rank != min(found):
            return None
        silent = [str(other) for other in range(world) if other not in found]
        return mine + (f" (no word from rank{'s' * (len(silent) > 1)} {', '.join(silent)})" if silent else "")
    same = sorted(other for other, (kind, cause) in found.items() if kind != LOST and cause == mine)
    if rank != same[0]:
        return None
    own = [str(other) for other in same if found[other][0] == OWN]
    if not own:
        return failure_line(error)
    return mine if len(own) == world else f"rank{'s' * (len(own) > 1)} {', '.join(own)}: {mine}"
