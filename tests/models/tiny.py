"""Tiny Hugging Face folders made by `transformers`: config, random weights, word-level tokenizer, chat template.

Sizes are awkward on purpose: a vocabulary that two ranks do not divide, heads whose size is not hidden / heads, experts
that are no power of two, norm weights that are not one, biases that are not zero.
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
OLMO3_ROPE = {  # YaRN as the published ones have it, with an original length that the tests exceed
    "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
    "full_attention": {
        "rope_type": "yarn",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 1.2079441541679836,
        "original_max_position_embeddings": 16,
    },
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e6}
SPECIAL = ("<pad>", "<end>", "<unknown>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_qwen3(folder: str | os.PathLike[str], *, seed: int = 0, **over: Any) -> Path:
    """A Qwen3 folder; `over` replaces config values."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings = {**SIZES, "rope_parameters": dict(DEFAULT_ROPE), **over}
    return _write(Qwen3ForCausalLM, Qwen3Config(**settings), Path(folder), seed)


def tiny_llama(folder: str | os.PathLike[str], *, seed: int = 0, **over: Any) -> Path:
    """A Llama folder with Llama-3 RoPE scaling; `over` replaces config values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {**SIZES, "rope_parameters": dict(LLAMA3_ROPE), **over}
    return _write(LlamaForCausalLM, LlamaConfig(**settings), Path(folder), seed)


def tiny_qwen3_moe(folder: str | os.PathLike[str], *, seed: int = 0, **over: Any) -> Path:
    """A Qwen3-MoE folder: 6 experts of 20 channels in every layer, the top 2 of them normalised; `over` replaces config
    values. transformers 5.23 writes `num_local_experts` where published folders have `num_experts`."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}
    settings = {**SIZES, **experts, "rope_parameters": dict(DEFAULT_ROPE), **over}
    return _write(Qwen3MoeForCausalLM, Qwen3MoeConfig(**settings), Path(folder), seed)


def tiny_olmo3(folder: str | os.PathLike[str], *, seed: int = 0, **over: Any) -> Path:
    """An Olmo 3 folder: three layers with a window of 8 tokens to one without, YaRN; `over` replaces config values.

    Its heads are of hidden / heads, as in every published one: SGLang knows no other for this family.
    """
    from transformers import Olmo3Config, Olmo3ForCausalLM

    own = {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
    ropes = {kind: dict(rope) for kind, rope in OLMO3_ROPE.items()}
    settings = {**SIZES, **own, "rope_parameters": ropes, **over}
    settings.pop("head_dim")
    return _write(Olmo3ForCausalLM, Olmo3Config(**settings), Path(folder), seed)


def tiny_qwen2(folder: str | os.PathLike[str], *, seed: int = 0, **over: Any) -> Path:
    """A Qwen2 folder with random query, key and value biases; `over` replaces config values."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    settings = {**SIZES, "rope_parameters": dict(DEFAULT_ROPE), **over}
    settings.pop("head_dim")
    return _write(Qwen2ForCausalLM, Qwen2Config(**settings), Path(folder), seed)


def tiny_mistral(folder: str | os.PathLike[str], *, seed: int = 0, **over: Any) -> Path:
    """A Mistral folder without a sliding window, like version 0.3; `over` replaces config values."""
    from transformers import MistralConfig, MistralForCausalLM

    settings = {**SIZES, "sliding_window": None, "rope_parameters": dict(DEFAULT_ROPE), **over}
    return _write(MistralForCausalLM, MistralConfig(**settings), Path(folder), seed)


def _write(model_class: Any, config: Any, folder: Path, seed: int) -> Path:
    from transformers import GenerationConfig

    torch.manual_seed(seed)
    model = model_class(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape))
            elif name.endswith(".bias"):
                parameter.copy_(0.2 * torch.randn(parameter.shape))
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
