r"""The text of a demonstration: cleaning and shortening it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from asd_megatron.data.answers import last_boxed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ELLIPSIS = " ... "
THINK_BLOCK = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
MATH_CLOSE = re.compile(r"\s*(?:\$\$?|\\\)|\\\])")


def clean(text: str, special_tokens: Sequence[str], *, strip_thinking: bool) -> str:
    r"""`text` without special tokens and what follows the last `\boxed{...}`, on request without `<think>` blocks.

    A response whose `<think>` was opened by the prompt starts inside the block: everything up to `</think>` belongs
    to it.
    """
    previous = None
    while previous != text:  # a token cut out may leave another one behind
        previous = text
        for token in special_tokens:
            text = text.replace(token, "")
    if strip_thinking:
        text = THINK_BLOCK.sub("", text)
        text = text.rpartition("</think>")[2]
    box = last_boxed(text)
    if box is not None:
        closing = MATH_CLOSE.match(text, box.end)  # $\boxed{5}$ keeps its second dollar
        text = text[: closing.end() if closing else box.end]
    return text.strip()


def special_token_texts(tokenizer: PreTrainedTokenizerBase, end_token_ids: Sequence[int] = ()) -> tuple[str, ...]:
    """The texts of all special tokens and end tokens, longest first (one may contain another)."""
    texts = {str(t) for t in tokenizer.all_special_tokens}
    texts |= {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    texts |= {str(t) for t in tokenizer.convert_ids_to_tokens(list(end_token_ids)) if t is not None}
    return tuple(sorted((t for t in texts if t.strip()), key=lambda t: (-len(t), t)))


def count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Tokens of `text`, without special tokens."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def shorten(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> str:
    """`text` in at most `limit` tokens: as it is if it fits, else its head (one quarter), an ellipsis and its tail.

    Cut at token boundaries of the text itself; a limit too small for the ellipsis gives an empty text.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = encoded["offset_mapping"]
    if len(spans) <= limit:
        return text
    budget = limit - count(tokenizer, ELLIPSIS)
    while budget >= 2:
        head = budget // 4
        left = text[: spans[head - 1][1]].rstrip() if head else ""
        shortened = left + ELLIPSIS + text[spans[len(spans) - (budget - head)][0] :].lstrip()
        excess = count(tokenizer, shortened) - limit
        if excess <= 0:
            return shortened.strip()
        budget -= excess  # tokens may split differently at the cuts
    return ""
