"""Qwen2 and 2.5: biases on the query, key and value projections, an optional sliding window in the late layers."""

from __future__ import annotations

from asd_megatron.models.family import decoder_family
from asd_megatron.models.layer_attention import optional_window_in_late_layers

FAMILY = decoder_family(
    "qwen2",
    "Qwen2ForCausalLM",
    qkv_bias=True,
    attention=optional_window_in_late_layers,
    explicit=("num_key_value_heads",),
)
