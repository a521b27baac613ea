"""Llama 2 and 3, SmolLM2: tied or not, with Llama-3 RoPE scaling."""

from __future__ import annotations

from asd_megatron.models.family import decoder_family

FAMILY = decoder_family("llama", "LlamaForCausalLM")
