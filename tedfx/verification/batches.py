"""The global batch of a verification, of each of its steps, and the share of a rank."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tedfx._torch import pytree
from tedfx.errors import ConfigError
from tedfx.graph.signature import Path
from tedfx.placement.roles import Roles
from tedfx.trace.input_sizes import is_batch
from tedfx.verification.authored import as_authored

SEQUENCE = 12  # tokens of a row
IGNORED = -100  # a label that does not count


def make_batch(model: nn.Module, size: int, sequence: int, seed: int) -> dict[str, Tensor]:
    """Random token ids [size, sequence], or images [size, channels, height, width] of a model that takes
    those, and what its head is trained on, where it has one.

    Labels of tokens [size, sequence]: the first half of the rows keeps about 70% and the second half one in
    all. So over two batch ranks one has a single valid label, and over four or more some have none. A model
    that scores a row as a whole has a label per row, all valid (a number where it has one score), and padding
    at the end of every other row where it knows a padding id. One that looks for an answer has the positions
    [size] of its start and its end; those of the last row do not count, being outside of it. A further input
    that the model says it misses is a number per row; a model with an encoder and a decoder has their masks,
    without which some are not traced.
    """
    inputs = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(seed + 1)
    if "input_ids" in inputs:
        given = {"input_ids": torch.randint(0, _vocabulary(model), (size, sequence), generator=generator)}
    elif "pixel_values" in inputs:
        dtype = next((p.dtype for p in model.parameters()), None)
        given = {"pixel_values": torch.randn(size, *_image(model), generator=generator).to(dtype)}
    else:
        raise ConfigError(
            f"{type(model).__name__}.forward takes no input_ids: pass batch={{name: tensor}}, or let "
            "the factory return (model, inputs): the global batch"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        masks = {"attention_mask", "decoder_attention_mask"} & set(inputs)
        given |= {name: torch.ones(size, sequence, dtype=torch.long) for name in sorted(masks)}
    if {"start_positions", "end_positions"} <= set(inputs):
        ends = torch.randint(0, sequence, (2, size), generator=generator).sort(0).values
        if size > 1:
            ends[:, -1] = sequence
        return {**given, "start_positions": ends[0], "end_positions": ends[1]}
    scored = "labels" in inputs and inputs["labels"].default is not inspect.Parameter.empty
    scores = None
    if scored or "pixel_values" in given:
        scores, asked = _scores(model, {name: x[:2] for name, x in given.items()}, set(inputs))
        if asked:
            given[asked] = torch.randint(0, 2, (size,), generator=generator)
            scores, _ = _scores(model, {name: x[:2] for name, x in given.items()}, set(inputs))
    if "labels" not in inputs:
        return given
    if scores is not None and scores.dim() == 2:
        return {**given, **_labels_of_rows(model, given, scores, generator)}
    if "input_ids" not in given:
        return given
    ids = given["input_ids"]
    known = ids if scores is None or scores.dim() < 2 else ids % scores.shape[-1]
    labels = torch.where(torch.rand(size, sequence, generator=generator) < 0.3, IGNORED, known)
    if size > 1:
        half = (size + 1) // 2
        labels[half:] = IGNORED
        labels[half, sequence // 2] = known[half, sequence // 2]
    return {**given, "labels": labels}


def _labels_of_rows(
    model: nn.Module, given: Mapping[str, Tensor], scores: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """{"labels": one per row, "input_ids" and their mask: with padding at the end of every other row}."""
    size, classes = len(next(iter(given.values()))), scores.shape[1]
    labels = (
        torch.randint(0, classes, (size,), generator=generator)
        if classes > 1
        else torch.randn(size, generator=generator).to(scores.dtype)
    )
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    if padding is None or "input_ids" not in given:
        return {"labels": labels}
    ids = given["input_ids"].clone()
    ids[::2, ids.shape[1] - ids.shape[1] // 4 :] = padding
    mask = (ids != padding).long()
    masks = (
        {"attention_mask": mask} if "attention_mask" in inspect.signature(model.forward).parameters else {}
    )
    return {"input_ids": ids, **masks, "labels": labels}


def _image(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of a model's images, as its config has them."""
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", 32)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return getattr(config, "num_channels", 3), height, width


@torch.no_grad()
def _scores(
    model: nn.Module, given: Mapping[str, Tensor], inputs: Collection[str]
) -> tuple[Tensor | None, str | None]:
    """(What the model gives without labels: scores of tokens [rows, sequence, classes] or of rows [rows,
    classes]; one of `inputs` that it says it misses). A copy runs, so that nothing of the model moves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a process whose other threads have worked cannot be forked
    try:
        copied = copy.deepcopy(model).eval()
        with as_authored(copied):
            output = copied(**given)
    # it may need more; the labels are then those of tokens, and what is wrong shows where the model is run
    except Exception as error:
        missed = re.match(r"`?(\w+)`? (must|has to|should) be (provided|given|passed|specified)", str(error))
        asked = missed[1] if missed and missed[1] in inputs and missed[1] not in given else None
        return None, asked
    finally:
        torch.set_num_threads(threads)
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named, None
    floats = (x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point())
    return next(floats, None), None


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
