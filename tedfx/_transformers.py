"""Every private thing of transformers that tedfx uses to give weights to a model and to write them, in one
place.

The library is never loaded from here for a model that is not its own. What is used (releases 5.17 to 5.23): a
model's `initialize_weights` and `all_tied_weights_keys`, the dtypes that it keeps whatever dtype it is loaded
in, the weight conversions between checkpoints and modules (`conversion_mapping`, `core_model_loading`), and
what a model says to ignore in a checkpoint, and the hooks that record outputs (`utils.output_capturing`).
Public replacement of all of it: none; `from_pretrained` and `save_pretrained` hold whole models.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from tedfx.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_pretrained(module: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Whether this is a model of the library. It cannot exist unless the library is loaded."""
    return "transformers" in sys.modules and isinstance(module, sys.modules["transformers"].PreTrainedModel)


# The attribute in which a model remembers that the hooks below are there.
RECORDING = "_output_capturing_hooks_installed"


def install_recording_hooks(model: nn.Module) -> None:
    """What the first call that records outputs (a router's scores, for one) installs on a model's modules."""
    from transformers.utils import output_capturing

    records = lambda f: getattr(f, "__globals__", None) is vars(output_capturing)
    for module in model.modules():
        if records(inspect.unwrap(type(module).forward, stop=records)):
            # it asks for no more of a model than any module has
            output_capturing.maybe_install_capturing_hooks(cast("PreTrainedModel", module))


def tied(model) -> dict[str, str]:
    """{name: the name that it is tied to}."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def dtype_plan(model, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """{parameter: its dtype} for those that `from_pretrained(dtype=dtype)` would load in another
    (`_keep_in_fp32_modules` and its strict form)."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    if not plan:
        return {}
    pattern, names, _ = build_glob_alternation(list(plan))
    found = {name: pattern.search(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: plan[names[match.lastgroup]] for name, match in found.items() if match}


# ---- from a checkpoint's names to the model's --------------------------------------------------------------


@dataclass
class Recipe:
    """How one converter makes its targets: `sources` by pattern, in the order in which the library collects
    them.

    converter: None for a tensor that is only renamed. first: the name under which the library files it.
    """

    first: str
    converter: Any
    sources: dict[str, list[str]]

    def convert(self, tensors: Mapping[str, Tensor], model) -> dict[str, Tensor]:
        """The library's own operations on the whole source tensors: {target: tensor}."""
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                converter.add_tensor(self.first, name, pattern, tensors[name])
        made = converter.convert(self.first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def recipes(model, names: Sequence[str]) -> tuple[list[Recipe], list[str], list]:
    """How the tensors of a checkpoint become the model's: recipes, names that fit nowhere, the conversions
    that were used."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    wanted = {name: True for name in model.state_dict()}
    found: dict[str, Recipe] = {}
    unexpected: list[str] = []
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if renamed not in wanted and name in wanted:
            renamed, pattern = rename_source_key(name, [], [], model.base_model_prefix, wanted)
        if renamed not in wanted:
            unexpected.append(name)
            continue
        recipe = found.setdefault(
            renamed, Recipe(renamed, by_pattern[pattern] if pattern is not None else None, {})
        )
        if recipe.converter is not (by_pattern[pattern] if pattern is not None else None) or (
            pattern is None and recipe.sources
        ):
            unexpected.append(name)  # a second tensor for the same place
            continue
        recipe.sources.setdefault(pattern or name, []).append(name)
    info = SimpleNamespace(missing_keys=set(), unexpected_keys=set(unexpected))
    model._adjust_missing_and_unexpected_keys(info)
    used = [entry for entry in mapping if entry.was_used()]
    return list(found.values()), [name for name in unexpected if name in info.unexpected_keys], used


def steps(recipe: Recipe, model) -> list[tuple[str, Any]] | None:
    """The operations of a recipe as (kind, ..) where all are plain movements of whole blocks, else None.

    ("stack", dim), ("cat", dim), ("chunk", dim), ("swap", (dim0, dim1)).
    """
    from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose

    found = []
    for op in recipe.converter.operations:
        if type(op) is MergeModulelist:
            found.append(("stack", op.dim))
        elif type(op) is Concatenate:
            found.append(("cat", op.dim))
        elif type(op) is Chunk and op.num_shards_attribute is None:
            found.append(("chunk", op.dim))
        elif type(op) is Transpose and not op.check_dims:
            found.append(("swap", (op.dim0, op.dim1)))
        else:
            return None
    return found


# ---- and back ----------------------------------------------------------------------------------------------


def save_groups(model, names: Sequence[str], conversions: list | None) -> list[list[str]]:
    """The model's names in groups that are converted together on the way to a checkpoint, in the library's
    order."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        PrefixChange,
        WeightConverter,
        dot_natural_key,
        rename_source_key,
    )

    if conversions is None:
        conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = [
            c
            for c in get_model_conversion_mapping(model, add_legacy=False)
            if not isinstance(c, PrefixChange)
        ]
    back = [c.reverse_transform() for c in conversions[::-1]]
    converters = [c for c in back if isinstance(c, WeightConverter)]
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, [], converters)
        groups.setdefault(renamed if pattern is not None else name, []).append(name)
    return list(groups.values())


def to_checkpoint(model, tensors: dict[str, Tensor], conversions: list | None) -> dict[str, Tensor]:
    """What the library would write for these of the model's tensors."""
    from transformers.core_model_loading import revert_weight_conversion

    with _conversions(model, conversions):
        return revert_weight_conversion(model, dict(tensors))


@contextlib.contextmanager
def _conversions(model, conversions: list | None) -> Iterator[None]:
    had = "_weight_conversions" in vars(model)
    was = vars(model).get("_weight_conversions")
    try:
        if conversions is not None:
            model._weight_conversions = conversions
        yield
    finally:
        if had:
            model._weight_conversions = was
        else:
            vars(model).pop("_weight_conversions", None)


def ignored_on_save(model) -> set[str]:
    return set(model._keys_to_ignore_on_save or ())


def check_savable(model) -> None:
    """ConfigError for a model whose folder would need more than configs and weights."""
    if model.is_remote_code():
        raise ConfigError(
            f"save_pretrained: the code of {type(model).__name__} lies outside transformers "
            "(trust_remote_code) and would have to be copied along; use gather_parameters()"
        )


def save_configs(model, dtype: torch.dtype, folder: str) -> None:
    """config.json and generation_config.json as the library's own `save_pretrained` writes them; the model is
    not touched."""
    config = copy.deepcopy(model.config)
    config.dtype = str(dtype).split(".")[1]
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        copy.deepcopy(model.generation_config).save_pretrained(folder)
