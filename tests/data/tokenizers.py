"""Tokenizers for tests: one token a UTF-8 byte, where chat markers are special tokens and `<think>` is an ordinary one;
and one of words and their parts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}{{ '<|start|>system\nBe brief.<|end|>\n' }}{%- endif -%}"
    "{%- for m in messages -%}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start|>assistant\n' }}"
    "{%- if no_think is defined and no_think -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}{%- endif -%}"
)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<|end|>", "<|start|>", "<|stop|>")])
    backend.add_tokens([AddedToken(t, special=False) for t in ("<think>", "</think>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = chat_template
    return tokenizer


def word_tokenizer(texts: Sequence[str]) -> Any:
    """A byte-level BPE with GPT-2's pattern of words that is trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, show_progress=False, initial_alphabet=alphabet)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def tokenizer_folder(folder: Path, eos_token_id: Any = None) -> Path:
    byte_tokenizer().save_pretrained(folder)
    if eos_token_id is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id}))
    return folder
