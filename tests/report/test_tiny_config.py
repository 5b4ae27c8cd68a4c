"""Configs made tiny: every kind of layer stays, relations that the class asks for hold, and what it misses is
named."""

import pytest

from tedfx.errors import ConfigError
from tedfx.verification.models import ByType
from tedfx.verification.tiny_config import _kept, _repairs


def config(model_type: str, **overrides):
    transformers = pytest.importorskip("transformers")
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    return ByType(model_type, overrides).config()


def test_layers_show_every_kind():
    kinds = [{"full", "dense"}, {"window", "dense"}, {"full", "sparse"}, {"window", "sparse"}]
    assert _kept(kinds, 2) == [0, 3]
    assert _kept([{"a"}, {"a"}, {"b"}, {"c"}, {"d"}, {"e"}], 2) == [0, 2, 3, 4]
    assert _kept([{"a"}] * 5, 2) == [0, 1]


def test_fields_that_a_refusal_names_are_halved_or_made_sums():
    small, wide = (
        {"hidden": 32, "own": {"head": 8, "nope": 12, "rope": 8}},
        {"hidden": 512, "heads": 128, "own": {"head": 256, "nope": 192, "rope": 64}},
    )
    sizes = [tried["own"]["head"] for tried in _repairs(small, wide, {"head", "nope", "rope"})]
    assert 20 in sizes and 64 in sizes and 192 not in sizes
    first = next(_repairs(small, wide, {"hidden", "heads"}))
    assert first == {**small, "heads": 4}  # what is not small yet, before what is


@pytest.mark.slow
def test_attributes_that_vary_per_layer():
    made = config("dots3_note")
    window = made.per_layer_config["sliding_attention"]
    assert made.layer_types == ["indexed_attention", "sliding_attention"] and made.mlp_layer_types == [
        "dense",
        "sparse",
    ]
    assert window.head_dim == window.qk_nope_head_dim + window.qk_rope_head_dim == 20
    assert config("dots3_note", text_config={"index_topk": 4}).index_topk == 4


def test_a_kind_of_mlp_is_a_kind_of_layer():
    made = config("deepseek_v4")
    assert (
        made.mlp_layer_types == ["hash_moe", "moe"]
        and len(set(made.layer_types)) == 2
        and made.num_key_value_heads == 1
    )


def test_a_relation_that_the_class_asks_for():
    made = config("granitemoehybrid")
    assert (
        made.hidden_size == 32
        and made.mamba_n_heads == 4
        and made.mamba_d_head * made.mamba_n_heads == made.mamba_expand * made.hidden_size
    )


def test_fields_without_a_default_are_named():
    made = config("lfm2_moe")
    assert made.layer_types is None
    with pytest.raises(
        ConfigError,
        match=r"does not build from its config made tiny .*--set KEY=VALUE \| its default has no value for "
        r"layer_types$",
    ):
        ByType("lfm2_moe")()
