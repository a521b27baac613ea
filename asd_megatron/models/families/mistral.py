"""Mistral 7B: Llama with a sliding window in every layer (v0.1) or in none (later versions)."""

from __future__ import annotations

from asd_megatron.models.family import decoder_family
from asd_megatron.models.layer_attention import window_in_all_layers

FAMILY = decoder_family(
    "mistral", "MistralForCausalLM", attention=window_in_all_layers, explicit=("num_key_value_heads",)
)
