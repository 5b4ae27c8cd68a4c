"""A process that makes and traces models once, and forks single devices and ranks that share what it made.

pytest's own process runs backward in other tests, after which autograd may not work in its forks. The nursery
runs one that starts no thread (see `_serve`). It is forked from the server that has the libraries loaded
(tests/pool.py), keeps models, traces and compiled graphs, and every case forks from it in milliseconds.

`nursery().call(fn, *args)` runs a top-level function there; an exception comes back with its traceback as a
note. One that exceeds its timeout is killed with all its ranks, and the next call starts afresh.
"""

import atexit
import os
import pickle
import signal
import sys
import traceback

from tests.pool import forkserver

TIMEOUT = float(os.environ.get("TEDFX_TEST_TIMEOUT", 120)) * 3


class Nursery:
    def __init__(self):
        self._process = self._pipe = None

    def call(self, fn, *args, timeout: float = TIMEOUT):
        if self._process is None or not self._process.is_alive():
            self._start()
        self._pipe.send_bytes(pickle.dumps((sys.path, fn.__module__, fn.__qualname__, args)))
        if not self._pipe.poll(timeout):
            self.close()
            raise TimeoutError(f"{fn.__qualname__} not done after {timeout:g} s")
        try:
            ok, value, trace = pickle.loads(self._pipe.recv_bytes())
        except EOFError:
            self.close()
            raise RuntimeError(f"the nursery died in {fn.__qualname__}") from None
        if not ok:
            value.add_note(trace)
            raise value
        return value

    def _start(self) -> None:
        context = forkserver()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def close(self) -> None:
        """End the nursery and whatever it forked."""
        if self._process is not None and self._process.is_alive():
            try:
                os.killpg(self._process.pid, signal.SIGKILL)  # its own process group: see _serve
            except ProcessLookupError:
                self._process.kill()
            self._process.join()
        self._process = None


_NURSERY = Nursery()
atexit.register(_NURSERY.close)


def nursery() -> Nursery:
    return _NURSERY


def _serve(pipe) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is forked from here cannot start CUDA
    os.setpgid(0, 0)
    import warnings

    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    # Tracing a Function runs its backward. Autograd makes a thread per device at the first backward of a
    # process, and none of its forks can run one after that. There is no device here, but after the first fake
    # tensor a CUDA build counts one.
    torch.ones((), requires_grad=True).backward()
    while True:
        try:
            path, module, name, args = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionError):
            os._exit(0)
        sys.path[:] = path
        try:
            __import__(module)
            fn = sys.modules[module]
            for part in name.split("."):
                fn = getattr(fn, part)
            answer = pickle.dumps((True, fn(*args), ""))
        except BaseException as error:  # raised in the test
            trace = traceback.format_exc() + getattr(error, "trace", "")
            try:
                answer = pickle.dumps((False, error, trace))
                pickle.loads(answer)
            except Exception:
                answer = pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}"), trace))
        pipe.send_bytes(answer)
