"""tedfx: a compiler over torch.fx for hybrid tensor x expert x data parallel mixture-of-experts training."""

from tedfx import optim
from tedfx._version import __version__
from tedfx.api import parallelize
from tedfx.compiler import default_passes
from tedfx.errors import (
    CallError,
    CaptureError,
    ConfigError,
    ContractError,
    TedfxError,
    TraceError,
    TypeCheckError,
)
from tedfx.options import Options
from tedfx.ranks.script import run
from tedfx.saving.checkpointer import Checkpointer
from tedfx.saving.folder import CheckpointError
from tedfx.verification.verify import verify

__all__ = [
    "CallError",
    "CaptureError",
    "CheckpointError",
    "Checkpointer",
    "ConfigError",
    "ContractError",
    "Options",
    "TedfxError",
    "TraceError",
    "TypeCheckError",
    "__version__",
    "default_passes",
    "optim",
    "parallelize",
    "run",
    "verify",
]
