"""Small models to verify with: any Hugging Face model type shrunk by its config's own fields, or a user's
factory.

`factory("mixtral")` and `factory("package.module:function")` give something picklable that makes the model;
ranks on other processes make it anew, with the same seed and hence the same weights.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tedfx.errors import ConfigError
from tedfx.verification.config_fields import unset
from tedfx.verification.config_repairs import tiny
from tedfx.verification.heads import auto_class

# The model types that are verified on every mesh (`--all-models`).
VERIFIED = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "deepseek_v3", "gpt_oss", "llama")


@dataclass(frozen=True)
class ByType:
    """A tiny model of a Hugging Face type, with random weights; constants (norms, biases) are perturbed to
    show mistakes."""

    model_type: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    head: str | None = None  # a key of `heads.HEADS`; None: the first that the type has

    def __call__(self) -> nn.Module:
        config = self.config()
        build = auto_class(type(config), self.head)
        try:
            model = build.from_config(config)
        except Exception as error:  # whatever a model class says to a config
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            missing = unset(_default_config(self.model_type))
            raise ConfigError(
                f"{self.model_type}: its class does not build from its config made tiny ({said}): give "
                "the fields it misses with --set KEY=VALUE"
                + (f" | its default has no value for {', '.join(missing)}" if missing else "")
            ) from error
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() <= 1 or "bias" in name:
                    p.add_(torch.randn_like(p) * 0.1)
            for name, b in model.named_buffers():
                if "bias" in name:
                    b.add_(torch.randn_like(b) * 0.1)
        return model

    def config(self):
        default = _default_config(self.model_type)
        made, small, part = tiny(type(default), self.head)
        known = {*vars(default), *small, *getattr(type(default), "attribute_map", {})}
        for key in self.overrides:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                raise ConfigError(
                    f"--set {key}: {type(default).__name__} has no such field"
                    + (f"; did you mean {near[0]}?" if near else "")
                )
        try:
            given = dict(self.overrides)
            inside = {} if part is None else given.pop(part, {})
            return made(**_merge(small, given | inside))
        except Exception as error:  # whatever a config class says to a value
            raise ConfigError(
                f"{self.model_type} with {dict(self.overrides)}: {type(error).__name__}: "
                f"{' '.join(str(error).split())}"
            ) from None


def _merge(small: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    nested = lambda key: isinstance(small.get(key), Mapping) and isinstance(overrides[key], Mapping)
    return {
        **small,
        **{key: _merge(small[key], value) if nested(key) else value for key, value in overrides.items()},
    }


def _default_config(model_type: str):
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        raise ConfigError(f"model type {model_type!r} needs transformers: pip install 'tedfx[hf]'") from None
    plain = lambda name: name.replace("-", "_").lower()
    known = {plain(name): name for name in CONFIG_MAPPING.keys()}
    if plain(model_type) not in known:
        near = difflib.get_close_matches(model_type, list(known.values()), 3)
        raise ConfigError(
            "unknown model type "
            f"{model_type!r}{': did you mean ' + ' or '.join(near) + '?' if near else ''}; for a model "
            "of your own pass package.module:factory"
        )
    return CONFIG_MAPPING[known[plain(model_type)]]()


@dataclass(frozen=True)
class ByPath:
    """A user's factory, `package.module:function`, found from the working directory as python would."""

    path: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self):
        module, _, name = self.path.partition(":")
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{self.path}: {error}") from None
        return found(**self.arguments)


def factory(
    text: str, overrides: Mapping[str, Any] | None = None, head: str | None = None
) -> Callable[[], nn.Module]:
    """From what stands on the command line: a model type and its head, or `package.module:function`."""
    if ":" in text:
        if head is not None:
            raise ConfigError(f"--head {head}: {text} is a factory, which makes the whole model")
        return ByPath(text, dict(overrides or {}))
    return ByType(text, dict(overrides or {}), head)
