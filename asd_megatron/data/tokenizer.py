"""Tokenizers of local Hugging Face folders, and the checks that tie one to its model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asd_megatron.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenizerError(UserError, ValueError):
    """A tokenizer is missing, cannot be loaded, or does not fit its model."""


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local model folder. Never downloads and never runs code from the folder."""
    path = Path(folder)
    if not path.is_dir():
        raise TokenizerError(f"the model folder {path} does not exist: give model.path as a local Hugging Face folder")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except Exception as e:  # transformers raises many kinds; each means the same to the user
        raise TokenizerError(
            f"cannot load the tokenizer of {path}: {type(e).__name__}: {e}. "
            "The folder needs tokenizer.json and tokenizer_config.json"
        ) from e
    if not getattr(tokenizer, "is_fast", False):
        raise TokenizerError(
            f"the tokenizer of {path} ({type(tokenizer).__name__}) has no tokenizer.json: "
            "convert it to a fast tokenizer"
        )
    return tokenizer


def end_token_ids(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a response: those of generation_config.json, then the tokenizer's own."""
    path = Path(folder) / "generation_config.json"
    ids: list[Any] = []
    if path.is_file():
        try:
            value = json.loads(path.read_text("utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as e:
            raise TokenizerError(f"{path} is not a JSON object: {e}") from e
        ids += value if isinstance(value, list) else [] if value is None else [value]
        if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
            raise TokenizerError(f"{path}: `eos_token_id` must be a token id or a list of them, found {value!r}")
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(ids))


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise TokenizerError unless every id of the tokenizer is a row of the model's `vocab_size` embeddings."""
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > vocab_size:
        raise TokenizerError(
            f"the model's vocabulary is smaller than the tokenizer's: vocab_size is {vocab_size}, "
            f"the tokenizer has ids up to {needed - 1}. "
            "The folder mixes two models, or tokens were added without resizing the embeddings"
        )


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of response ids: without special tokens, otherwise exactly as written."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
