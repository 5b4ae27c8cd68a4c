"""Local processes for a verification: the single device and the ranks, each with a pipe home and never a
hang.

`run` starts one process per job and returns the results in order, or raises `RankFailure` with one line that
names the rank: the first to fail has the cause, those that fail after it because of it are not asked. Nobody
is waited for longer than `timeout`.

Forked processes share what the parent made (a trace, a compiled graph) and cost nothing to start; they need a
parent that never ran backward and whose other threads, if any, hold no locks. Spawned ones import everything
anew; CUDA needs them.
"""

from __future__ import annotations

import datetime
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tedfx.errors import TedfxError
from tedfx.ranks.failures import RankFailed, RanksDisagree

# After one process failed, how long the others may take to say why as well.
GRACE = 2.0


class RankFailure(TedfxError):
    """A process of a verification failed. `trace` is its traceback, `kind` the class of its error."""

    def __init__(self, line: str, trace: str = "", kind: str = ""):
        super().__init__(line)
        self.trace, self.kind = trace, kind

    def __reduce__(self):
        return RankFailure, (str(self), self.trace, self.kind)


@dataclass(frozen=True)
class Job:
    name: str  # "rank 3", for messages
    function: Callable
    arguments: tuple = ()


@dataclass(frozen=True)
class Rank:
    """What `in_group` needs to make a process a rank of a group that meets in the file `store`."""

    index: int
    world: int
    device: str
    backend: str
    store: str
    timeout: float


def jobs(
    function: Callable,
    arguments: tuple,
    world: int,
    device: str,
    backend: str,
    timeout: float,
    name: str = "rank {}",
) -> list[Job]:
    """One job per rank of a new group: `function(rank, *arguments)`. `name`: of a rank, by its number."""
    store = tempfile.mktemp(prefix="tedfx_verify_")
    return [
        Job(name.format(i), in_group, (Rank(i, world, device, backend, store, timeout), function, arguments))
        for i in range(world)
    ]


def in_group(rank: Rank, function: Callable, arguments: tuple):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    # A norm is one number, summed over each mesh axis in turn; every rank would remark that one sum could do.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    if rank.device == "cuda":
        torch.cuda.set_device(rank.index % torch.cuda.device_count())
    dist.init_process_group(
        rank.backend,
        init_method=f"file://{rank.store}",
        rank=rank.index,
        world_size=rank.world,
        timeout=datetime.timedelta(seconds=rank.timeout),
    )
    return function(rank, *arguments)


def run(work: Sequence[Job], fork: bool, timeout: float) -> list[Any]:
    """The results of all jobs, each in a process of its own."""
    context = multiprocessing.get_context("fork") if fork else multiprocessing.get_context("spawn")
    started: dict[Connection, tuple[int, BaseProcess]] = {}
    sys.stdout.flush()
    sys.stderr.flush()
    before = _out_of_memory()
    try:
        for index, job in enumerate(work):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_serve, args=(theirs, job.function, job.arguments), daemon=True, name=job.name
            )
            process.start()
            theirs.close()
            started[mine] = (index, process)
        return _collect(work, started, timeout, before)
    finally:
        for pipe, (_, process) in started.items():
            process.kill()
        for pipe, (_, process) in started.items():
            process.join()
            pipe.close()
        for store in {
            job.arguments[0].store for job in work if job.arguments and isinstance(job.arguments[0], Rank)
        }:
            Path(store).unlink(missing_ok=True)  # ranks that are killed leave it


def _collect(
    work: Sequence[Job],
    started: Mapping[Connection, tuple[int, BaseProcess]],
    timeout: float,
    before: int | None,
) -> list[Any]:
    """before: `_out_of_memory` when they were started."""
    results: dict[int, Any] = {}
    failed: list[tuple[int, Any]] = []
    deadline = time.monotonic() + timeout
    while len(results) + len(failed) < len(work):
        ready = wait(
            [p for p, (i, _) in started.items() if i not in results and i not in dict(failed)],
            max(0.0, deadline - time.monotonic()),
        )
        for pipe in ready:
            assert isinstance(pipe, Connection)  # of those that were given
            index, process = started[pipe]
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionError):
                process.join(1)
                ok, value = False, (None, _death(process.exitcode, before, _out_of_memory()), "")
            if ok:
                results[index] = value
            else:
                failed.append((index, value))
                deadline = min(deadline, time.monotonic() + GRACE)
        if not ready and time.monotonic() >= deadline:
            break
    if failed:
        index, (kind, line, trace) = min(failed, key=lambda f: _consequence(f[1]))
        raise RankFailure(f"{work[index].name}: {line}", trace, kind)
    if len(results) < len(work):
        late = ", ".join(work[i].name for i in range(len(work)) if i not in results)
        raise RankFailure(f"{late}: not done after {timeout:g} s (timeout={timeout:g})", "", "TimeoutError")
    return [results[i] for i in range(len(work))]


def _consequence(failure) -> int:
    """0 for an error of its own, 1 for a rank that only noticed that another one was gone. Ties: the first to
    report."""
    kind, line, _ = failure
    words = (
        "connection closed",
        "connection reset",
        "a rank ended while",
        "did not come within",
        "broken pipe",
        "timed out",
    )
    if kind == RankFailed.__name__:
        return 1
    return int(
        kind in (None, RanksDisagree.__name__, "RuntimeError", "DistBackendError")
        and any(w in line.lower() for w in words)
    )


def _out_of_memory() -> int | None:
    """How many processes this kernel has ended for want of memory; None where it does not say."""
    try:
        counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    except OSError:
        return None
    return int(counts["oom_kill"]) if "oom_kill" in counts else None


def _death(code: int | None, before: int | None, now: int | None) -> str:
    """before, now: `_out_of_memory`. A process that ran too long is ended only after this was asked, so
    SIGKILL is never `run`'s own."""
    if code is None or code >= 0:
        return f"ended without a word (exit status {code})"
    hint = ""
    if -code == signal.SIGKILL:
        hint = "; out of memory?"
        if before is not None and now is not None:
            hint = ": the kernel was out of memory" if now > before else ": not for want of memory"
    return f"died of {signal.Signals(-code).name}{hint}"


def _serve(pipe, function, arguments) -> None:
    torch.set_num_threads(1)
    try:
        answer = (True, function(*arguments))
        data = pickle.dumps(answer)
    except BaseException as error:  # told to the parent
        text = " ".join(str(error).split())
        line = text if isinstance(error, TedfxError) else f"{type(error).__name__}: {text[:300]}"
        data = pickle.dumps(
            (False, (type(error).__name__, line or type(error).__name__, traceback.format_exc()))
        )
    pipe.send_bytes(data)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a group whose peers may be gone is not worth tearing down


def can_fork() -> bool:
    """Whether autograd runs in a fork of this process: it does not once this process itself ran backward."""
    if "fork" not in multiprocessing.get_all_start_methods() or (
        torch.cuda.is_available() and torch.cuda.is_initialized()
    ):
        return False
    try:
        return run([Job("a forked process", _backward)], fork=True, timeout=30.0) == [True]
    except RankFailure:
        return False


def _backward() -> bool:
    x = torch.ones(4, requires_grad=True)
    (x * x).sum().backward()
    return x.grad is not None
