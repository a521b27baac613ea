"""Tokenizers of local Hugging Face folders, and the checks that one fits its model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from asd_megatron.errors import UserError
from asd_megatron.files import check_own_file, read_json_object

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from transformers import PreTrainedTokenizerBase

    from asd_megatron.records import TokenIds

REPLACEMENT = "\ufffd"  # what a token id that the tokenizer does not have is decoded as

FILE_SUFFIXES = (".json", ".jinja", ".txt", ".model")
"""Of the files of a folder that a tokenizer may be made of."""

log = logging.getLogger("asd_megatron")


class TokenizerError(UserError, ValueError):
    """A tokenizer is missing, cannot be loaded, or does not fit its model."""


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local model folder. Never downloads, runs no code from the folder, and reads no file outside
    of it (`files.foreign_file`)."""
    path = Path(folder)
    if not path.is_dir():
        raise TokenizerError(f"the model folder {path} does not exist: give model.path as a local Hugging Face folder")
    for file in sorted([*path.iterdir(), *(path / "additional_chat_templates").glob("*")]):
        if file.suffix in FILE_SUFFIXES and not file.is_dir():
            check_own_file(file, path)
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
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def has_token(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    """Whether the tokenizer has a token of this id."""
    # ids are 32-bit in the tokenizers library, which raises for larger ones
    return 0 <= token_id < 1 << 32 and tokenizer.convert_ids_to_tokens(token_id) is not None


# ---------------------------------------------------------------- end tokens


def end_token_ids(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a response: `eos_token_id` of generation_config.json, the tokenizer's own, and
    `eos_token_id` of config.json, in this order and each once.

    The union, because SGLang stops at all of them whatever a request says; transformers reads config.json only when
    there is no generation_config.json. An id that the tokenizer does not have is left out with a warning.
    """
    folder = Path(folder)
    named = [(i, "generation_config.json") for i in _eos_token_ids(folder / "generation_config.json")]
    if tokenizer.eos_token_id is not None:
        named.append((tokenizer.eos_token_id, "the tokenizer"))
    named += [(i, "config.json") for i in _eos_token_ids(folder / "config.json")]
    found: dict[int, None] = {}
    unknown: dict[int, str] = {}
    for token_id, source in named:
        if has_token(tokenizer, token_id):
            found[token_id] = None
        else:
            unknown.setdefault(token_id, source)
    for token_id, source in unknown.items():
        log.warning(
            "%s: eos_token_id %d of %s is not a token of the tokenizer, so it is left out: responses end at %s. "
            "Correct the file, or name the end tokens in sampling.stop_token_ids",
            folder,
            token_id,
            source,
            list(found) or "no token",
        )
    return tuple(found)


def _eos_token_ids(path: Path) -> list[int]:
    """`eos_token_id` of a JSON file as a list; [] if the file or the key is missing, or null."""
    if not path.is_file():
        return []
    value = read_json_object(path, "download the model again").get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
        raise TokenizerError(f"{path}: `eos_token_id` must be a token id or a list of them, found {value!r:.80}")
    return ids


def check_stop_token_ids(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> None:
    """Raise TokenizerError unless the tokenizer has every id of `sampling.stop_token_ids`."""
    unknown = [i for i in ids if not has_token(tokenizer, i)]
    if unknown:
        raise TokenizerError(
            f"sampling.stop_token_ids: the tokenizer has no token {', '.join(map(str, unknown))} (its ids go up to "
            f"{_largest_id(tokenizer)}): correct the id, or leave the key out for the model's own end tokens"
        )


# ---------------------------------------------------------------- vocabulary


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise TokenizerError unless every id of the tokenizer is a row of the model's `vocab_size` embeddings; warn when
    rows are left over, whose ids can be sampled but have no text.
    """
    needed = _largest_id(tokenizer) + 1
    if needed > vocab_size:
        raise TokenizerError(
            f"the model's vocabulary is smaller than the tokenizer's: vocab_size is {vocab_size}, "
            f"the tokenizer has ids up to {needed - 1}. "
            "The folder mixes two models, or tokens were added without resizing the embeddings"
        )
    tokens = len(set(tokenizer.get_vocab().values()))
    if tokens < vocab_size:
        log.warning(
            "the model has %s embeddings and the tokenizer %s tokens: %s ids have no text. They are almost never "
            "sampled; one that is reads as U+FFFD in the response and counts in rollouts/undecodable_tokens",
            f"{vocab_size:,}",
            f"{tokens:,}",
            f"{vocab_size - tokens:,}",
        )


def _largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values(), default=-1)


# ---------------------------------------------------------------- text


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> TokenIds:
    """The ids of a text, int32 [n], without special tokens. Several threads may call it, and run in parallel."""
    return np.array(_encoding(tokenizer, text).ids, dtype=np.int32)


def encode_spans(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """Where each token of `encode` begins and ends in the text."""
    return _encoding(tokenizer, text, spans=True).offsets


def _encoding(tokenizer: PreTrainedTokenizerBase, text: str, *, spans: bool = False) -> Any:
    """Of the Rust tokenizer itself, which has no state to set and holds the interpreter's lock in single calls only."""
    backend = tokenizer.backend_tokenizer
    return (backend.encode_batch if spans else backend.encode_batch_fast)([text], add_special_tokens=False)[0]


def decode(tokenizer: PreTrainedTokenizerBase, ids: ArrayLike, *, skip_special_tokens: bool = True) -> str:
    """The text of token ids exactly as written: the tokenizer's clean-up of spaces ("x != y ." -> "x!= y.") is off.

    An id that the tokenizer does not have becomes U+FFFD: [5, 151935, 5] -> "a\ufffda".
    """
    numbers = np.asarray(ids, dtype=np.int64)
    listed: list[int] = numbers.tolist()
    unknown = _unknown(tokenizer, np.unique(numbers).tolist())
    if not unknown:
        return _decode(tokenizer, listed, skip_special_tokens)
    return "".join(
        REPLACEMENT * len(part) if missing else _decode(tokenizer, part, skip_special_tokens)
        for missing, part in _runs(listed, unknown)
    )


def undecodable(tokenizer: PreTrainedTokenizerBase, responses: Sequence[TokenIds]) -> int:
    """How many tokens of the responses have an id that the tokenizer does not have."""
    counts = np.zeros(0, dtype=np.int64)  # of each id
    for ids in responses:
        found = np.bincount(ids, minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    unknown = _unknown(tokenizer, np.flatnonzero(counts).tolist())
    return int(counts[list(unknown)].sum())


def _unknown(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> set[int]:
    return {i for i in ids if not has_token(tokenizer, i)}


def _runs(ids: Sequence[int], unknown: set[int]) -> Iterator[tuple[bool, list[int]]]:
    """Runs of known and of unknown ids, in order."""
    for missing, part in groupby(ids, key=unknown.__contains__):
        yield missing, list(part)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], skip_special_tokens: bool) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
