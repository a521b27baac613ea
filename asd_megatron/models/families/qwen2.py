"""Qwen2 and 2.5: biases on the query, key and value projections."""

from __future__ import annotations

from asd_megatron.models.family import decoder_family

FAMILY = decoder_family("qwen2", "Qwen2ForCausalLM", qkv_bias=True, explicit=("num_key_value_heads",))
