"""Olmo 3, Instruct and Think: norms after the sub-layers, QK-norm over the complete projections, three layers with a
sliding window to one without, YaRN on the latter."""

from __future__ import annotations

from asd_megatron.models.family import decoder_family
from asd_megatron.models.layer_attention import three_windows_to_one_full

FAMILY = decoder_family(
    "olmo3",
    "Olmo3ForCausalLM",
    qk_norm="projection",
    post_norm=True,
    attention=three_windows_to_one_full,
    norm_epsilon=1e-5,
)
