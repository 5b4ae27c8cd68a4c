"""A folder of safetensors as `from_pretrained` reads it: which of its tensors make which of the model's, and
reading.

`nodes_of` looks at names, shapes and dtypes only and refuses, in one line, a folder that does not fit the
model; nothing is changed before it has returned. `Folder.reading()` opens files for the time of one target,
so that pages of a file that were looked at do not stay mapped.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from tedfx import _transformers
from tedfx.errors import ConfigError, TedfxError
from tedfx.state.lazy import Box, Node, Read, Source, from_recipe

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class CheckpointError(TedfxError):
    """A checkpoint is not there, cannot be read, or is not one of this model."""


def safe_open(file: str):
    """`safetensors.safe_open`, for torch tensors on the CPU."""
    try:
        import safetensors
    except ImportError:
        raise ConfigError(
            "reading safetensors needs the package of that name: pip install safetensors"
        ) from None
    try:
        return safetensors.safe_open(file, framework="pt", device="cpu")
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file, though {INDEX} lists it") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


class Folder:
    """A local folder with model.safetensors, or model.safetensors.index.json and its shards."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        if not os.path.isdir(self.path):
            raise CheckpointError(
                f"{self.path}: no such folder (a local one is needed; nothing is downloaded)"
            )
        single, index = os.path.join(self.path, SINGLE), os.path.join(self.path, INDEX)
        self.config = self._config()
        if os.path.isfile(single):
            files = [single]
        elif os.path.isfile(index):
            try:
                with open(index, encoding="utf-8") as f:
                    files = sorted(
                        {os.path.join(self.path, name) for name in json.load(f)["weight_map"].values()}
                    )
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index} is no index of shards: {error!r}") from error
        else:
            raise CheckpointError(f"{self.path} holds neither {SINGLE} nor {INDEX}")
        self.files: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with safe_open(file) as opened:
                for name in opened.keys():
                    self.files[name], self.shapes[name] = file, tuple(opened.get_slice(name).get_shape())

    def _config(self) -> dict:
        try:
            with open(os.path.join(self.path, "config.json"), encoding="utf-8") as f:
                return json.load(f)
        except (OSError, ValueError):
            return {}

    @contextlib.contextmanager
    def reading(self) -> Iterator[Read]:
        """`read(name, box)`: a box of a tensor, or with None all of it. Files that it opened are closed at
        the end."""
        with contextlib.ExitStack() as stack:
            opened: dict = {}

            def read(name: str, box: Box | None) -> Tensor:
                file = self.files[name]
                if file not in opened:
                    opened[file] = stack.enter_context(safe_open(file))
                return opened[file].get_slice(name)[box] if box else opened[file].get_tensor(name)

            yield read
            opened.clear()


def nodes_of(
    model: nn.Module, folder: Folder, wanted: Mapping[str, Tensor], groups: Iterable[tuple[str, ...]]
) -> tuple[dict[str, Node], list | None]:
    """({the model's name: node that makes it}, the conversions that were used).

    wanted: the model's names -> tensor of their shape and dtype. groups: names of which one is enough (those
    of one tied tensor). CheckpointError, in one line, where something is missing, too much, or of another
    shape.
    """
    if "quantization_config" in folder.config:
        raise CheckpointError(
            f"{folder.path}: the weights are quantized "
            f"({folder.config['quantization_config'].get('quant_method')}), which is not supported; "
            "dequantize them first"
        )
    nodes: dict[str, Node] = {}
    unexpected, used, problems, unmade = [], None, [], []
    if _transformers.is_pretrained(model):
        recipes, unexpected, used = _transformers.recipes(model, list(folder.files))
        for recipe in recipes:
            if recipe.converter is None:
                (source,) = (name for names in recipe.sources.values() for name in names)
                nodes[recipe.first] = Source(source, folder.shapes[source])
                continue
            dtype = wanted[recipe.first].dtype if recipe.first in wanted else torch.float32
            sources = [name for names in recipe.sources.values() for name in names]
            try:
                made = recipe.convert(
                    {name: torch.empty(folder.shapes[name], dtype=dtype, device="meta") for name in sources},
                    model,
                )
            except Exception as error:  # whatever an operation raises on shapes that do not fit
                problems.append(
                    f"{recipe.first} cannot be made of {sources[0]} and {len(sources) - 1} more: "
                    f"{' '.join(str(error).split())[:200]}"
                )
                unmade.append(recipe.first)
                continue
            nodes.update(from_recipe(recipe, folder.shapes, made, model))
    else:
        nodes = {name: Source(name, folder.shapes[name]) for name in folder.files if name in wanted}
        unexpected = [name for name in folder.files if name not in wanted]
    unexpected += [name for name in (*nodes, *unmade) if name not in wanted]
    made_or_not = {*nodes, *unmade}
    missing = [names[0] for names in groups if not made_or_not.intersection(names)]
    shapes = [
        f"{n} {node.shape}, expected {tuple(wanted[n].shape)}"
        for n, node in nodes.items()
        if n in wanted and node.shape != tuple(wanted[n].shape)
    ]
    problems += (
        [f"missing: {_few(missing)}"] * bool(missing)
        + [f"not in the model: {_few(unexpected)}"] * bool(unexpected)
        + [f"wrong shape: {_few(shapes)}"] * bool(shapes)
    )
    if problems:
        kind, mine = (
            folder.config.get("model_type"),
            getattr(getattr(model, "config", None), "model_type", None),
        )
        hint = (
            f" (its config.json says {kind}, the model is {mine})" if kind and mine and kind != mine else ""
        )
        raise CheckpointError(
            f"{folder.path} is not a checkpoint of this {type(model).__name__}{hint}: " + "; ".join(problems)
        )
    return nodes, used


def box_of(offsets: tuple[int, ...], shape: tuple[int, ...]) -> Box:
    return tuple(slice(o, o + n) for o, n in zip(offsets, shape))


def _few(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
