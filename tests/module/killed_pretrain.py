"""examples/pretrain.py in two lives, on each rank of a job that torchrun's agent may restart once.

Rank 1 is killed at the beginning of step `KILLED`, and after the restart gets SIGTERM at the beginning of
step `STOPPED`. What the log of the first life said is kept beside it, in first_life.jsonl."""

import importlib.util
import os
import shutil
import signal
import time
from pathlib import Path

import tedfx

SAVED, KILLED, STOPPED = 5, 8, 9


def main(arguments):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    spec = importlib.util.spec_from_file_location(
        "pretrain", Path(__file__).parents[2] / "examples" / "pretrain.py"
    )
    pretrain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pretrain)
    args = pretrain.parse_args(arguments)
    first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    texts, step = [], 0 if first_life else SAVED
    corpus, windows = pretrain.read_corpus, pretrain.windows

    def short_corpus(seed):
        texts[:] = [text[:200_000] for text in corpus(seed)]
        return tuple(texts)

    def watched_windows(text, starts, length, device):
        nonlocal step
        step += text is texts[0]  # not those of a validation
        if os.environ["RANK"] == "1" and text is texts[0]:
            if first_life and step == KILLED:
                _wait_for(args.checkpoint_dir / "latest")
                shutil.copy(args.out / "log.jsonl", args.out / "first_life.jsonl")
                os.kill(os.getpid(), signal.SIGKILL)
            if step == STOPPED:
                os.kill(os.getpid(), signal.SIGTERM)
        return windows(text, starts, length, device)

    pretrain.read_corpus, pretrain.windows = short_corpus, watched_windows
    tedfx.run(pretrain.main, args)


def _wait_for(path):
    """The checkpoint of step `SAVED` is written while training goes on."""
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
