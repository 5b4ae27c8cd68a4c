"""A Hugging Face config made tiny by its own fields.

Every field of a known name gets a small size; of a list with one entry per layer, and of a config per layer,
the layers stay that show every kind. Experts that a config leaves out are brought in. What the class then
refuses is the matter of `tedfx.verification.config_repairs`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tedfx.verification.config_fields import Tree, open_fields

# Sizes by the names that configs use. A field is only ever made smaller, but for the counts of experts.
_SMALL = {
    ("hidden_size", "d_model", "n_embd"): 32,
    ("num_hidden_layers", "n_layers", "n_layer", "num_layers"): 2,
    ("encoder_layers", "decoder_layers", "num_decoder_layers"): 2,
    ("vocab_size",): 64,
    ("max_position_embeddings", "max_seq_len", "n_positions"): 256,
    ("num_attention_heads", "n_heads", "n_head", "num_heads"): 4,
    ("encoder_attention_heads", "decoder_attention_heads"): 4,
    ("head_dim", "kv_channels", "qk_rope_head_dim", "d_kv"): 8,
    ("intermediate_size", "ffn_hidden_size", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"): 48,
    ("moe_intermediate_size",): 24,
    ("shared_expert_intermediate_size",): 40,
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"): 8,
    ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts"): 2,
    ("n_group",): 4,
    ("topk_group",): 2,
    ("n_shared_experts", "moe_num_shared_experts"): 1,
    ("first_k_dense_replace", "num_dense_layers", "moe_layer_end_index"): 1,
    ("num_sparse_encoder_layers", "num_sparse_decoder_layers"): 1,
    ("encoder_sparse_step", "decoder_sparse_step", "attn_layer_period"): 2,
    ("attn_layer_offset",): 1,
    ("q_lora_rank",): 20,
    ("kv_lora_rank",): 16,
    ("qk_nope_head_dim",): 12,
    ("v_head_dim",): 10,
    ("sliding_window",): 6,
    ("mamba_d_state", "state_size"): 16,
    ("mamba_chunk_size", "chunk_size"): 6,  # fewer than a row's tokens: state goes from chunk to chunk
}
SIZES = {name: size for names, size in _SMALL.items() for name in names}
# One expert is none to route to, and 7 divide no mesh: these are as many as their size says.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# What a mixture has, also where the default has no value.
_MIXTURE = {
    *_COUNTS,
    *("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts"),
    *("moe_intermediate_size", "n_shared_experts"),
}
_MIXTURE_FLAG = re.compile(r"(enable|use|with|has|is)_moe|moe_enabled")
LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
MOST_LAYERS = 4  # where two do not show every kind of layer


def shrink(config) -> tuple[Tree, Tree]:
    """(overrides that make a config tiny and deterministic, by its standard fields; what they are made from,
    integers and `config_fields.Open`): nested configs are dicts in both."""
    varied = getattr(config, "is_heterogeneous", False)  # transformers.integrations.heterogeneity
    if varied:  # what varies per layer is read from the layers; here, what the other layers have
        config.allow_global_per_layer_attribute_access = True
    fields = dict(vars(config))
    small, wide = _sizes({*SIZES, *fields}, lambda name: getattr(config, name, None))
    for name in [name for name in small if not _is_given(config, name)]:
        del small[name], wide[name]
    for name, value in fields.items():
        if hasattr(value, "to_dict"):
            small[name], wide[name] = shrink(value)
        elif isinstance(value, float) and any(word in name for word in ("drop", "jitter")):
            small[name] = 0.0
        elif name in _MIXTURE and value is None:
            small[name] = SIZES[name]
        elif value is False and _MIXTURE_FLAG.search(name):
            small[name] = True
    per_layer = config.to_dict()["per_layer_config"] if varied else None
    _shrink_layers(config, fields, per_layer, small, wide)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id"):
        if isinstance(fields.get(name), int) and fields[name] >= small.get("vocab_size", 64):
            small[name] = None
    if hasattr(config, "output_router_logits"):
        small["output_router_logits"] = True  # and with it the auxiliary loss
    layers = next((small[name] for name in LAYERS if name in small), 2)
    return small, {**open_fields(config, {**fields, **small}, SIZES, layers, MOST_LAYERS), **wide}


def _sizes(names, read: Callable[[str], Any]) -> tuple[Tree, Tree]:
    wide = {name: value for name in names if _is_size(value := read(name))}
    least = lambda name: 0 if name not in _COUNTS else SIZES[name]
    small = {n: max(least(n), min(value, SIZES[n])) for n, value in wide.items() if n in SIZES}
    for name in sorted(wide.keys() - small.keys()):  # vocab_size_per_layer_input is as large as vocab_size
        same = {known for known in small if name.startswith(known) and wide[name] == wide[known]}
        small.update({name: small[known] for known in same})
        if name.endswith("_intermediate_size") and name not in small:
            small[name] = min(wide[name], SIZES["intermediate_size"])
    for name in ("num_key_value_heads", "kv_n_heads"):
        if name in wide:
            small[name] = min(wide[name], 4 if wide[name] == read("num_attention_heads") else 2)
    return small, wide


def _is_given(config, name: str) -> bool:
    """Whether a config is made with this attribute, and not the attribute of others."""
    if not dataclasses.is_dataclass(config):
        return True
    return name in {f.name for f in dataclasses.fields(config)} or name in getattr(
        type(config), "attribute_map", {}
    )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shrink_layers(
    config, fields: Tree, per_layer: Mapping[str, Tree] | None, small: Tree, wide: Tree
) -> None:
    """Lists with an entry per layer, lists of numbers of layers, and configs per layer: cut to layers that
    show every kind."""
    name = next((n for n in LAYERS if n in small), None)
    if name is None:
        return
    layers, owned = wide[name], {int(i): values for i, values in (per_layer or {}).items()}
    lists = {key: list(value) for key, value in fields.items() if isinstance(value, (list, tuple))}
    numbers = {
        key: v for key, v in lists.items() if "layers" in key and v and all(i in range(layers) for i in v)
    }
    lists = {key: v for key, v in lists.items() if len(v) == layers and v != list(range(layers))}
    shown = {
        **lists,
        "per_layer_config": [owned.get(i) for i in range(layers)],
        **{key: [i in v for i in range(layers)] for key, v in numbers.items() if key not in lists},
    }
    kinds = [{(key, repr(values[i])) for key, values in shown.items()} for i in range(layers)]
    kept = _kept(kinds, small[name])
    small.update({n: len(kept) for n in LAYERS if n in small})
    small.update({key: [at for at, i in enumerate(kept) if i in v] for key, v in numbers.items()})
    # A list of one value is the class's own to make, of the sizes that are small now.
    for key, values in lists.items():
        if key == "layer_types" or len(set(map(repr, values))) > 1:
            small[key] = [values[i] for i in kept]
    if per_layer is None:
        return
    small["per_layer_config"], wide["per_layer_config"] = {}, {}
    for at, i in enumerate(kept):
        if i in owned:
            read = lambda n, own=owned[i]: own[n] if n in own else getattr(config, n, None)
            sizes, wide["per_layer_config"][at] = _sizes(owned[i], read)
            small["per_layer_config"][at] = {**owned[i], **sizes}


def _kept(kinds: Sequence[set], count: int) -> list[int]:
    """At least `count` layers, more where those do not show every kind; each is the first that adds most."""
    kept, left, missing = [], list(range(len(kinds))), set().union(*kinds)
    while left and (len(kept) < count or missing and len(kept) < MOST_LAYERS):
        kept.append(max(left, key=lambda i: len(kinds[i] & missing)))
        left.remove(kept[-1])
        missing -= kinds[kept[-1]]
    return sorted(kept)
