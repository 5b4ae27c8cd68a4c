"""Which ops decide something that comes out otherwise if it is decided twice: which experts, in which order, how many rows.

Run again on values that differ in the last bit (another fusion, another kernel) a near-tie may fall the other way; what was saved of the first run then no
longer fits. So no region of `comm` holds such an op, and in a compiled `full` their results are kept while everything around them is recomputed.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

CHOICES = frozenset("topk sort argsort msort kthvalue median mode argmax argmin multinomial unique unique_consecutive nonzero route".split())
HOST_COPIES = frozenset("item _local_scalar_dense exchange_counts exchange_lanes".split())


def chooses(name: str, several: bool) -> bool:
    """By an op's short name; `several`: whether it returns several values (`max` along a dim, with the places)."""
    return name in CHOICES or (name in ("max", "min") and several)


def copies_to_host(name: str, tags) -> bool:
    """Whether the host waits for a number of the device, such as a number of rows."""
    return name in HOST_COPIES or torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags


def any_decides(nodes: list[fx.Node]) -> bool:
    """Whether an op of ours or of torch among these nodes decides."""
    for node in nodes:
        name = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
        if chooses(name, isinstance(node.meta.get("val"), (tuple, list))) or copies_to_host(name, getattr(node.target, "tags", ())):
            return True
    return False


def keep_decisions(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """A policy of torch's selective checkpoint: decisions are saved, all else is recomputed."""
    name = op.name().rpartition("::")[2].partition(".")[0]
    if chooses(name, len(op._schema.returns) > 1) or copies_to_host(name, op.tags):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
