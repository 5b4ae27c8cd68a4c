"""Adam and AdamW in one pass over memory, for many tensors in one launch: the gradient as backward left it,
clipped while it is read; weights and moments; and, where there are masters, the parameter in fewer bytes.

The update is torch's (torch.optim.AdamW and Adam without amsgrad), computed in float32 registers: per element
of a bfloat16 parameter with float32 masters 28 bytes move, where a cast, a product, torch's fused step and a
cast back move 48; of one that is its own master 14, where a product before the step makes it 18.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
CHUNK = 4 * BLOCK  # elements of a program
COLUMNS = 7


class Entry(NamedTuple):
    """One tensor of a launch, by addresses: of `size` elements each, next to each other. low: the parameter,
    where `weight` is its master, else 0; step: a float32, how many steps are done, this one included."""

    weight: int
    grad: int
    first: int
    second: int
    low: int
    step: int
    size: int


class Kind(NamedTuple):
    """The dtypes of a launch. low: None where the weights are the parameters."""

    weight: torch.dtype
    grad: torch.dtype
    moments: torch.dtype
    low: torch.dtype | None


@triton.jit
def _tedfx_adam(
    table,
    owner,
    first_block,
    factor,
    lr,
    beta1,
    rest1,
    log1,
    beta2,
    rest2,
    log2,
    eps,
    decay,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENTS: tl.constexpr,
    LOW: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    mine = tl.load(owner + tl.program_id(0))
    entry = table + mine * COLUMNS
    weight = tl.load(entry).to(tl.pointer_type(WEIGHT))
    grad = tl.load(entry + 1).to(tl.pointer_type(GRAD))
    first = tl.load(entry + 2).to(tl.pointer_type(MOMENTS))
    second = tl.load(entry + 3).to(tl.pointer_type(MOMENTS))
    if ALIGNED:  # else an access is as wide as an element
        weight, grad = tl.multiple_of(weight, 16), tl.multiple_of(grad, 16)
        first, second = tl.multiple_of(first, 16), tl.multiple_of(second, 16)
    t = tl.load(tl.load(entry + 5).to(tl.pointer_type(tl.float32))).to(tl.float64)
    size = tl.load(entry + 6)
    first_correction = (1 - tl.exp(t * log1)).to(tl.float32)  # 1 - beta1**t
    root = tl.sqrt(1 - tl.exp(t * log2)).to(tl.float32)
    begin = (tl.program_id(0) - tl.load(first_block + mine)).to(tl.int64) * (PARTS * BLOCK)
    for part in tl.static_range(PARTS):
        at = begin + part * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_FACTOR:
            g *= tl.load(factor)
        if MAXIMIZE:
            g = -g
        if DECOUPLED:
            w -= lr * decay * w
        else:
            g += decay * w
        m = beta1 * m + rest1 * g
        v = beta2 * v + rest2 * g * g
        w -= lr / first_correction * m / (tl.sqrt(v) / root + eps)
        tl.store(weight + at, w.to(WEIGHT), mask=inside)
        tl.store(first + at, m.to(MOMENTS), mask=inside)
        tl.store(second + at, v.to(MOMENTS), mask=inside)
        if LOW is not None:
            low = tl.load(entry + 4).to(tl.pointer_type(LOW))
            if ALIGNED:
                low = tl.multiple_of(low, 16)
            tl.store(low + at, w.to(LOW), mask=inside)


_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, None: None}


@functools.lru_cache(maxsize=64)
def _blocks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The entry of each program, int64, and the first program of each entry, int64."""
    counts = torch.tensor([triton.cdiv(size, CHUNK) for size in sizes])
    owner = torch.arange(len(sizes)).repeat_interleave(counts)
    return owner.to(device), (counts.cumsum(0) - counts).to(device)


def update(
    entries: list[Entry],
    kind: Kind,
    factor: Tensor | None,
    device: torch.device,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
) -> None:
    """One step of all entries, in place. factor: 0-dim, what the gradients are multiplied by."""
    entries = [entry for entry in entries if entry.size]
    if not entries:
        return
    owner, first_block = _blocks(tuple(entry.size for entry in entries), device)
    table = torch.tensor(entries, dtype=torch.int64).to(device, non_blocking=True)
    _tedfx_adam[(owner.numel(),)](
        table,
        owner,
        first_block,
        table if factor is None else factor,
        float(lr),
        betas[0],
        1 - betas[0],  # in float64: of 0.999, float32 would leave four digits
        math.log(betas[0]) if betas[0] else -math.inf,
        betas[1],
        1 - betas[1],
        math.log(betas[1]) if betas[1] else -math.inf,
        float(eps),
        float(weight_decay),
        WEIGHT=_TRITON[kind.weight],
        GRAD=_TRITON[kind.grad],
        MOMENTS=_TRITON[kind.moments],
        LOW=_TRITON[kind.low],
        HAS_FACTOR=factor is not None,
        DECOUPLED=decoupled,
        MAXIMIZE=maximize,
        ALIGNED=all(address % 16 == 0 for entry in entries for address in entry[:5]),
        COLUMNS=COLUMNS,
        PARTS=CHUNK // BLOCK,
        BLOCK=BLOCK,
        num_warps=8,
    )
