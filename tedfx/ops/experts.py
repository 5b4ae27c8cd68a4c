"""Routing and expert compute as operators that torch.export keeps whole.

The single-device form, `torch.ops.tedfx.*`: a token's K choices become K rows, the rows are sorted by expert
(stably, so their order is a function of `ids` alone), every expert's linear runs on its own run of rows, and
`combine` puts the rows back and sums them. Counts of rows never leave the device here, and no sum uses
atomics: results are bitwise the same from run to run.

    dispatch(x[N,H], ids[N,K], num_experts)              -> rows[N*K,H], counts[E] int64, order[N*K] int64
    grouped_linear(rows[M,I], weight, counts, transposed) -> [M,O]   weight [E,O,I], or [E,I,O] if transposed
    expert_rows(param[E,...], counts[E], rows[M,*])       -> [M,...]    row m gets the entry of its expert
    combine(rows[M,H], order[M], weights[N,K])            -> [N,H]   rows not listed in `order` count as zero

`order[m]` is the flat assignment n * K + k whose row stands at m; N * K where it is nobody's (an empty slot
of `tedfx/ops/slots.py`, the tail), and `combine` leaves it out. Ids must lie in [0, num_experts).

With a capacity some assignments are dropped: their id is num_experts, no expert's, and their rows stand
behind all others. This is the **tail** (`tail=True`, the last argument of the first three ops; without it an
id out of range, or counts that do not sum to the rows, are errors). No count has it. A graph of the single
device has as many rows whatever the router says, so there the last expert computes the tail too: on a real
token, since an expert may divide by what it makes of zeros. `combine` leaves it out whatever it holds, and
nothing flows back from it.

The local form, for one rank, is in `tedfx/ops/moe.py`, which also hands these on; there a tail is cut off.
"""

import math

import torch
from torch import Tensor

from tedfx import _torch, kernels
from tedfx.ops.properties import Op, describe


