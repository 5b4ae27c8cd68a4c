"""Fields of a config that its default leaves without a value, or without a usable one, and what a class that
asks for them gets."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Tree = dict[str, Any]

# Beside the small sizes, by the end of a field's name.
_USUAL = {"kv_heads": 1, "budget": 8, "compress_ratio": 2, "token_id": 0, "clip_qkv": 8}
# Of attributes that classes read although their config does not have them.
_ATTRIBUTES = {"rope_theta": 10000.0, "decoder_start_token_id": 0, "pad_token_id": 0}


@dataclass(frozen=True)
class Open:
    """Values to try, in this order.

    field: of the config; else an attribute, which nobody misses unless the class says so.
    """

    values: tuple
    field: bool = True


def open_fields(
    config, fields: Mapping[str, Any], sizes: Mapping[str, int], layers: int, most: int
) -> dict[str, Open]:
    """{field: the values that it may get} of a config with `fields` and as many `layers`, up to `most` where
    fewer do not show every kind."""
    found = {
        name: Open((value,), field=False) for name, value in _ATTRIBUTES.items() if not hasattr(config, name)
    }
    known = {**sizes, **_USUAL}
    for name, value in fields.items():
        if value is not None:
            continue
        if name.endswith("layer_types"):
            kinds = layer_kinds(type(config), name)
            shown = itertools.islice(itertools.cycle(kinds), min(max(layers, len(kinds)), most))
            found |= {name: Open((list(shown),))} if kinds else {}
        else:
            usual = [end for end in known if name == end or name.endswith(f"_{end}")]
            found |= {name: Open((known[max(usual, key=len)],))} if usual else {}
    if "mrope_section" in (getattr(config, "ignore_keys_at_rope_validation", None) or ()):
        width = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
        rope = dict(fields.get("rope_parameters") or {})
        found["rope_parameters"] = Open(
            tuple({**rope, "mrope_section": [a, a, total - 2 * a]} for total, a in _sections(width // 2))
        )
    return found


def _sections(width: int) -> list[tuple[int, int]]:
    """(sum, first of three) of sections of rotary frequencies, for the width of a head and parts of it."""
    return [(width >> k, a) for k in range(3) for a in range((width >> k) // 2, 0, -1)]


@functools.cache
def layer_kinds(config_class: type, name: str) -> list[str]:
    """The kinds of layers that transformers knows and that the class's own files name."""
    from transformers import configuration_utils as known

    allowed = known.ALLOWED_MLP_LAYER_TYPES if "mlp" in name else known.ALLOWED_ATTN_LAYER_TYPES
    of = config_class.__module__
    text = "".join(
        inspect.getsource(importlib.import_module(module))
        for module in (of, of.replace("configuration_", "modeling_"))
    )
    return [kind for kind in allowed if re.search(rf"[\"']{kind}[\"']", text)]


def unset(config, above: str = "") -> list[str]:
    """Fields of a default config that have no value: a class that does not build may want them."""
    found = []
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            found += unset(value, f"{above}{name}.")
        elif value is None and name in getattr(type(config), "__annotations__", {}):
            found.append(above + name)
    return found
