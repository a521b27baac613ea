"""Tiny Hugging Face folders made by `transformers`: config, random weights, word-level tokenizer, chat template.

Sizes are awkward on purpose: a vocabulary that two ranks do not divide, heads whose size is not hidden / heads, norm
weights that are not one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # importing it takes seconds, and every rank of a test imports this module
    from transformers import PreTrainedTokenizerFast

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # all three bands of the scaling occur in six frequencies
}
SPECIAL = ("<pad>", "<end>", "<unknown>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_qwen3(folder: str | os.PathLike[str], *, seed: int = 0, **over: Any) -> Path:
    """A Qwen3 folder; `over` replaces config values."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings = {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, **over}
    return _write(Qwen3ForCausalLM, Qwen3Config(**settings), Path(folder), seed)


def tiny_llama(folder: str | os.PathLike[str], *, seed: int = 0, **over: Any) -> Path:
    """A Llama folder with Llama-3 RoPE scaling; `over` replaces config values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {**SIZES, "rope_parameters": dict(LLAMA3_ROPE), **over}
    return _write(LlamaForCausalLM, LlamaConfig(**settings), Path(folder), seed)


def _write(model_class: Any, config: Any, folder: Path, seed: int) -> Path:
    from transformers import GenerationConfig

    torch.manual_seed(seed)
    model = model_class(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape))
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0, temperature=0.6, do_sample=True)
    model.save_pretrained(folder)
    tokenizer(config.vocab_size).save_pretrained(folder)
    return folder


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Words w0, w1, ... after the special tokens; `vocab_size` tokens in all."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(f"w{i}" for i in range(vocab_size - len(SPECIAL)))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unknown>",
        chat_template=CHAT_TEMPLATE,
    )
