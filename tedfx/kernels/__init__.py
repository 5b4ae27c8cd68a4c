"""Triton kernels for CUDA, each beside a plain form elsewhere that computes the same on any device.

A kernel reads and writes every row once, in the rows' dtype, and sums in float32 registers, in a fixed order
and without atomics: results are bitwise the same from run to run. Float64, other devices and a torch without
Triton take the plain form. The modules in here import triton, so they are imported where a kernel is called.
"""

import functools
import importlib.util

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def takes(*tensors: Tensor) -> bool:
    """Whether kernels work on these: on a CUDA device, in a dtype that float32 sums are good for."""
    return all(x.is_cuda and x.dtype in DTYPES for x in tensors) and _has_triton()
