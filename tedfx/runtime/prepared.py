"""Models that something else has made a distributed or a compiled one of: refused before anything is
traced."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from tedfx._torch import is_compiled
from tedfx.errors import ConfigError
from tedfx.runtime.mirror import Mirror


def refuse_prepared(model: nn.Module) -> None:
    """ConfigError for a model that is not a plain single-device one, in one line that says what to pass."""
    for name, module in model.named_modules():
        at = f"module {name}" if name else "the model"
        if isinstance(module, Mirror):
            raise ConfigError(
                f"{at} is a ParallelModule already | {at} | parallelize takes the single-device model; "
                "use the ParallelModule as it is"
            )
        if isinstance(module, (DataParallel, DistributedDataParallel)):
            raise ConfigError(
                f"{at} is in {type(module).__name__}, which sums gradients itself | {at} | pass its "
                ".module: parallelize does what it does, over the axis dp"
            )
        if isinstance(module, (FullyShardedDataParallel, FSDPModule)):
            raise ConfigError(
                f"{at} is sharded by FSDP | {at} | pass the model as it was before, with zero=3 for its "
                "memory"
            )
        if is_compiled(module):
            raise ConfigError(
                f"{at} is compiled by torch.compile | {at} | pass the module that was compiled "
                "(model._orig_mod), with compile=True"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ConfigError(
                f"{at} is a TorchScript module, whose Python is gone | {at} | pass the module that was "
                "scripted"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ConfigError(
                f"parameter {name} is a DTensor already | parameter {name} | parallelize takes the "
                "single-device model"
            )


__all__ = ["refuse_prepared"]
