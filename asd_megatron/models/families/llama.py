"""Llama 2 and 3, SmolLM2: tied or not, with Llama-3 RoPE scaling."""

from __future__ import annotations

from functools import partial

from asd_megatron.models.families.family import Family, decoder_rules, translate_decoder

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    translate=partial(translate_decoder, qk_norm=False),
    rules=decoder_rules(qk_norm=False),
)
