r"""The text of a demonstration: cleaning and shortening it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from asd_megatron.data.answers import last_boxed
from asd_megatron.data.tokenizer import encode, encode_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span: TypeAlias = tuple[int, int]
"""Where a token begins and ends in a text."""

ELLIPSIS = " ... "
THINK_BLOCK = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
CHARACTERS = 3  # of a token at first; a text with longer ones is tokenised a second time, a little further
AT_A_CUT = 32  # tokens beside a cut in the text, which may be others than those of the complete text
RUN = 8  # consecutive tokens that have to agree, for two tokenisations to count as aligned there
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
    return len(encode(tokenizer, text))


class Shortened(NamedTuple):
    """A text and how many tokens it has."""

    text: str
    tokens: int


def shorten(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> Shortened:
    """`text` in at most `limit` tokens: as it is if it fits, else its head (one quarter), an ellipsis and its tail.

    Cut at token boundaries of the text itself; a limit too small for the ellipsis gives an empty text. Of a long text
    only the parts that are shown are tokenised, once.
    """
    first, last = _ends(tokenizer, text, limit)
    if first is last and len(first) <= limit:
        return Shortened(text, len(first))
    budget = limit - count(tokenizer, ELLIPSIS)
    while budget >= 2:
        head, tail = first[: budget // 4], last[-(budget - budget // 4) :]
        left = text[: head[-1][1]].rstrip() if head else ""
        right = text[tail[0][0] :].lstrip()
        shortened = (left + ELLIPSIS + right).strip()
        tokens = _joined(tokenizer, text, head, tail)
        if tokens is None or len(shortened) < len(left + ELLIPSIS + right):
            tokens = count(tokenizer, shortened)
        if tokens <= limit:
            return Shortened(shortened, tokens)
        budget -= tokens - limit  # tokens may split differently at the cuts
    return Shortened("", 0)


def _ends(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> tuple[list[Span], list[Span]]:
    """The first and the last tokens of `text`, at least as many as `shorten` shows. Of a text of at most `limit`
    tokens, and of any that is not much longer, all of them, as one list twice."""
    if len(text) > 2 * CHARACTERS * limit:
        head = limit // 4 + 2 * AT_A_CUT
        first = _first_tokens(tokenizer, text, head)
        if len(first) == head:
            tail = limit - limit // 4 + 2 * AT_A_CUT
            last = _last_tokens(tokenizer, text, tail, first[-1][1] / head)
            # Without overlap the text has more than `limit` tokens, even without the AT_A_CUT tokens at each cut.
            if len(last) == tail and first[-1][1] <= last[0][0]:
                return first, last
    spans = encode_spans(tokenizer, text)
    return spans, spans


def _first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, n: int) -> list[Span]:
    """Where the first `n` tokens of `text` begin and end; fewer if it has fewer."""
    size = CHARACTERS * n
    while True:
        found = encode_spans(tokenizer, text[:size])
        if size >= len(text) or len(found) >= n + AT_A_CUT:
            return found[:n]
        size = _more(size, n, len(found))


def _last_tokens(tokenizer: PreTrainedTokenizerBase, text: str, n: int, characters: float) -> list[Span]:
    """Where the last `n` tokens of `text` begin and end; fewer if it has fewer. characters: of a token, about."""
    size = int(1.1 * characters * (n + AT_A_CUT))
    while True:
        start = max(0, len(text) - size)
        found = encode_spans(tokenizer, text[start:])
        if not start or len(found) >= n + AT_A_CUT:
            return [(start + a, start + e) for a, e in found[-n:]]
        size = _more(size, n, len(found))


def _more(size: int, wanted: int, found: int) -> int:
    """Characters that should hold the wanted tokens, after `size` of them held only `found`."""
    return size + 1 + int(size * (1.1 * (wanted + AT_A_CUT) / max(found, 1) - 1))


def _joined(tokenizer: PreTrainedTokenizerBase, text: str, head: list[Span], tail: list[Span]) -> int | None:
    """How many tokens the text of `head`, an ellipsis and the text of `tail` have; None if that cannot be told from
    those beside the ellipsis.

    Only 2 * AT_A_CUT tokens on either side are tokenised again. Where a few of them (=) are as they were, so are all
    that are further away:

        head   a a a a a a a = = a a a      tail   b b b = = b b b b b b b
        again          a a a = = a . . ... . b b b = = b b
    """
    if min(len(head), len(tail)) < 4 * AT_A_CUT:
        return None
    begin, end = head[-2 * AT_A_CUT][0], tail[2 * AT_A_CUT][0]
    left, right = text[begin : head[-1][1]].rstrip(), text[tail[0][0] : end].lstrip()
    again = encode_spans(tokenizer, left + ELLIPSIS + right)
    shift = len(left + ELLIPSIS + right) - end  # of characters of the tail
    before = _place([(a - begin, e - begin) for a, e in head[-AT_A_CUT - RUN : -AT_A_CUT]], again)
    after = _place([(a + shift, e + shift) for a, e in tail[AT_A_CUT : AT_A_CUT + RUN]], again)
    if before is None or after is None:
        return None
    return len(head) - AT_A_CUT - RUN + (after - before) + len(tail) - AT_A_CUT


def _place(run: list[Span], spans: list[Span]) -> int | None:
    """Where `run` begins in `spans`."""
    return next((i for i in range(len(spans) - len(run) + 1) if spans[i : i + len(run)] == run), None)
