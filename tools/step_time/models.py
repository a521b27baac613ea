"""Small random models with the parts that a step's time depends on: dense, with sliding windows, with experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1152,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
OLMO3 = {
    "sliding_window": 64,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e6} for kind in ("sliding_attention", "full_attention")
    },
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512, "norm_topk_prob": True}
VOCABULARY = SIZES["vocab_size"]


def write(name: str, folder: Path) -> None:
    """`dense`, `windows` or `experts` as a Hugging Face folder in float32."""
    import transformers

    torch.manual_seed(0)
    model: Any
    if name == "dense":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES))
    elif name == "windows":
        sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
        model = transformers.Olmo3ForCausalLM(transformers.Olmo3Config(**(sizes | OLMO3)))
    else:
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **EXPERTS))
    model.float().save_pretrained(folder)
