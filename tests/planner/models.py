"""Small models of every kind of layer, as config.json has them."""

from __future__ import annotations

from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 208,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def dense(**over: Any) -> dict[str, Any]:
    return {**SIZES, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **over}


def plain(**over: Any) -> dict[str, Any]:
    """Without a norm of queries and keys."""
    return {**SIZES, "architectures": ["LlamaForCausalLM"], "model_type": "llama", **over}


def post_norm(**over: Any) -> dict[str, Any]:
    """Norms after the sub-layers, and of complete projections."""
    layers = int(over.get("num_hidden_layers", SIZES["num_hidden_layers"]))
    attention = {"rope_theta": 5e5, "sliding_window": 64, "layer_types": ["full_attention"] * layers}
    return {**SIZES, **attention, "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", **over}


def experts(**over: Any) -> dict[str, Any]:
    mixture = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
    return {**SIZES, **mixture, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **over}
