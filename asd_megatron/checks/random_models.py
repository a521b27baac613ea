"""Random models of every family, made by `transformers`, with the ratios of real ones at small widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asd_megatron.files import atomic_folder

LENGTHS = (9, 1, 5, 100, 2, 33, 11, 64, 7)
"""Tokens of the sequences: uneven, one of a single token, some beyond the window and the original RoPE length."""
WINDOW, ORIGINAL_LENGTH = 24, 32
SIZES: dict[str, Any] = {
    "vocab_size": 50257,  # no tensor-parallel size divides it
    "hidden_size": 96,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden / heads
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL_LENGTH,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "original_max_position_embeddings": ORIGINAL_LENGTH,
}
EXPERTS = {"num_experts": 12, "num_experts_per_tok": 4, "moe_intermediate_size": 40, "norm_topk_prob": True}
# What the published configs of each family have beside SIZES. Families without a head_dim have hidden / heads.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"rope_parameters": PLAIN},
    "qwen3_moe": {**EXPERTS, "rope_parameters": YARN},
    "olmo3": {
        "hidden_size": 224,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "rope_parameters": {"sliding_attention": {**PLAIN, "rope_theta": 1000.0}, "full_attention": YARN},
    },
    "llama": {"hidden_size": 112, "rope_parameters": LLAMA3},
    "qwen2": {
        "hidden_size": 112,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 2,
        "tie_word_embeddings": True,
        "rope_parameters": PLAIN,
    },
    "mistral": {"sliding_window": WINDOW, "rope_parameters": {**PLAIN, "rope_theta": 10000.0}},
}
WITHOUT_HEAD_DIM = ("olmo3", "qwen2")

QWEN3: dict[str, Any] = {
    "vocab_size": 151936,
    "num_hidden_layers": 4,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": PLAIN,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
SHAPED: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-0.6B with 4 of 28 layers": (
        "qwen3",
        {
            **QWEN3,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen3-30B-A3B with 4 of 48 layers, an eighth of the width, all 128 experts": (
        "qwen3_moe",
        {
            **QWEN3,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 96,
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
        },
    ),
}
"""Models with the sizes of published ones: a name, the family, config values."""


def _classes(family: str) -> tuple[Any, Any]:
    import transformers

    stem = {"qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "olmo3": "Olmo3", "llama": "Llama", "qwen2": "Qwen2"}
    name = stem.get(family, family.capitalize())
    return getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")


def write_family(folder: Path, family: str) -> None:
    """The family's random model in float32."""
    settings = {**SIZES, **FAMILIES[family]}
    if family in WITHOUT_HEAD_DIM:
        settings.pop("head_dim")
    _write(folder, family, settings)


def write_shaped(folder: Path, name: str) -> None:
    """A model of `SHAPED` in float32."""
    _write(folder, *SHAPED[name])


def _write(folder: Path, family: str, settings: dict[str, Any], seed: int = 0) -> None:
    """Random weights; norm weights around 1, and biases that are not zero."""
    config_class, model_class = _classes(family)
    torch.manual_seed(seed)
    model = model_class(config_class(**settings)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
    with atomic_folder(folder, replace=True) as partial:
        model.save_pretrained(partial)


def write_bfloat16(folder: Path, source: Path) -> None:
    """The model of `source` rounded to bfloat16, as `transformers` writes it."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)


def random_sequences(vocabulary: int, lengths: tuple[int, ...] = LENGTHS, seed: int = 5) -> list[Tensor]:
    """Sequences of random ids, int64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (n,), generator=generator) for n in lengths]
