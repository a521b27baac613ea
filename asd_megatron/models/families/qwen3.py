"""Qwen3, dense: QK-norm, grouped queries, a head size of its own, tied or not, an optional sliding window in the late
layers."""

from __future__ import annotations

from asd_megatron.models.family import decoder_family
from asd_megatron.models.layer_attention import optional_window_in_late_layers

FAMILY = decoder_family(
    "qwen3",
    "Qwen3ForCausalLM",
    qk_norm="head",
    attention=optional_window_in_late_layers,
    explicit=("head_dim", "num_key_value_heads"),
)
