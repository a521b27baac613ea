"""Qwen3, dense: QK-norm, grouped queries, a head size of its own, tied or not."""

from __future__ import annotations

from asd_megatron.models.family import decoder_family

FAMILY = decoder_family("qwen3", "Qwen3ForCausalLM", qk_norm="head", explicit=("head_dim", "num_key_value_heads"))
