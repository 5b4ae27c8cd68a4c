"""Optimizers whose states are sharded and whose step takes a bounded amount of extra memory: see `tedfx.optim.ShardedOptimizer`."""

from tedfx.optim.optimizer import TILE, ShardedOptimizer
from tedfx.optim.scaling import LossScale

__all__ = ["TILE", "LossScale", "ShardedOptimizer"]
