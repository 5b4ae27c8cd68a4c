"""A Hugging Face config made tiny by its own fields, so that its class still accepts it.

Every field of a known name gets a small size; of a list with one entry per layer, and of a config per layer,
the layers stay that show every kind. Where the class then refuses, the fields that its refusal names are
tried at other small sizes.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from tedfx.verification.heads import auto_class

# Sizes by the names that configs use. A field is only ever made smaller.
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
    ("mamba_d_state", "state_size"): 16,
    ("mamba_chunk_size", "chunk_size"): 6,  # fewer than a row's tokens: state goes from chunk to chunk
}
_SIZES = {name: size for names, size in _SMALL.items() for name in names}
_LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
_MOST_LAYERS = 4  # where two do not show every kind of layer
_TRIES = 2000  # configs that a refusal may cost
_REPAIRS = 4

Tree = dict[str, Any]


def shrink(config) -> tuple[Tree, Tree]:
    """(overrides that make a config tiny and deterministic, by its standard fields; the integers they are
    made from): nested configs are dicts in both."""
    varied = getattr(config, "is_heterogeneous", False)  # transformers.integrations.heterogeneity
    if varied:  # what varies per layer is read from the layers; here, what the other layers have
        config.allow_global_per_layer_attribute_access = True
    fields = dict(vars(config))
    small, wide = _sizes({*_SIZES, *fields}, lambda name: getattr(config, name, None))
    for name, value in fields.items():
        if hasattr(value, "to_dict"):
            small[name], wide[name] = shrink(value)
        elif isinstance(value, float) and any(word in name for word in ("dropout", "pdrop", "jitter")):
            small[name] = 0.0
    per_layer = config.to_dict()["per_layer_config"] if varied else None
    _shrink_layers(config, fields, per_layer, small, wide)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id"):
        if isinstance(fields.get(name), int) and fields[name] >= small.get("vocab_size", 64):
            small[name] = None
    if hasattr(config, "output_router_logits"):
        small["output_router_logits"] = True  # and with it the auxiliary loss
    return small, wide


def _sizes(names, read: Callable[[str], Any]) -> tuple[Tree, Tree]:
    wide = {name: value for name in names if _is_size(value := read(name))}
    small = {name: min(value, _SIZES[name]) for name, value in wide.items() if name in _SIZES}
    for name in sorted(wide.keys() - small.keys()):  # vocab_size_per_layer_input is as large as vocab_size
        same = {known for known in small if name.startswith(known) and wide[name] == wide[known]}
        small.update({name: small[known] for known in same})
    for name in ("num_key_value_heads", "kv_n_heads"):
        if name in wide:
            small[name] = min(wide[name], 4 if wide[name] == read("num_attention_heads") else 2)
    return small, wide


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shrink_layers(
    config, fields: Tree, per_layer: Mapping[str, Tree] | None, small: Tree, wide: Tree
) -> None:
    """Lists with an entry per layer, and configs per layer: cut to layers that show every kind."""
    name = next((n for n in _LAYERS if n in small), None)
    if name is None:
        return
    layers, owned = wide[name], {int(i): values for i, values in (per_layer or {}).items()}
    lists = {key: list(value) for key, value in fields.items() if isinstance(value, (list, tuple))}
    lists = {key: v for key, v in lists.items() if len(v) == layers and v != list(range(layers))}
    shown = {**lists, "per_layer_config": [owned.get(i) for i in range(layers)]}
    kinds = [{(key, repr(values[i])) for key, values in shown.items()} for i in range(layers)]
    kept = _kept(kinds, small[name])
    small.update({n: len(kept) for n in _LAYERS if n in small})
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
    while left and (len(kept) < count or missing and len(kept) < _MOST_LAYERS):
        kept.append(max(left, key=lambda i: len(kinds[i] & missing)))
        left.remove(kept[-1])
        missing -= kinds[kept[-1]]
    return sorted(kept)


# ---- what the class refuses --------------------------------------------------------------------------------


@functools.cache
def tiny(config_class: type, head: str | None = None) -> tuple[type, Tree, str | None]:
    """(config class, overrides that it accepts, the field of `config_class` that it is, else None).

    head: of the model, see `tedfx.verification.heads`.

    Where nothing that is tried is accepted, the overrides are those of the rules alone, and building the
    model says what is wrong.
    """
    default = config_class()
    small, wide = shrink(default)
    accepted = _accepted(config_class, small, wide, head)
    if accepted is not None:
        return config_class, accepted, None
    part = default.get_text_config(decoder=True)
    if part is not default:  # widths of encoders that the language model does not have need not fit then
        accepted = _accepted(type(part), *shrink(part), head)
        if accepted is not None:
            return type(part), accepted, next(name for name, value in vars(default).items() if value is part)
    return config_class, small, None


def _accepted(config_class: type, small: Tree, wide: Tree, head: str | None) -> Tree | None:
    """`small`, with the fields changed that the class's refusals name; None where that does not help."""
    said, seen = _refusal(config_class, small, head), set()
    for _ in range(_REPAIRS):
        if said is None:
            return small
        seen.add(said)
        other = None
        for tried in itertools.islice(_repairs(small, wide, set(re.findall(r"\w+", said))), _TRIES):
            now = _refusal(config_class, tried, head)
            if now is None:
                return tried
            other = other or ((tried, now) if now not in seen else None)
        if other is None:
            return None
        small, said = other
    return None


def _refusal(config_class: type, small: Tree, head: str | None) -> str | None:
    """What the config's class or the model's says to these overrides."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            auto_class(config_class, head).from_config(config_class(**small))
    except Exception as error:  # whatever a class says to a value
        return str(error)
    return None


def _repairs(small: Tree, wide: Tree, words: set[str]) -> Iterator[Tree]:
    """Other small sizes of one or two named fields of one config: halvings of its default, sums of others.

    Fields that still have their default come first, the largest first.
    """
    for key, below in wide.items():
        if isinstance(below, dict) and key in small:
            for repaired in _repairs(small[key], below, words):
                yield {**small, key: repaired}
    named = (n for n, value in wide.items() if n in words and _is_size(value) and value > 0)
    names = sorted(named, key=lambda n: (n in small, -wide[n]))
    now = {n: small.get(n, wide[n]) for n in names}
    options = {}
    for name in names:
        halvings = itertools.takewhile(lambda size: size >= 1, (wide[name] >> k for k in itertools.count()))
        exact = {size for k, size in enumerate(halvings) if size << k == wide[name]}
        sums = {now[a] + now[b] for a, b in itertools.combinations([n for n in names if n != name], 2)}
        options[name] = sorted((exact | sums) - {now[name]}, key=lambda size: max(size / 4, 4 / size))
    for count in (1, 2):
        for changed in itertools.combinations(names, count):
            for sizes in itertools.product(*(options[n] for n in changed)):
                yield {**small, **dict(zip(changed, sizes))}


def unset(config, above: str = "") -> list[str]:
    """Fields of a default config that have no value: a class that does not build may want them."""
    found = []
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            found += unset(value, f"{above}{name}.")
        elif value is None and name in getattr(type(config), "__annotations__", {}):
            found.append(above + name)
    return found
