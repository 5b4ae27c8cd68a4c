"""examples/pretrain.py, whose rank 1 gets the signal KILL_WITH (SIGKILL) at its KILL_AT-th step, once:
`torchrun --max-restarts 1 .. -m tests.module.killed_pretrain ..`"""

import importlib.util
import os
import signal
import sys
from pathlib import Path

import tedfx

spec = importlib.util.spec_from_file_location(
    "pretrain", Path(__file__).parents[2] / "examples" / "pretrain.py"
)
pretrain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pretrain)
corpus, windows, drawn = pretrain.read_corpus, pretrain.windows, []


def killing_windows(text, starts, length, device):
    drawn.append(1)
    if (
        len(drawn) == int(os.environ["KILL_AT"])
        and os.environ["RANK"] == "1"
        and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    ):
        os.kill(os.getpid(), signal.Signals[os.environ.get("KILL_WITH", "SIGKILL")])
    return windows(text, starts, length, device)


pretrain.windows = killing_windows
pretrain.read_corpus = lambda seed: tuple(text[:200_000] for text in corpus(seed))
tedfx.run(pretrain.main, pretrain.parse_args(sys.argv[1:]))
