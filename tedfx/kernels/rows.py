"""Rows of choices back to their tokens and the gradients of that, and zeros where no expert wrote.

`order[m]` is the choice n * K + k whose row stands at m, N * K where it is nobody's; `place` is its inverse:
where the row of a choice stands, or -1 where it has none.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 2048  # elements of a row that a program has in registers at a time


def _block(width: int) -> tuple[int, int]:
    """(elements at a time, warps) for rows of `width`."""
    block = min(triton.next_power_of_2(max(width, 1)), WIDTH)
    return block, max(1, min(8, block // 256))


@triton.jit
def _tedfx_places(order, place, count, total, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    choice = tl.load(order + row, mask=row < count, other=total)
    tl.store(place + choice, row, mask=choice < total)


def places(order: Tensor, total: int) -> Tensor:
    """order[M], of numbers below total, each at most once, or total -> place[total] int32."""
    place = torch.full((total,), -1, dtype=torch.int32, device=order.device)
    if order.numel():
        grid = (triton.cdiv(order.numel(), 1024),)
        _tedfx_places[grid](order, place, order.numel(), total, BLOCK=1024)
    return place


@triton.jit
def _tedfx_sum_choices(
    rows, place, weights, out, width, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        total = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(K):
            at = tl.load(place + token * K + k).to(tl.int64)
            stop = tl.where(at >= 0, width, 0)
            row = tl.load(rows + at * width + column, mask=column < stop, other=0.0).to(tl.float32)
            if WEIGHTED:
                weight = tl.load(weights + token * K + k).to(tl.float32)
                # A choice without a row adds nothing, whatever its weight is.
                row = tl.where(at >= 0, row * weight, 0.0)
            total += row
        tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=inside)


def sum_choices(
    rows: Tensor, order: Tensor, top_k: int, tokens: int, weights: Tensor | None, dtype
) -> Tensor:
    """rows[M,H], order[M], weights[N,K] or None for ones -> [N,H]: the sum over the choices of a token of
    weight times row."""
    width = rows.shape[1]
    out = torch.empty(tokens, width, dtype=dtype, device=rows.device)
    if out.numel():
        rows, place = rows.contiguous(), places(order, tokens * top_k)
        block, warps = _block(width)
        _tedfx_sum_choices[(tokens,)](
            rows,
            place,
            place if weights is None else weights.contiguous(),
            out,
            width,
            K=top_k,
            WEIGHTED=weights is not None,
            BLOCK=block,
            num_warps=warps,
        )
    return out


@triton.jit
def _tedfx_spread(
    grad, rows, order, weights, grad_rows, grad_weights, width, total, K: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    choice = tl.load(order + row).to(tl.int64)
    listed = choice < total
    token = choice // K
    weight = tl.load(weights + choice, mask=listed, other=0.0).to(tl.float32)
    read = tl.where(listed, width, 0)
    dot = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        g = tl.load(grad + token * width + column, mask=column < read, other=0.0).to(tl.float32)
        r = tl.load(rows + row * width + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_rows + row * width + column, (g * weight).to(grad_rows.dtype.element_ty), mask=inside)
        dot += g * r
    tl.store(grad_weights + choice, tl.sum(dot, 0).to(grad_weights.dtype.element_ty), mask=listed)


def spread(grad: Tensor, rows: Tensor, order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `sum_choices` with weights: grad[N,H] -> of rows[M,H] and of weights[N,K], zero for
    the weight of a choice without a row."""
    grad_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
    grad_weights = torch.zeros(weights.shape, dtype=weights.dtype, device=weights.device)
    if rows.numel():
        block, warps = _block(rows.shape[1])
        _tedfx_spread[(rows.shape[0],)](
            grad.contiguous(),
            rows.contiguous(),
            order,
            weights.contiguous(),
            grad_rows,
            grad_weights,
            rows.shape[1],
            weights.numel(),
            K=weights.shape[1],
            BLOCK=block,
            num_warps=warps,
        )
    return grad_rows, grad_weights


@triton.jit
def _tedfx_zero_unused(out, counts, size, BLOCK: tl.constexpr):
    expert = tl.program_id(0).to(tl.int64)
    if tl.load(counts + expert) == 0:
        for start in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(out + expert * size + at, tl.zeros([BLOCK], out.dtype.element_ty), mask=at < size)


def zero_unused(out: Tensor, counts: Tensor) -> Tensor:
    """out[E,..], contiguous, counts[E]: out, zero for the experts that count nothing; the others are not
    touched."""
    size = out[0].numel()
    _tedfx_zero_unused[(out.shape[0], min(128, triton.cdiv(size, 2048)))](out, counts, size, BLOCK=2048)
    return out
