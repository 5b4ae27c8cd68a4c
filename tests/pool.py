"""A pool of gloo rank processes that every test of this repository can share.

Starting eight interpreters and importing torch costs seconds; the ranks of a pool are forked once from a
server that has torch loaded and stay for the whole test session. A test hands `pool.run(fn, *args)` a
top-level function: it runs on every rank inside one default gloo group, and the results come back as a list
by rank.

An exception on any rank is raised in the test with that rank's traceback. Its siblings may hang in a
collective, so the pool is killed and the next `run` starts a fresh one; the same happens when a call exceeds
its timeout.

Inside a rank, `context(shape, names, groups)` gives the `RankContext` of a mesh of that shape, made once per
pool.
"""

import atexit
import datetime
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest

DEFAULT_TIMEOUT = float(os.environ.get("TEDFX_TEST_TIMEOUT", 120))
# After one rank failed, how long the others may take to finish before they are killed.
GRACE = 1.0
# Imported once, before the ranks are forked. torch._dynamo is what the first custom op imports by itself.
PRELOAD = [
    "torch",
    "torch.distributed.tensor",
    "torch._dynamo",
    "tedfx.ops.moe",
    "transformers.models.mixtral.modeling_mixtral",
    "tests.pool",
]

_start = multiprocessing.get_context("forkserver")


def forkserver():
    """The context whose processes are forked from the server that has torch loaded."""
    _start.set_forkserver_preload(PRELOAD)
    return _start


class RankError(AssertionError):
    """A function failed on a rank; the text holds the rank's traceback."""


class RankPool:
    """`world` processes joined in one gloo group. Started at the first `run`, closed by `close`."""

    def __init__(self, world: int):
        self.world = world
        self._ranks: list[tuple[Any, Any]] = []
        self._store: str | None = None  # the file in which they met

    def run(self, fn: Callable, *args, timeout: float = DEFAULT_TIMEOUT) -> list:
        """Call fn(*args) on every rank; the list of what the ranks return.

        fn is importable by name. Arguments and results are pickled by value. Raises RankError with the first
        failing rank's traceback, or TimeoutError when some rank is not done after `timeout` seconds.
        """
        if not self._ranks:
            self._launch()
        job = pickle.dumps((sys.path, fn.__module__, fn.__qualname__, args))
        for process, pipe in self._ranks:
            pipe.send_bytes(job)
        answers, failed = {}, None
        deadline = time.monotonic() + timeout
        while len(answers) < self.world and time.monotonic() < deadline:
            for rank, answer in self._poll(set(range(self.world)) - set(answers), deadline):
                answers[rank] = answer
                if not answer[0] and failed is None:
                    failed, deadline = rank, min(deadline, time.monotonic() + GRACE)
        if failed is not None:
            self.close()
            # A rank whose neighbour died reports a broken connection: the first to fail has the cause.
            raise RankError(
                f"rank {failed} of {self.world} failed in {fn.__qualname__}\n{answers[failed][1]}"
            )
        if len(answers) < self.world:
            missing = sorted(set(range(self.world)) - set(answers))
            self.close()
            raise TimeoutError(
                f"ranks {missing} of {self.world} not done with {fn.__qualname__} after {timeout} s"
            )
        return [pickle.loads(answers[rank][1]) for rank in range(self.world)]

    def close(self) -> None:
        """Kill the ranks. The next `run` starts new ones."""
        for process, pipe in self._ranks:
            pipe.close()
            process.kill()
        for process, _ in self._ranks:
            process.join()
        self._ranks = []
        if self._store is not None:
            Path(self._store).unlink(missing_ok=True)

    def _launch(self) -> None:
        store = self._store = tempfile.mktemp(prefix="tedfx_pool_")
        for rank in range(self.world):
            mine, theirs = forkserver().Pipe()
            process = forkserver().Process(target=_serve, args=(rank, self.world, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, mine))

    def _poll(self, ranks: set[int], deadline: float):
        pipes = {self._ranks[rank][1]: rank for rank in ranks}
        for pipe in wait(list(pipes), timeout=max(0.0, deadline - time.monotonic())):
            try:
                yield pipes[pipe], pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionError):
                yield pipes[pipe], (False, "the process died without a word")


_POOLS: dict[int, RankPool] = {}


def pool(world: int) -> RankPool:
    """The session's pool of that many ranks."""
    if world not in _POOLS:
        if not _POOLS:
            atexit.register(close_all)
        _POOLS[world] = RankPool(world)
    return _POOLS[world]


def close_all() -> None:
    for each in _POOLS.values():
        each.close()


@pytest.fixture(scope="session")
def ranks():
    """`ranks(world)` is the session's pool of `world` ranks."""
    yield pool
    close_all()


# ---- inside a rank -----------------------------------------------------------------------------------------


def _serve(rank: int, world: int, store: str, pipe) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    _share_one_device()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=600),
    )
    while True:
        try:
            path, module, name, args = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionError):
            os._exit(0)  # the test session is over; a group with lost peers is not worth tearing down
        sys.path[:] = path
        try:
            __import__(module)
            fn = sys.modules[module]
            for part in name.split("."):
                fn = getattr(fn, part)
            answer = (True, pickle.dumps(fn(*args)))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))


def _share_one_device() -> None:
    """All gloo groups of this rank on one device of gloo.

    Each device has a thread that wakes a hundred times a second, used or not, and by default each group makes
    a device: the ranks of a long session, with their hundreds of groups, would keep a core busy by waiting.
    """
    import torch.distributed.distributed_c10d as c10d

    device = c10d.ProcessGroupGloo.create_default_device()

    class OnOneDevice(c10d.ProcessGroupGloo):
        def __init__(self, store, rank, size, timeout=None):
            options = super()._Options()
            options._devices, options._threads = [device], 2
            if timeout is not None:
                options._timeout = timeout
            super().__init__(store, rank, size, options)

    c10d.ProcessGroupGloo = OnOneDevice


_CONTEXTS: dict[tuple, Any] = {}


def context(shape: tuple[int, ...], names: tuple[str, ...], groups: tuple[tuple[str, ...], ...] = ()):
    """The RankContext of a CPU mesh of this shape, cached per rank, with these groups. Collective like its
    parts."""
    from torch.distributed.device_mesh import init_device_mesh

    from tedfx.ops.context import RankContext

    key = (tuple(shape), tuple(names))
    if key not in _CONTEXTS:
        _CONTEXTS[key] = RankContext(init_device_mesh("cpu", key[0], mesh_dim_names=key[1]))
    _CONTEXTS[key].ensure_groups(groups)
    return _CONTEXTS[key]
