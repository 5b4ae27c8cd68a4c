"""Tiny models with random weights, one factory per family. `MODELS[name](**config_overrides)` is a model in
float32."""

from __future__ import annotations

import torch
import transformers as tf

BASE = dict(
    hidden_size=32,
    num_hidden_layers=2,
    vocab_size=64,
    max_position_embeddings=256,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def _make(model_class, config_class, defaults, overrides):
    torch.manual_seed(0)
    model = model_class(config_class(**{**BASE, **defaults, **overrides}))
    with torch.no_grad():  # biases, norms and router corrections start at constants that would hide mistakes
        for name, p in model.named_parameters():
            if p.dim() <= 1 or "bias" in name:
                p.add_(torch.randn_like(p) * 0.1)
        for name, b in model.named_buffers():
            if "bias" in name:
                b.add_(torch.randn_like(b) * 0.1)
    return model


def mixtral(**o):
    d = dict(intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
    return _make(tf.MixtralForCausalLM, tf.MixtralConfig, d, o)


def qwen3_moe(**o):
    d = dict(
        intermediate_size=48,
        moe_intermediate_size=24,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        output_router_logits=True,
    )
    return _make(tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig, d, o)


def qwen2_moe(**o):
    d = dict(
        intermediate_size=48,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
    )
    return _make(tf.Qwen2MoeForCausalLM, tf.Qwen2MoeConfig, d, o)


def olmoe(**o):
    d = dict(intermediate_size=24, num_experts=8, num_experts_per_tok=2, output_router_logits=True)
    return _make(tf.OlmoeForCausalLM, tf.OlmoeConfig, d, o)


def deepseek_v3(**o):
    d = dict(
        intermediate_size=48,
        moe_intermediate_size=24,
        num_key_value_heads=4,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        q_lora_rank=20,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=12,
        v_head_dim=10,
    )
    return _make(tf.DeepseekV3ForCausalLM, tf.DeepseekV3Config, d, o)


def gpt_oss(**o):
    d = dict(
        intermediate_size=24,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=6,
        output_router_logits=True,
    )
    return _make(tf.GptOssForCausalLM, tf.GptOssConfig, d, o)


def llama(**o):
    return _make(tf.LlamaForCausalLM, tf.LlamaConfig, dict(intermediate_size=48), o)


MODELS = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "qwen2_moe": qwen2_moe,
    "olmoe": olmoe,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
    "llama": llama,
}
