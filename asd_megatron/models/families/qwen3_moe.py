"""Qwen3-MoE: Qwen3 with a mixture of experts in every layer, and an optional sliding window in all of them."""

from __future__ import annotations

from asd_megatron.models.family import decoder_family
from asd_megatron.models.layer_attention import optional_window_in_all_layers

FAMILY = decoder_family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    qk_norm="head",
    experts=True,
    attention=optional_window_in_all_layers,
    explicit=("num_key_value_heads", "num_experts_per_tok", "norm_topk_prob"),
)
