"""Embedding and cross entropy over a vocabulary cut into contiguous shards.

Rank i of the axes holds the entries [i * local, (i + 1) * local); where the ranks do not divide the
vocabulary, `pieces` has how many entries each of them holds, the last ones perhaps none. Neither op gathers
the logits or the table: the embedding is a partial sum, and the cross entropy exchanges three numbers per row
(the maximum, the sum of exponentials, the logit of the label) in two all-reduces. Its backward needs none:
given those numbers, the gradient of a rank's logits depends on no other rank.
"""

import torch
from torch import Tensor

from tedfx import _torch
from tedfx.ops import context
from tedfx.ops.context import Axes, Span
from tedfx.ops.convert import Pieces, bounds, sum_over
from tedfx.ops.properties import ALL_REDUCE, Moves, op


@op(saves=(1,))
def vocab_parallel_embedding(
    weight_local: Tensor,
    ids: Tensor,
    axes: Axes,
    padding_idx: int | None = None,
    pieces: Pieces = None,
) -> Tensor:
    """weight_local[V/size,H], ids[*] -> [*,H], a partial sum: the rows of this shard, zeros for ids of the
    others.

    `padding_idx` counts in the whole vocabulary (negative from its end): its row is looked up and gets no
    gradient. An id outside [0, V) trips a device-side assertion; IndexError for a padding_idx outside.
    """
    local = weight_local.shape[0]
    offset, vocab = _place(local, context.span(axes), pieces)
    _in_range(ids, vocab, "vocab_parallel_embedding: id out of range")
    shifted = ids - offset
    mine = (shifted >= 0) & (shifted < local)
    padding = -1  # torch.embedding's own sign for "none"
    if padding_idx is not None:
        if not -vocab <= padding_idx < vocab:
            raise IndexError(f"padding_idx {padding_idx} is outside a vocabulary of {vocab}")
        if offset <= padding_idx % vocab < offset + local:
            padding = padding_idx % vocab - offset
    if local == 0:
        weight_local = torch.nn.functional.pad(weight_local, (0, 0, 0, 1))
    # Ids of other shards look up row 0 and are blanked, which blanks their gradient as well.
    rows = torch.embedding(weight_local, torch.where(mine, shifted, 0), padding)
    return torch.where(mine.unsqueeze(-1), rows, 0)


@op(forward=Moves(ALL_REDUCE, "other"), saves=(0,))
def vocab_parallel_cross_entropy(
    logits_local: Tensor, labels: Tensor, axes: Axes, ignore_index: int = -100, pieces: Pieces = None
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
    span, local = context.span(axes), logits_local.shape[1]
    offset, vocab = _place(local, span, pieces)
    if local == 0:  # an entry that no label names, of weight zero
        logits_local = torch.nn.functional.pad(logits_local, (0, 1), value=-torch.inf)
    return _CrossEntropy.apply(logits_local, labels, span, (offset, local, vocab), ignore_index)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, span, place, ignore_index):
        offset, local, vocab = place
        kept = labels != ignore_index
        _in_range(torch.where(kept, labels, 0), vocab, "vocab_parallel_cross_entropy: label out of range")
        x = logits.to(_wide(logits.dtype))
        top = x.amax(1)
        if span.size > 1:
            top = sum_over(top, span, "forward", op="max")
        shifted = labels - offset
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
        return out.to(logits.dtype), None, None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _place(local: int, span: Span, pieces: Pieces) -> tuple[int, int]:
    """(the first entry of this rank, the size of the whole vocabulary)."""
    if pieces is None:
        return local * span.index, local * span.size
    starts = bounds(pieces, span)
    return starts[span.index], starts[-1]


def _in_range(ids: Tensor, vocab: int, message: str) -> None:
    _torch.assert_async(((ids >= 0) & (ids < vocab)).all(), message)
