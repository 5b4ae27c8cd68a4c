"""Small models to verify with: any Hugging Face model type shrunk by its config's own fields, or a user's factory.

`factory("mixtral")` and `factory("package.module:function")` give something picklable that makes the model; ranks on other
processes make it anew, with the same seed and hence the same weights.
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

# The model types that are verified on every mesh (`--all-models`).
VERIFIED = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "deepseek_v3", "gpt_oss", "llama")

# Sizes by the names that configs use. A field is only ever made smaller, except where its own default is a marker.
_SMALL = {
    ("hidden_size", "d_model", "n_embd"): 32,
    ("num_hidden_layers", "n_layers", "n_layer", "num_layers"): 2,
    ("vocab_size",): 64,
    ("max_position_embeddings", "max_seq_len", "n_positions"): 256,
    ("num_attention_heads", "n_heads", "n_head"): 4,
    ("head_dim", "kv_channels", "qk_rope_head_dim"): 8,
    ("intermediate_size", "ffn_hidden_size", "n_inner"): 48,
    ("moe_intermediate_size",): 24,
    ("shared_expert_intermediate_size",): 40,
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"): 8,
    ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k"): 2,
    ("n_group",): 4,
    ("topk_group",): 2,
    ("n_shared_experts", "moe_num_shared_experts", "first_k_dense_replace", "moe_layer_end_index"): 1,
    ("q_lora_rank",): 20,
    ("kv_lora_rank",): 16,
    ("qk_nope_head_dim",): 12,
    ("v_head_dim",): 10,
    ("sliding_window",): 6,
}
_SIZES = {name: size for names, size in _SMALL.items() for name in names}


def shrink(config) -> dict[str, Any]:
    """Overrides that make a config tiny and deterministic, by its standard fields; nested configs become dicts."""
    fields, small = vars(config), {}
    for name in {*_SIZES, *fields}:
        value = getattr(config, name, None)
        if name in _SIZES and isinstance(value, int) and not isinstance(value, bool):
            small[name] = min(value, _SIZES[name])
        elif hasattr(value, "to_dict"):
            small[name] = shrink(value)
        elif isinstance(value, float) and any(word in name for word in ("dropout", "pdrop", "jitter")):
            small[name] = 0.0
    layers = next((small[n] for n in ("num_hidden_layers", "n_layers", "n_layer", "num_layers") if n in small), 2)
    for name in ("num_key_value_heads", "kv_n_heads"):
        if isinstance(getattr(config, name, None), int):
            heads = getattr(config, "num_attention_heads", None)
            small[name] = 4 if getattr(config, name) == heads else 2
    if isinstance(fields.get("layer_types"), (list, tuple)):
        kinds = list(dict.fromkeys(fields["layer_types"]))
        small["layer_types"] = [kinds[i % len(kinds)] for i in range(layers)]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id"):
        if isinstance(fields.get(name), int) and fields[name] >= small.get("vocab_size", 64):
            small[name] = None
    if hasattr(config, "output_router_logits"):
        small["output_router_logits"] = True  # and with it the auxiliary loss
    return small


@dataclass(frozen=True)
class ByType:
    """A tiny model of a Hugging Face type, with random weights; constants (norms, biases) are perturbed to show mistakes."""

    model_type: str
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        config = self.config()
        try:
            model = AutoModelForCausalLM.from_config(config)
        except Exception as error:  # noqa: BLE001  whatever a model class says to a config
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ConfigError(f"{self.model_type}: its class does not build from its config made tiny ({said}): give the fields it misses with --set KEY=VALUE") from error
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
        small = shrink(default)
        known = {*vars(default), *small, *getattr(type(default), "attribute_map", {})}
        for key in self.overrides:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                raise ConfigError(f"--set {key}: {type(default).__name__} has no such field" + (f"; did you mean {near[0]}?" if near else ""))
        try:
            return type(default)(**_merge(small, self.overrides))
        except Exception as error:  # noqa: BLE001  whatever a config class says to a value
            raise ConfigError(f"{self.model_type} with {dict(self.overrides)}: {type(error).__name__}: {' '.join(str(error).split())}") from None


def _merge(small: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    nested = lambda key: isinstance(small.get(key), Mapping) and isinstance(overrides[key], Mapping)  # noqa: E731
    return {**small, **{key: _merge(small[key], value) if nested(key) else value for key, value in overrides.items()}}


def _default_config(model_type: str):
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        raise ConfigError(f"model type {model_type!r} needs transformers: pip install 'tedfx[hf]'") from None
    key = model_type.replace("-", "_").lower()
    if key not in CONFIG_MAPPING:
        near = difflib.get_close_matches(key, list(CONFIG_MAPPING), 3)
        raise ConfigError(f"unknown model type {model_type!r}{': did you mean ' + ' or '.join(near) + '?' if near else ''}; for a model of your own pass package.module:factory")
    return CONFIG_MAPPING[key]()


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
            found = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{self.path}: {error}") from None
        return found(**self.arguments)


def factory(text: str, overrides: Mapping[str, Any] | None = None) -> Callable[[], nn.Module]:
    """From what stands on the command line: a model type, or `package.module:function`."""
    return (ByPath if ":" in text else ByType)(text, dict(overrides or {}))

