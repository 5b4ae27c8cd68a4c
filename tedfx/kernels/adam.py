"""Adam and AdamW in one pass over memory: the gradient as backward left it, clipped while it is read; weights
and moments; and, where there are masters, the parameter in fewer bytes.

The update is torch's (torch.optim.AdamW and Adam without amsgrad), computed in float32 registers: per element
of a bfloat16 parameter with float32 masters 28 bytes move, where a cast, a product, torch's fused step and a
cast back move 48; of one that is its own master 14, where a product before the step makes it 18.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _tedfx_adam(
    weight,
    grad,
    first,
    second,
    low,
    factor,
    step,
    lr,
    beta1,
    rest1,
    log1,
    beta2,
    rest2,
    log2,
    eps,
    decay,
    size,
    HAS_FACTOR: tl.constexpr,
    HAS_LOW: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
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
    t = tl.load(step).to(tl.float64)
    first_correction = (1 - tl.exp(t * log1)).to(tl.float32)  # 1 - beta1**t
    root = tl.sqrt(1 - tl.exp(t * log2)).to(tl.float32)
    w -= lr / first_correction * m / (tl.sqrt(v) / root + eps)
    tl.store(weight + at, w.to(weight.dtype.element_ty), mask=inside)
    tl.store(first + at, m.to(first.dtype.element_ty), mask=inside)
    tl.store(second + at, v.to(second.dtype.element_ty), mask=inside)
    if HAS_LOW:
        tl.store(low + at, w.to(low.dtype.element_ty), mask=inside)


def update(
    weight: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    low: Tensor | None,
    factor: Tensor | None,
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
) -> None:
    """One step of flat, contiguous tensors [size], in place.

    low: the parameter, where `weight` is its master; factor: 0-dim, what the gradient is multiplied by; step:
    0-dim, how many are done, this one included."""
    size = weight.numel()
    if size == 0:
        return
    _tedfx_adam[(triton.cdiv(size, BLOCK),)](
        weight,
        grad,
        first,
        second,
        weight if low is None else low,
        weight if factor is None else factor,
        step,
        float(lr),
        betas[0],
        1 - betas[0],  # in float64: of 0.999, float32 would leave four digits
        math.log(betas[0]) if betas[0] else -math.inf,
        betas[1],
        1 - betas[1],
        math.log(betas[1]) if betas[1] else -math.inf,
        float(eps),
        float(weight_decay),
        size,
        HAS_FACTOR=factor is not None,
        HAS_LOW=low is not None,
        DECOUPLED=decoupled,
        MAXIMIZE=maximize,
        BLOCK=BLOCK,
        num_warps=8,
    )
