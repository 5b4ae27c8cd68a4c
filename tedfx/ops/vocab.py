"""Embedding and cross entropy over a vocabulary cut into contiguous, equal shards.

Rank i of the axes holds the entries [i * local, (i + 1) * local). Neither op gathers the logits or the table:
the embedding is a partial sum, and the cross entropy exchanges three numbers per row (the maximum, the sum of
exponentials, the logit of the label) in two all-reduces. Its backward needs none: given those numbers, the
gradient of a rank's logits depends on no other rank.
"""

import torch
from torch import Tensor

from tedfx import _torch
from tedfx.ops import context
from tedfx.ops.context import Axes
from tedfx.ops.convert import sum_over
from tedfx.ops.properties import ALL_REDUCE, Moves, op


@op(saves=(1,))
def vocab_parallel_embedding(
    weight_local: Tensor, ids: Tensor, axes: Axes, padding_idx: int | None = None
) -> Tensor:
    """weight_local[V/size,H], ids[*] -> [*,H], a partial sum: the rows of this shard, zeros for ids of the
    others.

    `padding_idx` counts in the whole vocabulary (negative from its end): its row is looked up and gets no
    gradient. An id outside [0, V) trips a device-side assertion; IndexError for a padding_idx outside.
    """
    span = context.span(axes)
    local, offset = weight_local.shape[0], _offset(weight_local.shape[0], span.index)
    vocab = local * span.size
    _in_range(ids, vocab, "vocab_parallel_embedding: id out of range")
    shifted = ids - offset
    mine = (shifted >= 0) & (shifted < local)
    padding = -1  # torch.embedding's own sign for "none"
    if padding_idx is not None:
        if not -vocab <= padding_idx < vocab:
            raise IndexError(f"padding_idx {padding_idx} is outside a vocabulary of {vocab}")
        if offset <= padding_idx % vocab < offset + local:
            padding = padding_idx % vocab - offset
    # Ids of other shards look up row 0 and are blanked, which blanks their gradient as well.
    rows = torch.embedding(weight_local, torch.where(mine, shifted, 0), padding)
    return torch.where(mine.unsqueeze(-1), rows, 0)


@op(forward=Moves(ALL_REDUCE, "other"), saves=(0,))
def vocab_parallel_cross_entropy(
    logits_local: Tensor, labels: Tensor, axes: Axes, ignore_index: int = -100
) -> Tensor:
    """logits_local[N,V/size], labels[N] -> nll[N], equal on all ranks of `axes`; zero where the label is
    ignored.

    What torch's cross_entropy(reduction="none") gives for the whole logits, in their dtype; half precision is
    computed in float32 and rounded once at the end (torch rounds its log-softmax on the way too). The
    cotangent of nll is replicated; backward has no communication. A label outside [0, V) other than
    ignore_index trips a device-side assertion; ValueError for shapes that do not fit.
    """
    if logits_local.dim() != 2 or labels.shape != logits_local.shape[:1]:
        raise ValueError(
            f"vocab_parallel_cross_entropy: logits {tuple(logits_local.shape)} and labels "
            f"{tuple(labels.shape)} "
            "are not [N,V] and [N]"
        )
    return _CrossEntropy.apply(logits_local, labels, context.span(axes), ignore_index)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, span, ignore_index):
        local = logits.shape[1]
        kept = labels != ignore_index
        _in_range(
            torch.where(kept, labels, 0),
            local * span.size,
            "vocab_parallel_cross_entropy: label out of range",
        )
        x = logits.to(_wide(logits.dtype))
        top = x.amax(1)
        if span.size > 1:
            top = sum_over(top, span, "forward", op="max")
        shifted = labels - _offset(local, span.index)
        mine = kept & (shifted >= 0) & (shifted < local)
        shifted = torch.where(mine, shifted, 0)
        at_label = x.gather(1, shifted.unsqueeze(1)).squeeze(1) - top
        packed = torch.stack([(x - top.unsqueeze(1)).exp().sum(1), torch.where(mine, at_label, 0)])
        if span.size > 1:
            packed = sum_over(packed, span, "forward")
        total, at_label = packed.unbind(0)
        ctx.save_for_backward(logits, top, total, shifted, mine, kept)
        return _torch.result(torch.where(kept, total.log() - at_label, 0).to(logits.dtype))

    @staticmethod
    def backward(ctx, grad):
        logits, top, total, shifted, mine, kept = ctx.saved_tensors
        scale = torch.where(kept, grad.to(top.dtype), 0)
        # softmax * scale, less scale at the label
        out = (logits.to(top.dtype) - top.unsqueeze(1)).exp() * (scale / total).unsqueeze(1)
        at_label = torch.where(mine, scale, 0)
        out = out.scatter_add(
            1, shifted.unsqueeze(1), -at_label.unsqueeze(1)
        )  # one entry a row: no order to sum in
        return out.to(logits.dtype), None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _offset(local: int, index: int) -> int:
    return local * index


def _in_range(ids: Tensor, vocab: int, message: str) -> None:
    _torch.assert_async(((ids >= 0) & (ids < vocab)).all(), message)
