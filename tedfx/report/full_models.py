"""The model that `tedfx explain` is asked for, in its full size, on the meta device."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from typing import Any

import torch

from tedfx.arguments import parse_overrides
from tedfx.errors import ConfigError


def make_model(options) -> tuple[Any, dict[str, Any] | None, str]:
    """(module, example inputs or None, its name) of what the command line asks for, on the meta device."""
    overrides = parse_overrides(options.overrides)
    if options.layers is not None:
        overrides["num_hidden_layers"] = options.layers
    made = (
        _from_factory(options.model, overrides)
        if ":" in options.model
        else _from_library(options.model, overrides, options.dtype)
    )
    model, inputs = made if isinstance(made, tuple) else (made, None)
    model.train(not options.eval)
    return model, inputs, type(model).__name__


def _from_factory(spec: str, arguments: dict[str, Any]):
    module, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory: Any = importlib.import_module(module)
        for part in name.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError) as error:
        missing = (
            isinstance(error, ModuleNotFoundError)
            and error.name
            and (module + ".").startswith(error.name + ".")
        )
        hint = (
            f"; modules are looked for in the working directory, {os.getcwd()}, and where Python finds "
            "its own"
            if missing
            else ""
        )
        raise ConfigError(f"{spec}: {error}{hint}") from None
    try:
        with torch.device("meta"):
            made = factory(**arguments)
    except Exception as error:
        raise ConfigError(
            f"{spec}({', '.join(f'{k}={v!r}' for k, v in arguments.items())}) raised "
            f"{type(error).__name__}: {_brief(error)}"
        ) from error
    if not isinstance(made[0] if isinstance(made, tuple) else made, torch.nn.Module):
        raise ConfigError(
            f"{spec} returned a {type(made).__name__}, not a torch.nn.Module (or a tuple of one and a "
            "dict of example inputs)"
        )
    return made


def _from_library(model_type: str, overrides: dict[str, Any], dtype: str):
    try:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise ConfigError(
            f"{model_type!r} is a model type of transformers, which is not installed: pip install "
            "'tedfx[hf]', or pass package.module:factory"
        ) from None
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()), 4)
        hint = (
            f"; did you mean {' or '.join(near)}?"
            if near
            else "; it is a name such as mixtral, qwen3_moe, deepseek_v3 or llama"
        )
        raise ConfigError(
            f"{model_type!r} is not a model type of transformers, nor package.module:factory{hint}"
        )
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ConfigError(f"--dtype {dtype!r} is no floating dtype; such as float32 or bfloat16")
    plain = AutoConfig.for_model(model_type)
    _check_overrides(plain, overrides, model_type)
    if hasattr(plain, "output_router_logits") and "output_router_logits" not in overrides:
        overrides = {**overrides, "output_router_logits": True}
    try:
        config = AutoConfig.for_model(model_type, **overrides)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=kind)
    except Exception as error:
        raise ConfigError(
            f"{model_type} with {overrides or 'its default config'}: {type(error).__name__}: {_brief(error)}"
        ) from error


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 240 else text[:238] + ".."


def _check_overrides(config, overrides: dict[str, Any], where: str) -> None:
    known = set(config.to_dict()) | set(getattr(config, "attribute_map", {}) or {})
    for key, value in overrides.items():
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), 3)
            raise ConfigError(
                f"--set {key}: the config of {where} has no such entry"
                + (f"; did you mean {' or '.join(near)}?" if near else "")
            )
        default = getattr(config, key, None)
        if isinstance(value, dict) and hasattr(default, "to_dict"):
            _check_overrides(default, value, f"{where}.{key}")
        elif isinstance(default, (bool, int, float)) and value is not None:
            number = (
                isinstance(value, bool)
                if isinstance(default, bool)
                else isinstance(value, (int, float)) and not isinstance(value, bool)
            )
            if not number or (isinstance(default, int) and isinstance(value, float)):
                raise ConfigError(
                    f"--set {key}={value}: expected a value like {default!r}, which is its default"
                )