def dispatch(x: Tensor, ids: Tensor, num_experts: int, tail: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """x[N,H], ids[N,K] -> rows[N*K,H] sorted by expert, counts[E], order[N*K].

    ValueError for shapes that do not fit; an id outside [0, num_experts), or above it with a tail, trips a
    device-side assertion.
    """
    return torch.ops.tedfx.dispatch(x, ids, num_experts, tail)


def grouped_linear(
    rows: Tensor, weight: Tensor, counts: Tensor, transposed: bool = False, tail: bool = False
) -> Tensor:
    """rows[M,I] times each expert's matrix -> [M,O]; weight[E,O,I], or [E,I,O] if transposed.

    Under autocast the operands are cast as those of `linear`. bfloat16 on CUDA is one grouped matmul; any
    other dtype or device is one matmul per expert, and copies the counts to the host. ValueError for shapes
    or dtypes that do not fit (on the second path, also for counts that do not sum to M; with a tail, that sum
    to more).
    """
    rows, weight = _as_linear_casts(rows), _as_linear_casts(weight)
    return torch.ops.tedfx.grouped_linear(rows, weight, counts, transposed, tail)


def _as_linear_casts(x: Tensor) -> Tensor:
    """What autocast does to an operand of `linear`, which grouped_linear stands for: torch's registration of
    casts for custom ops takes one dtype, not that of the region."""
    kind = x.device.type
    on = (
        kind != "meta"
        and torch.is_autocast_enabled(kind)
        and x.is_floating_point()
        and x.dtype != torch.float64
    )
    return x.to(torch.get_autocast_dtype(kind)) if on else x


def expert_rows(param: Tensor, counts: Tensor, rows: Tensor, tail: bool = False) -> Tensor:
    """param[E,...], counts[E], rows[M,*] -> [M,...]. Of `rows` only the number is used. A bias per expert,
    say."""
    return torch.ops.tedfx.expert_rows(param, counts, rows, tail)


def combine(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """rows[M,H], order[M], weights[N,K] -> [N,H]: sum over k of weights[n,k] times the row of assignment n *
    K + k.

    In the dtype rows and weights promote to; assignments not listed in `order` count as zero, rows that are
    nobody's are left out.
    """
    return torch.ops.tedfx.combine(rows, order, weights)


# ---- what a trace took for granted -------------------------------------------------------------------------


@torch.library.custom_op("tedfx::hit_experts", mutates_args=())
def _hit_experts(chosen: Tensor) -> Tensor:
    """A loop over the experts of which `chosen` says that they have tokens was traced over all of them.

    chosen: a mask or counts [E], or expert ids. It computes nothing: `capture_loops` proves it and takes it
    out of the graph, or refuses."""
    return chosen.new_empty(0)


@_hit_experts.register_fake
def _(chosen):
    return chosen.new_empty(0)


torch.fx.has_side_effect(torch.ops.tedfx.hit_experts.default)  # nothing reads it, and it must stay


# Runs of sorted rows that Python cut by counts: what a trace holds of them until `capture_sorted` has made
# them the rows of a dispatch.


@torch.library.custom_op("tedfx::run_size", mutates_args=())
def _run_size(counts: Tensor, expert: int) -> Tensor:
    """How many rows an expert has: a number. Counts may end before the last experts, if those have none."""
    return counts[expert : expert + 1].sum()


@_run_size.register_fake
def _(counts, expert):
    return counts.new_empty((), dtype=torch.int64)


@torch.library.custom_op("tedfx::expert_run", mutates_args=())
def _expert_run(rows: Tensor, counts: Tensor, expert: int, size: int) -> Tensor:
    """rows[M,..] sorted by expert, counts[E] -> [size,..], those of one expert."""
    start = int(counts[:expert].sum())
    return rows[start : start + size].clone()


@_expert_run.register_fake
def _(rows, counts, expert, size):
    return rows.new_empty(size, *rows.shape[1:])


def _run_setup(ctx, inputs, output):
    rows, counts, ctx.expert, ctx.size = inputs
    ctx.shape = rows.shape
    ctx.save_for_backward(counts)


def _run_backward(ctx, grad):
    (counts,) = ctx.saved_tensors
    start = int(counts[: ctx.expert].sum())
    out = grad.new_zeros(ctx.shape)
    out[start : start + grad.shape[0]] = grad
    return out, None, None, None


_expert_run.register_autograd(_run_backward, setup_context=_run_setup)


@torch.library.custom_op("tedfx::join_runs", mutates_args=())
def _join_runs(runs: list[Tensor], rows: Tensor) -> Tensor:
    """The runs of all experts, one after the other: as many as `rows`, of which they were cut."""
    return torch.cat(runs)


@_join_runs.register_fake
def _(runs, rows):
    return runs[0].new_empty(rows.shape[0], *runs[0].shape[1:])


def _join_setup(ctx, inputs, output):
    ctx.sizes = [run.shape[0] for run in inputs[0]]


def _join_backward(ctx, grad):
    return list(grad.split(ctx.sizes)), None


_join_runs.register_autograd(_join_backward, setup_context=_join_setup)


# ---- dispatch ----------------------------------------------------------------------------------------------


@torch.library.custom_op("tedfx::dispatch", mutates_args=())
def _dispatch(x: Tensor, ids: Tensor, num_experts: int, tail: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    if x.dim() != 2 or ids.dim() != 2 or x.shape[0] != ids.shape[0]:
        raise ValueError(f"dispatch: x {tuple(x.shape)} and ids {tuple(ids.shape)} are not [N,H] and [N,K]")
    order, counts = sort_by_expert(ids.reshape(-1), num_experts)
    if ids.numel():
        _torch.assert_async(
            (ids >= 0).logical_and_(ids < num_experts + tail).all(), "dispatch: expert id out of range"
        )
    rows = x.index_select(0, order // ids.shape[1])
    return rows, counts, torch.where(_in_tail(counts, order), ids.numel(), order) if tail else order


def sort_by_expert(flat: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """flat[M], in [0, num_experts] -> (stable argsort [M] int64, counts[num_experts] int64), without a host
    copy and without atomics."""
    # A radix sort takes a pass per digit: numbers of 8 bits take an eighth of those of 64.
    narrow = next((d for d in (torch.uint8, torch.int16) if num_experts <= torch.iinfo(d).max), flat.dtype)
    by_expert, order = torch.sort(flat.to(narrow), stable=True)
    bounds = torch.searchsorted(by_expert, torch.arange(num_experts + 1, device=flat.device, dtype=narrow))
    return order, bounds.diff()


@_dispatch.register_fake
def _(x, ids, num_experts, tail=False):
    rows = ids.numel()
    return (
        x.new_empty(rows, x.shape[1]),
        ids.new_empty(num_experts, dtype=torch.int64),
        ids.new_empty(rows, dtype=torch.int64),
    )


def _dispatch_setup(ctx, inputs, output):
    ctx.top_k = inputs[1].shape[1]
    ctx.tokens = inputs[1].shape[0]
    ctx.save_for_backward(output[2])


def _dispatch_backward(ctx, grad_rows, grad_counts, grad_order):
    (order,) = ctx.saved_tensors
    return sum_choices(grad_rows, order, ctx.tokens, ctx.top_k), None, None, None


_dispatch.register_autograd(_dispatch_backward, setup_context=_dispatch_setup)


def unsort(rows: Tensor, order: Tensor, total: int) -> Tensor:
    """rows[M,H] -> [total,H]: row m goes to order[m], nowhere if that is total; the rest is zero. Positions
    are unique, so this is a copy."""
    return rows.new_zeros(total + 1, *rows.shape[1:]).index_copy_(0, order, rows).narrow(0, 0, total)


def sum_choices(rows: Tensor, order: Tensor, tokens: int, top_k: int) -> Tensor:
    """rows[M,H], order[M] -> [N,H]: the sum of a token's rows; assignments not listed count as zero."""
    return torch.ops.tedfx.sum_choices(rows, order, tokens, top_k)


@torch.library.custom_op("tedfx::sum_choices", mutates_args=())
def _sum_choices(rows: Tensor, order: Tensor, tokens: int, top_k: int) -> Tensor:
    if kernels.takes(rows):
        from tedfx.kernels import rows as on_rows

        return on_rows.sum_choices(rows, order, top_k, tokens, None, rows.dtype)
    return unsort(rows, order, tokens * top_k).view(tokens, top_k, rows.shape[1]).sum(1)


@_sum_choices.register_fake
def _(rows, order, tokens, top_k):
    return rows.new_empty(tokens, rows.shape[1])


# ---- grouped_linear ----------------------------------------------------------------------------------------


@torch.library.custom_op("tedfx::grouped_linear", mutates_args=())
def _grouped_linear(
    rows: Tensor, weight: Tensor, counts: Tensor, transposed: bool = False, tail: bool = False
) -> Tensor:
    _check_grouped(rows, weight, counts, transposed)
    right = weight if transposed else weight.mT  # [E,I,O]
    if rows.shape[0] == 0 or right.numel() == 0:
        return rows.new_zeros(rows.shape[0], right.shape[2])
    if _has_kernel(rows, right.shape[1], right.shape[2]):
        offsets = _offsets(_with_tail(counts, rows) if tail else counts)
        return torch.nn.functional.grouped_mm(rows.contiguous(), _dense(right), offs=offsets)
    out = rows.new_empty(rows.shape[0], right.shape[2])
    for expert, start, stop in _runs(counts, rows, tail, to_last=True):
        torch.mm(rows[start:stop], right[expert], out=out[start:stop])
    return out


@_grouped_linear.register_fake
def _(rows, weight, counts, transposed=False, tail=False):
    _check_grouped(rows, weight, counts, transposed)
    return rows.new_empty(rows.shape[0], weight.shape[2] if transposed else weight.shape[1])


@torch.library.custom_op("tedfx::grouped_outer", mutates_args=())
def _grouped_outer(left: Tensor, right: Tensor, counts: Tensor, tail: bool = False) -> Tensor:
    """left[M,A], right[M,B] -> [E,A,B]: per expert, left^T right over its rows; zeros for an expert without
    rows.

    The gradient of grouped_linear by its weight; the two ops are closed under differentiation.
    """
    experts, a, b = counts.shape[0], left.shape[1], right.shape[1]
    if left.shape[0] == 0 or a * b == 0:
        return left.new_zeros(experts, a, b)
    if _has_kernel(left, a, b):
        left, right = left.contiguous(), right.contiguous()
        out = torch.nn.functional.grouped_mm(left.mT, right, offs=_offsets(counts))
        # The kernel leaves the matrix of an expert without rows unwritten.
        return _zero_unused(out, counts)
    out = left.new_zeros(experts, a, b)
    for expert, start, stop in _runs(counts, left, tail):
        torch.mm(left[start:stop].mT, right[start:stop], out=out[expert])
    return out


@_grouped_outer.register_fake
def _(left, right, counts, tail=False):
    return left.new_empty(counts.shape[0], left.shape[1], right.shape[1])


def _linear_setup(ctx, inputs, output):
    rows, weight, counts, ctx.transposed, ctx.tail = inputs
    ctx.save_for_backward(rows, weight, counts)


def _linear_backward(ctx, grad):
    rows, weight, counts = ctx.saved_tensors
    grad_rows = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_rows = _rows_back(grad, weight, counts, not ctx.transposed, ctx.tail)
    if ctx.needs_input_grad[1]:
        left, right = (rows, grad) if ctx.transposed else (grad, rows)
        grad_weight = _grouped_outer(left, right, counts, ctx.tail)
    return grad_rows, grad_weight, None, None, None


def _outer_setup(ctx, inputs, output):
    *tensors, ctx.tail = inputs
    ctx.save_for_backward(*tensors)


def _outer_backward(ctx, grad):
    left, right, counts = ctx.saved_tensors
    return (
        _rows_back(right, grad, counts, False, ctx.tail),
        _rows_back(left, grad, counts, True, ctx.tail),
        None,
        None,
    )


def _rows_back(grad: Tensor, weight: Tensor, counts: Tensor, transposed: bool, tail: bool) -> Tensor:
    """What flows back to rows: nothing to a tail."""
    out = grouped_linear(grad, weight, counts, transposed, tail)
    return torch.where(_in_tail(counts, out).unsqueeze(1), 0, out) if tail else out


_grouped_linear.register_autograd(_linear_backward, setup_context=_linear_setup)
_grouped_outer.register_autograd(_outer_backward, setup_context=_outer_setup)


def _check_grouped(rows, weight, counts, transposed):
    inner = weight.shape[1 if transposed else 2] if weight.dim() == 3 else None
    if rows.dim() != 2 or weight.dim() != 3 or counts.dim() != 1 or rows.shape[1] != inner:
        form = "[E,I,O]" if transposed else "[E,O,I]"
        raise ValueError(
            f"grouped_linear: rows {tuple(rows.shape)}, weight {tuple(weight.shape)}, counts "
            f"{tuple(counts.shape)} "
            f"are not [M,I], {form}, [E]"
        )
    if weight.shape[0] != counts.shape[0]:
        raise ValueError(f"grouped_linear: {weight.shape[0]} matrices for {counts.shape[0]} experts")
    if rows.dtype != weight.dtype:
        raise ValueError(f"grouped_linear: rows are {rows.dtype}, weight is {weight.dtype}")


def _has_kernel(x: Tensor, *widths: int) -> bool:
    """grouped_mm takes bfloat16 on CUDA, rows of a multiple of 16 bytes."""
    return x.is_cuda and x.dtype == torch.bfloat16 and all(width % 8 == 0 for width in widths)


def _dense(right: Tensor) -> Tensor:
    """The kernel reads each expert's matrix row-major or column-major; anything else is copied."""
    return right if right.is_contiguous() or right.mT.is_contiguous() else right.contiguous()


def _offsets(counts: Tensor) -> Tensor:
    return counts.cumsum(0).to(torch.int32)


def _zero_unused(out: Tensor, counts: Tensor) -> Tensor:
    """out[E,A,B], with zeros for the experts without rows; the others' matrices are not read."""
    if kernels.takes(out) and out.is_contiguous():
        from tedfx.kernels import rows

        return rows.zero_unused(out, counts)
    return torch.where((counts > 0).view(-1, 1, 1), out, 0)


def _in_tail(counts: Tensor, rows: Tensor) -> Tensor:
    """[M] bool: the rows behind those that the counts count."""
    return torch.arange(rows.shape[0], device=counts.device) >= counts.sum()


def _with_tail(counts: Tensor, rows: Tensor) -> Tensor:
    """Counts of which the last expert's has the tail as well."""
    return torch.cat([counts[:-1], rows.shape[0] - counts[:-1].sum(0, keepdim=True)])


def _runs(counts: Tensor, rows: Tensor, tail: bool = False, to_last: bool = False):
    """(expert, start, stop) of every expert that has rows; `to_last`: the last one has the tail."""
    numbers = counts.tolist()
    rest = rows.shape[0] - sum(numbers)
    if rest < 0 or (rest and not tail):
        raise ValueError(f"counts sum to {sum(numbers)}, there are {rows.shape[0]} rows")
    if to_last:
        numbers[-1] += rest
    stop = 0
    for expert, count in enumerate(numbers):
        start, stop = stop, stop + count
        if count:
            yield expert, start, stop


# ---- expert_rows -------------------------------------------------------------------------------------------


@torch.library.custom_op("tedfx::expert_rows", mutates_args=())
def _expert_rows(param: Tensor, counts: Tensor, rows: Tensor, tail: bool = False) -> Tensor:
    if param.dim() < 1 or param.shape[0] != counts.shape[0]:
        raise ValueError(
            f"expert_rows: param {tuple(param.shape)} has no entry for each of {counts.shape[0]} experts"
        )
    counts = _with_tail(counts, rows) if tail else counts
    index = torch.arange(counts.shape[0], device=counts.device)
    return param.index_select(0, index.repeat_interleave(counts, output_size=rows.shape[0]))


@_expert_rows.register_fake
def _(param, counts, rows, tail=False):
    return param.new_empty(rows.shape[0], *param.shape[1:])


def _expert_rows_setup(ctx, inputs, output):
    ctx.shape, ctx.tail = inputs[0].shape, inputs[3]
    ctx.save_for_backward(inputs[1])


def _expert_rows_backward(ctx, grad):
    (counts,) = ctx.saved_tensors
    flat = grad.reshape(grad.shape[0], math.prod(ctx.shape[1:]))
    # A sum over each expert's rows is a product with ones: a matmul, so no atomics, and it accumulates like
    # one. Eight columns of ones where the kernel wants a multiple of eight.
    ones = flat.new_ones(flat.shape[0], 8 if flat.is_cuda else 1)
    return _grouped_outer(ones, flat, counts, ctx.tail)[:, 0].reshape(ctx.shape), None, None, None


_expert_rows.register_autograd(_expert_rows_backward, setup_context=_expert_rows_setup)

# ---- combine -----------------------------------------------------------------------------------------------


@torch.library.custom_op("tedfx::combine", mutates_args=())
def _combine(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    if rows.dim() != 2 or weights.dim() != 2 or order.shape != rows.shape[:1]:
        raise ValueError(
            f"combine: rows {tuple(rows.shape)}, order {tuple(order.shape)}, weights {tuple(weights.shape)} "
            "are not [M,H], [M], [N,K]"
        )
    tokens, top_k = weights.shape
    if kernels.takes(rows, weights):
        from tedfx.kernels import rows as on_rows

        dtype = torch.promote_types(rows.dtype, weights.dtype)
        return on_rows.sum_choices(rows, order, top_k, tokens, weights, dtype)
    placed = unsort(rows, order, tokens * top_k).view(tokens, top_k, rows.shape[1])
    return (placed * weights.unsqueeze(-1)).sum(1)


@_combine.register_fake
def _(rows, order, weights):
    return rows.new_empty(
        weights.shape[0], rows.shape[1], dtype=torch.promote_types(rows.dtype, weights.dtype)
    )


@torch.library.custom_op("tedfx::combine_backward", mutates_args=())
def _combine_grads(grad: Tensor, rows: Tensor, order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """grad[N,H] -> gradients of rows[M,H] and of weights[N,K]; zero for the weight of an assignment not
    listed."""
    if kernels.takes(grad, rows, weights):
        from tedfx.kernels import rows as on_rows

        return on_rows.spread(grad, rows, order, weights)
    total = weights.numel()
    listed = order.clamp(max=total - 1)
    by_row = grad.index_select(0, listed // weights.shape[1])
    scale = weights.reshape(-1).index_select(0, listed).masked_fill(order == total, 0)
    grad_rows = (by_row * scale.unsqueeze(1)).to(rows.dtype)
    grad_weights = unsort((by_row * rows).sum(1), order, total)
    return grad_rows, grad_weights.view(weights.shape).to(weights.dtype)


@_combine_grads.register_fake
def _(grad, rows, order, weights):
    return torch.empty_like(rows, memory_format=torch.contiguous_format), torch.empty_like(
        weights, memory_format=torch.contiguous_format
    )


def _combine_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _combine_backward(ctx, grad):
    grad_rows, grad_weights = _combine_grads(grad, *ctx.saved_tensors)
    return grad_rows, None, grad_weights


_combine.register_autograd(_combine_backward, setup_context=_combine_setup)


_ops = torch.ops.tedfx
describe(_ops.grouped_linear.default, Op(saves="operands"))
describe(_ops.expert_rows.default, Op(saves=(1,)))
describe(_ops.combine.default, Op(saves="operands"))
