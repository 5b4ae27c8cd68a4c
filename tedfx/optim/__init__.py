"""Optimizers of a ParallelModule: sharded states and a step of bounded extra memory (`ShardedOptimizer`),
momentum that travels with one bit per element (`OneBitAdam`)."""

from tedfx.optim.onebit import OneBitAdam
from tedfx.optim.optimizer import TILE, ShardedOptimizer
from tedfx.optim.scaling import LossScale
from tedfx.optim.volume import Volume

__all__ = ["TILE", "LossScale", "OneBitAdam", "ShardedOptimizer", "Volume"]
