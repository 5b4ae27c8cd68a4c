"""Which dims of a call's inputs are the batch and the sequence.

Read off the example alone: one input sets both sizes (`reference`), the others share them by position and
size. `position_ids[S]`, a mask `[S,S]` or `[1,S]` have no batch dim: they are the same on every rank. Where
the example leaves it open (its batch and its sequence are equal, or a size of the model coincides with the
batch), the model decides: a wrong reading does not trace, or fixes a size that should be free. Where two
readings trace alike, the example is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from torch import Tensor

from tedfx._torch import pytree
from tedfx.errors import TraceError

__all__ = ["as_given", "is_batch", "plan_sizes", "settle", "with_room"]

Roles = dict[int, str]  # dim -> "batch" or "sequence"


def _leaves(call: Mapping[str, Any]) -> list[Any]:
    return pytree.tree_leaves(dict(call), is_leaf=lambda x: x is None)


def reference(call: Mapping[str, Any]) -> Tensor:
    """The input whose first two dims are batch and sequence: the first with two dims or more, else the first
    with one.

    A mask or positions may come first: what is square, or has one row, is passed over where a later input
    shares its sequence and has another number of rows.
    """
    tensors = [x for x in _leaves(call) if isinstance(x, Tensor)]
    if not tensors:
        raise TraceError(
            "no input is a tensor: pass example inputs, as in trace(model, kwargs={'x': torch.randn(6, "
            "10, 64)})"
        )
    wide = [x for x in tensors if x.dim() > 1]
    for x in wide:
        rows, length = x.shape[:2]
        if rows not in (1, length) or not any(
            y.shape[1] == length and y.shape[0] not in (1, rows) for y in wide
        ):
            return x
    return next((x for x in (*wide, *tensors) if x.dim()), tensors[0])


def plan_sizes(
    call: Mapping[str, Any], taken: Set[int] = frozenset(), reading: frozenset[int] = frozenset()
) -> tuple[dict[str, tuple[int, int]], list[Roles | None], list[str]]:
    """The free sizes, {"batch": (given, traced), ...}; per leaf of the call its roles, None where it is no
    tensor; and a line per size that the example fixes.

    taken: sizes of parameters. The given sizes are kept unless they coincide with each other or with one of
    these; then the smallest free multiples are used, which keeps divisibility. reading: leaves (by number)
    that `settle` reads as having no batch dim although their size is that of the batch.
    """
    lead = reference(call)
    given: dict[str, int] = dict(zip(("batch", "sequence"), lead.shape))
    lines: list[str] = []
    for name in [n for n, size in given.items() if size == 1]:
        lines.append(f"{name} = 1: the example input has size 1 there; trace with more to leave it free")
        del given[name]
    sizes: dict[str, tuple[int, int]] = {}
    for name, size in given.items():
        used = set(taken) | {t for _, t in sizes.values()}
        sizes[name] = (
            size,
            next(size * k for k in itertools.count(1) if size * k not in used and size * k > 1),
        )

    def roles(number: int, x: Any) -> Roles | None:
        if not isinstance(x, Tensor):
            return None
        found: Roles = {}
        batch, sequence = given.get("batch"), given.get("sequence")
        along = lambda d: x.dim() > d and sequence is not None and x.shape[d] == sequence
        if x.dim() and x.shape[0] == batch and number not in reading:
            found[0] = "batch"
        elif along(0) and (
            x.dim() == 1 or (x.dim() == 2 and along(1))
        ):  # positions; a mask of (queries, keys)
            found[0] = "sequence"
        if along(1):
            found[1] = "sequence"
        if x.dim() == 4 and x.shape[1] == 1:  # a mask: (batch or 1, 1, queries, keys)
            found.update({d: "sequence" for d in (2, 3) if along(d)})
        return found

    return sizes, [roles(i, x) for i, x in enumerate(_leaves(call))], lines


def as_given(sizes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """The given sizes to trace with; two that are equal would be taken for one, so the batch is then twice as
    large."""
    given = {name: size for name, (size, _) in sizes.items()}
    if len(set(given.values())) < len(given):
        given["batch"] *= 2
    return given


def is_batch(call: Mapping[str, Any]) -> list[bool]:
    """Per leaf of the call, as `pytree.tree_leaves` has them, whether its dim 0 is the batch, by the sizes
    alone."""
    return [roles is not None and roles.get(0) == "batch" for roles in plan_sizes(call)[1]]


def settle(call: Mapping[str, Any], names: Sequence[str], trace: Callable[[frozenset[int]], Any]) -> Any:
    """`trace(reading)` in the one reading of the example that the model allows: the one that leaves most
    sizes free.

    names: of the leaves, for the message. The natural reading (what has the batch's size goes with the batch)
    counts unless it fixes a size; a 1-D input is read both ways where batch and sequence are equal.
    """
    lead, leaves = reference(call), _leaves(call)
    planned = plan_sizes(call)[0]
    equal = len({given for given, _ in planned.values()}) < len(planned)
    batch = planned["batch"][0] if "batch" in planned else None
    sized = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dim() and x.shape[0] == batch]
    rows = [i for i in sized if leaves[i].dim() == 1 and leaves[i] is not lead]
    open_ = rows + [i for i in sized if equal and leaves[i].dim() == 2 and leaves[i].shape[1] == batch]
    try:
        natural, failed = trace(frozenset()), None
    except TraceError as error:
        natural, failed = None, error
    whole = natural is not None and len(natural.sizes) == len(planned)
    if not open_ or (whole and not (equal and rows)):
        if failed:
            raise failed
        return natural
    found: list[tuple[frozenset[int], Any]] = [] if natural is None else [(frozenset(), natural)]
    several: list[frozenset[int]] = (
        [frozenset({i}) for i in rows]
        if whole
        else [frozenset(s) for n in (1, 2, 3) for s in itertools.combinations(open_[:3], n)]
    )
    for reading in several:
        try:
            found.append((reading, trace(reading)))
        except TraceError:
            pass  # not what is meant; the natural reading's error is raised where none is
    if failed and not found:
        raise failed
    most = max(len(t.sizes) for _, t in found)
    best = [(reading, t) for reading, t in found if len(t.sizes) == most]
    if len(best) > 1:
        if not equal:  # sizes that the model fixes in every reading
            return best[0][1]
        which = ", ".join(dict.fromkeys(names[i] for reading, _ in best for i in reading))
        raise TraceError(
            f"the example's batch and sequence are both {batch}, so whether {which} goes with the batch "
            "cannot be told: pass example_inputs in which the two sizes differ"
        )
    return best[0][1]


def with_room(call: Mapping[str, Any], trace: Callable[[dict[str, Any]], Any]) -> Any:
    """`trace` of the example with a batch of at least 2: a size of 1 would be taken for a constant. A 1-D
    input of one element is a row's, unless the model needs it to be one."""
    lead = reference(call)
    if not lead.dim() or lead.shape[0] != 1:
        return trace(dict(call))

    def grown(least: int) -> dict[str, Any]:
        grow = lambda x: (
            x.expand(2, *x.shape[1:]).clone()
            if isinstance(x, Tensor) and x.dim() >= least and x.shape[0] == 1
            else x
        )
        return pytree.tree_map(grow, dict(call))

    if lead.dim() == 1 or not any(
        isinstance(x, Tensor) and x.dim() == 1 and x.shape[0] == 1 for x in _leaves(call)
    ):
        return trace(grown(1))
    try:
        natural, failed = trace(grown(1)), None
        if "batch" in natural.sizes:
            return natural
    except TraceError as error:
        natural, failed = None, error
    try:
        other = trace(grown(2))
    except TraceError:
        if failed:
            raise failed from None
        return natural
    return other if natural is None or len(other.sizes) > len(natural.sizes) else natural
