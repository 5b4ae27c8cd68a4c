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


class Bases(NamedTuple):
    """A tensor of each kind, of one of the entries: a launch has their dtypes, and addresses are counted
    from theirs, so that the compiler knows how they are aligned. low: None where the weights are the
    parameters."""

    weight: Tensor
    grad: Tensor
    moments: Tensor
    low: Tensor | None


@triton.jit
def _tedfx_adam(
    table,
    owner,
    first_block,
    weights,
    grads,
    moments,
    lows,
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
    HAS_LOW: tl.constexpr,
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
    weight, grad, first = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    second, low = tl.load(entry + 3), tl.load(entry + 4)
    size = tl.load(entry + 6)
    if ALIGNED:  # else an access is as wide as an element
        size = tl.multiple_of(size, 16)
        weight, grad, first = tl.multiple_of(weight, 16), tl.multiple_of(grad, 16), tl.multiple_of(first, 16)
        second, low = tl.multiple_of(second, 16), tl.multiple_of(low, 16)
    t = tl.load(tl.load(entry + 5).to(tl.pointer_type(tl.float32))).to(tl.float64)
    first_correction = (1 - tl.exp(t * log1)).to(tl.float32)  # 1 - beta1**t
    root = tl.sqrt(1 - tl.exp(t * log2)).to(tl.float32)
    begin = (tl.program_id(0) - tl.load(first_block + mine)).to(tl.int64) * (PARTS * BLOCK)
    for part in tl.static_range(PARTS):
        at = begin + part * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        g = tl.load(grads + (grad + at), mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weights + (weight + at), mask=inside, other=0.0).to(tl.float32)
        m = tl.load(moments + (first + at), mask=inside, other=0.0).to(tl.float32)
        v = tl.load(moments + (second + at), mask=inside, other=0.0).to(tl.float32)
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
        tl.store(weights + (weight + at), w.to(weights.dtype.element_ty), mask=inside)
        tl.store(moments + (first + at), m.to(moments.dtype.element_ty), mask=inside)
        tl.store(moments + (second + at), v.to(moments.dtype.element_ty), mask=inside)
        if HAS_LOW:
            tl.store(lows + (low + at), w.to(lows.dtype.element_ty), mask=inside)


@functools.lru_cache(maxsize=64)
def _blocks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The entry of each program, int64, and the first program of each entry, int64."""
    counts = torch.tensor([triton.cdiv(size, CHUNK) for size in sizes])
    owner = torch.arange(len(sizes)).repeat_interleave(counts)
    return owner.to(device), (counts.cumsum(0) - counts).to(device)


def update(
    entries: list[Entry],
    bases: Bases,
    factor: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
) -> None:
    """One step of all entries, in place. factor: 0-dim, what the gradients are multiplied by."""
    weight, grad, moments, low = bases
    columns = (weight, grad, moments, moments, weight if low is None else low)
    rows = [
        (
            *(0 if at == 0 else (at - x.data_ptr()) // x.element_size() for at, x in zip(entry, columns)),
            entry.step,
            entry.size,
        )
        for entry in entries
        if entry.size
    ]
    wide = [all(number % 16 == 0 for number in (*row[:5], row[6])) for row in rows]
    for aligned in (True, False):
        table = [row for row, is_wide in zip(rows, wide) if is_wide == aligned]
        if not table:
            continue
        owner, first_block = _blocks(tuple(row[6] for row in table), weight.device)
        numbers = torch.tensor(table, dtype=torch.int64).to(weight.device, non_blocking=True)
        _tedfx_adam[(owner.numel(),)](
            numbers,
            owner,
            first_block,
            weight,
            grad,
            moments,
            weight if low is None else low,
            numbers if factor is None else factor,
            float(lr),
            betas[0],
            1 - betas[0],  # in float64: of 0.999, float32 would leave four digits
            math.log(betas[0]) if betas[0] else -math.inf,
            betas[1],
            1 - betas[1],
            math.log(betas[1]) if betas[1] else -math.inf,
            float(eps),
            float(weight_decay),
            HAS_LOW=low is not None,
            HAS_FACTOR=factor is not None,
            DECOUPLED=decoupled,
            MAXIMIZE=maximize,
            ALIGNED=aligned,
            COLUMNS=COLUMNS,
            PARTS=CHUNK // BLOCK,
            BLOCK=BLOCK,
            num_warps=8,
        )
