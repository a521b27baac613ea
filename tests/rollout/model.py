"""A tiny Qwen3 by transformers, and as a ModelPort."""

from __future__ import annotations

from typing import Any

import torch

from asd_megatron.distributed.layout import Layout, ProcessGroups
from asd_megatron.models.port import ModelPort


def hugging_face_model(vocab: int = 61) -> Any:
    """2 layers, 4 heads on 2 key/value heads, an odd vocabulary (padded under TP); sharp enough to have favourites."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(5)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        initializer_range=0.3,
        dtype="float32",
        architectures=["Qwen3ForCausalLM"],
    )
    return Qwen3ForCausalLM(config).eval()


def port_of(model: Any, process_groups: ProcessGroups, layout: Layout) -> ModelPort:
    port = ModelPort.build(model.config.to_dict(), process_groups, layout, dtype=torch.float32, layers="local")
    port.load(model.state_dict())
    return port
