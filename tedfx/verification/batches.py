"""The global batch of a verification, of each of its steps, and the share of a rank."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tedfx._torch import pytree
from tedfx.errors import ConfigError
from tedfx.graph.signature import Path
from tedfx.placement.roles import Roles
from tedfx.trace.input_sizes import is_batch

IGNORED = -100  # a label that does not count


def make_batch(model: nn.Module, size: int, sequence: int, seed: int) -> dict[str, Tensor]:
    """Random token ids, and labels of which the first half of the rows keeps about 70% and the second half
    one in all.

    So over two batch ranks one has a single valid label, and over four or more some have none. A model that
    scores a row as a whole has a label per row, all valid (a number where it has one score), and padding at
    the end of every other row where it knows a padding id.
    """
    inputs = inspect.signature(model.forward).parameters
    if "input_ids" not in inputs:
        raise ConfigError(
            f"{type(model).__name__}.forward takes no input_ids: pass batch={{name: tensor}}, or let "
            "the factory return (model, inputs): the global batch"
        )
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(0, _vocabulary(model), (size, sequence), generator=generator)
    if "labels" not in inputs:
        return {"input_ids": ids}
    scores = _scores(model, ids[:2]) if inputs["labels"].default is not inspect.Parameter.empty else None
    if scores is not None and scores.dim() == 2:
        classes, padding = scores.shape[1], getattr(getattr(model, "config", None), "pad_token_id", None)
        labels = (
            torch.randint(0, classes, (size,), generator=generator)
            if classes > 1
            else torch.randn(size, generator=generator).to(scores.dtype)
        )
        if padding is None:
            return {"input_ids": ids, "labels": labels}
        ids[::2, sequence - sequence // 4 :] = padding
        masks = {"attention_mask": (ids != padding).long()} if "attention_mask" in inputs else {}
        return {"input_ids": ids, **masks, "labels": labels}
    known = ids if scores is None or scores.dim() < 2 else ids % scores.shape[-1]
    labels = torch.where(torch.rand(size, sequence, generator=generator) < 0.3, IGNORED, known)
    if size > 1:
        half = (size + 1) // 2
        labels[half:] = IGNORED
        labels[half, sequence // 2] = known[half, sequence // 2]
    return {"input_ids": ids, "labels": labels}


@torch.no_grad()
def _scores(model: nn.Module, ids: Tensor) -> Tensor | None:
    """What the model gives without labels: scores of tokens [rows, sequence, classes] or of rows [rows,
    classes]. A copy runs, so that nothing of the model moves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a process whose other threads have worked cannot be forked
    try:
        output = copy.deepcopy(model).eval()(input_ids=ids)
    # it may need more than ids; the labels are then those of tokens, and what is wrong shows where the model
    # is run
    except Exception:
        return None
    finally:
        torch.set_num_threads(threads)
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return (
        named
        if isinstance(named, Tensor)
        else next(
            (x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()), None
        )
    )


def _vocabulary(model: nn.Module) -> int:
    with contextlib.suppress(AttributeError, NotImplementedError):
        return getattr(model, "get_input_embeddings")().num_embeddings
    return min((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=2)


def split_batch(
    batch: Mapping[str, Any], index: int, count: int, inputs: Collection[Path] | None = None
) -> dict[str, Any]:
    """The share of batch coordinate `index` of `count`: rows of what has a batch dim. Scalars, positions of
    shape [S], masks of shape [S, S] are global and stay.

    inputs: paths of the inputs with a batch dim, where a trace has decided; else as the sizes say.
    """
    leaves, spec = pytree.tree_flatten(dict(batch))
    paths = [
        tuple(getattr(k, "key", getattr(k, "idx", getattr(k, "name", None))) for k in path)
        for path, _ in pytree.tree_flatten_with_path(dict(batch))[0]
    ]
    cut = is_batch(batch) if inputs is None else [path in inputs for path in paths]
    return pytree.tree_unflatten(
        [x.chunk(count)[index] if is_cut else x for x, is_cut in zip(leaves, cut)], spec
    )


Batches = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def step_batches(batch: Batches, steps: int) -> list[Mapping[str, Any]]:
    """The global batch of each step: as given, one for each, or one whose rows are another rank's in every
    step. Rows of size 1 stay."""
    if not isinstance(batch, Mapping):
        return [batch[i % len(batch)] for i in range(steps)]
    leaves, spec = pytree.tree_flatten(dict(batch))
    rows = is_batch(batch)
    return [
        spec.unflatten([x.roll(step, 0) if row else x for x, row in zip(leaves, rows)])
        for step in range(steps)
    ]


def check_batch(batch: Mapping[str, Any], roles: Roles) -> None:
    mesh, axes = roles.mesh, roles.mesh.wide(roles.batch)
    count = mesh.size(roles.batch)
    rows = {x.shape[0] for x, is_cut in zip(pytree.tree_leaves(dict(batch)), is_batch(batch)) if is_cut}
    for size in sorted(rows):
        if size % count:
            over = ", ".join(f"{a}={mesh.size((a,))}" for a in axes)
            raise ConfigError(
                f"a batch of {size} cannot be split over the batch axes {over} ({count} ranks): use a "
                f"multiple of {count}, such as {-(-size // count) * count}"
            )
