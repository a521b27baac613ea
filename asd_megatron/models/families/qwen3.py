"""Qwen3, dense: QK-norm, grouped queries, a head size of its own, tied or not."""

from __future__ import annotations

from functools import partial

from asd_megatron.models.families.family import Family, decoder_rules, translate_decoder

QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    translate=partial(translate_decoder, qk_norm=True, explicit=("head_dim", "num_key_value_heads")),
    rules=decoder_rules(qk_norm=True),
)
