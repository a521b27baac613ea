"""The puzzle's model: a Qwen3 of about 105,000 parameters, as an ordinary Hugging Face folder."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from asd_megatron.puzzle.task import END_TOKEN
from asd_megatron.puzzle.tokenizer import PAD_TOKEN, VOCABULARY_SIZE, vocabulary, write_tokenizer

MAX_POSITIONS = 512  # a privileged prompt with a 64-token demonstration and a 64-token response needs about 180
MATRIX_STD = 0.1
EMBEDDING_STD = 0.02


def puzzle_config(layers: int = 2) -> Any:
    """A `transformers` Qwen3 configuration: width 64, 4 heads in 2 key-value groups, so that TP 2 and PP 2 divide it
    (with 4 layers PP 2 x VPP 2 too). Tied embeddings, QK norm, RoPE theta 10,000."""
    from transformers import Qwen3Config

    words = vocabulary()
    return Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        attention_bias=False,
        hidden_act="silu",
        initializer_range=MATRIX_STD,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=words.index(END_TOKEN),
        pad_token_id=words.index(PAD_TOKEN),
        dtype="float32",
    )


def write_initial_model(folder: str | os.PathLike[str], seed: int = 0, layers: int = 2) -> Path:
    """Writes config, float32 weights, generation config and tokenizer of a freshly initialised model into `folder`.

    Matrices are normal with std 0.1, divided by sqrt(2 layers) where they write to the residual stream; embeddings
    0.02; norms 1. The usual 0.02 throughout is too small for so narrow a model.
    """
    import torch
    from transformers import GenerationConfig, Qwen3ForCausalLM

    config = puzzle_config(layers)
    model = Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() < 2:
                parameter.fill_(1.0)
                continue
            std = MATRIX_STD
            if "embed_tokens" in name:
                std = EMBEDDING_STD
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                std = MATRIX_STD / math.sqrt(2 * layers)
            parameter.normal_(0.0, std, generator=generator)
    model.generation_config = GenerationConfig(
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=True,
        temperature=1.0,
        max_new_tokens=64,
    )
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    return write_tokenizer(path)


def main() -> None:
    """`python -m asd_megatron.puzzle.model FOLDER [SEED]`"""
    import sys

    if not 2 <= len(sys.argv) <= 3:
        raise SystemExit("usage: python -m asd_megatron.puzzle.model FOLDER [SEED]")
    print(write_initial_model(sys.argv[1], seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0))


if __name__ == "__main__":
    main()
