"""Configs made tiny: every kind of layer stays, relations that the class asks for hold, and what it misses is
named."""

import pytest

from tedfx.errors import ConfigError
from tedfx.verification.config_fields import Open
from tedfx.verification.config_repairs import Refusal, repairs, resized
from tedfx.verification.models import ByType
from tedfx.verification.tiny_config import _kept
from tests.marks import slow


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
    sizes = [tried["own"]["head"] for tried in resized(small, wide, {"head", "nope", "rope"})]
    assert 20 in sizes and 64 in sizes and 192 not in sizes
    first = next(resized(small, wide, {"hidden", "heads"}))
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


def test_fields_that_a_refusal_names_get_a_value_before_sizes_change():
    small, wide = (
        {"hidden": 32, "top": None, "own": {"width": None}},
        {"hidden": 64, "top": Open((2,)), "theta": Open((1e4,), field=False), "own": {"width": Open((8, 4))}},
    )
    tried = list(repairs(small, wide, Refusal("run", "no width for hidden")))
    assert tried[:2] == [{**small, "own": {"width": 8}}, {**small, "own": {"width": 4}}]
    assert tried[2] == {**small, "hidden": 4}
    # named by the line alone; then what nobody names, but for an attribute that no config has
    assert list(repairs(small, wide, Refusal("run", "None", "c.theta")))[0] == {**small, "theta": 1e4}
    assert tried[-1] == {"hidden": 32, "top": 2, "own": {"width": 8}} and all("theta" not in t for t in tried)


def test_a_field_without_a_default_is_given_one():
    made = config("lfm2_moe")  # its class indexes layer_types, which is None
    assert set(made.layer_types) == {"full_attention", "conv"}
    assert made.num_dense_layers == 1


@pytest.mark.parametrize(
    "model_type, fields",
    [
        (
            "deepseek_v2",
            {"num_experts_per_tok": 2, "n_routed_experts": 8},
        ),  # a mixture's own, without a value
        slow("flex_olmo", {"num_experts": 8}),  # 7, which no mesh divides
        slow("gemma4_text", {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2}),
        slow("hunyuan_v1_moe", {"num_experts": 8, "head_dim": 8}),  # one expert; a width that its line names
        slow("step3p7", {"sliding_window": 6}),  # only the run says so
        slow("flint", {"mlp_only_layers": [0]}),  # numbers of layers
        slow("switch_transformers", {"decoder_start_token_id": 0}),  # an attribute that the class misses
        slow("dbrx", {"rope_theta": 10000.0}),
        slow("nllb-moe", {"encoder_layers": 2, "decoder_layers": 2, "encoder_sparse_step": 2}),
    ],
)
def test_a_mixture_that_builds_and_runs(model_type, fields):
    made = config(model_type)
    for part in (made, getattr(made, "text_config", None), getattr(made, "attn_config", None)):
        fields = {name: value for name, value in fields.items() if getattr(part, name, None) != value}
    assert not fields


@pytest.mark.slow
def test_rotary_sections_fit_the_head():
    from tedfx.verification.config_repairs import refusal, tiny

    for name in ("glm4v_moe", "ernie4_5_vl_moe"):
        made = type(config(name))
        found, small, _ = tiny(made)
        assert refusal(found, small, None) is None


def test_what_has_no_value_is_named_where_it_does_not_build():
    with pytest.raises(
        ConfigError,
        match=r"does not build from its config made tiny .*--set KEY=VALUE \| its default has no value for "
        r"layer_types$",
    ):
        ByType("lfm2_moe", {"layer_types": None})()
