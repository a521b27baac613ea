"""The puzzle's word-level tokenizer, saved as an ordinary Hugging Face tokenizer with a chat template."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from asd_megatron.puzzle.task import (
    ADDENDS,
    ANSWER_WORD,
    DELIBERATION_WORDS,
    END_TOKEN,
    MODULUS,
    MULTIPLIERS,
    NO_WORDS,
    YES_WORD,
)

PAD_TOKEN = "<|pad|>"  # noqa: S105 (a token of a text)
UNKNOWN_TOKEN = "<|unknown|>"  # noqa: S105 (a token of a text)
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (PAD_TOKEN, UNKNOWN_TOKEN, END_TOKEN, *(f"<|{role}|>" for role in ROLES))

# every word of the ordinary privileged template, feedback lines included
PRIVILEGED_TEXT = (
    "Your previous attempt: Previous assessment: Your answer is correct. Your answer is incorrect. "
    "Now solve this problem step by step. The final answer is: ..."
)
VOCABULARY_SIZE = 112  # a multiple of 16, so that any small tensor-parallel size divides it; the rest is reserved

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] | trim + ' <|end|> ' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def vocabulary() -> list[str]:
    """All words in the order of their ids: special tokens, template words, trace words, numbers, reserved words."""
    words = [*SPECIAL_TOKENS, "Problem:", "Target", "Solve", *DELIBERATION_WORDS, *NO_WORDS, YES_WORD, ANSWER_WORD]
    words += list(dict.fromkeys(PRIVILEGED_TEXT.split()))
    words += [f"{sign}{i}" for sign in ("", "=", "+") for i in range(MODULUS)]
    words += [f"*{m}" for m in MULTIPLIERS] + [f"add{b}" for b in ADDENDS]
    reserved = VOCABULARY_SIZE - len(words)
    if reserved < 0 or len(set(words)) != len(words):
        raise AssertionError(f"{len(words)} words ({len(set(words))} distinct) must fit {VOCABULARY_SIZE}")
    return words + [f"<|reserved_{i}|>" for i in range(reserved)]


def build_tokenizer() -> Any:
    """The tokenizer as a `transformers` fast tokenizer. Decoding joins words by single spaces, so that
    encode(decode(ids)) == ids for ids without special tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token=UNKNOWN_TOKEN))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        eos_token=END_TOKEN,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_tokenizer(folder: str | os.PathLike[str]) -> Path:
    """Saves the tokenizer and its chat template into `folder` (made if missing)."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save_pretrained(path)
    return path
