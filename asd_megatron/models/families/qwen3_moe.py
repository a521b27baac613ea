"""Qwen3-MoE: Qwen3 with a mixture of experts in every layer."""

from __future__ import annotations

from asd_megatron.models.family import decoder_family

FAMILY = decoder_family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    qk_norm="head",
    experts=True,
    explicit=("head_dim", "num_key_value_heads", "num_experts", "num_experts_per_tok", "norm_topk_prob"),
)
