"""Metrics of puzzle responses: u by token class, the deliberation rate, the fraction of tested answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from asd_megatron.puzzle.task import ANSWER_WORD, DELIBERATION_WORDS, END_TOKEN, FIRST_WORD, YES_WORD

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN_CLASSES = (
    "deliberation",  # Let, Wait, Maybe, Hmm
    "wait",  # the same without Let: continuing after a failed test
    "candidate",  # the x after a deliberation word
    "so",  # announces an answer
    "so_early",  # the same, not right after a `yes`: giving up
    "answer_right",  # the x after `So`, in a rewarded response
    "answer_right_early",  # the same after an early `So`: a lucky guess
    "answer_wrong",  # the x after `So`, in an unrewarded response
    "other",  # arithmetic, verdicts, the end token
)


@dataclass(frozen=True)
class Lexicon:
    """The token ids that the classes need."""

    deliberation: frozenset[int]
    first: int
    so: int
    yes: int
    end: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Lexicon:
        """From the puzzle's tokenizer."""
        ids: dict[str, int] = tokenizer.get_vocab()
        return cls(
            deliberation=frozenset(ids[word] for word in DELIBERATION_WORDS),
            first=ids[FIRST_WORD],
            so=ids[ANSWER_WORD],
            yes=ids[YES_WORD],
            end=ids[END_TOKEN],
        )


def token_classes(response_ids: Sequence[int], reward: float, lexicon: Lexicon) -> list[tuple[str, ...]]:
    """The classes of every token of one response. They overlap: `wait` is part of `deliberation`, `so_early` of `so`,
    `answer_right_early` of `answer_right`."""
    out: list[tuple[str, ...]] = []
    for t, token in enumerate(response_ids):
        before = response_ids[t - 1] if t else -1
        if token in lexicon.deliberation:
            names: tuple[str, ...] = ("deliberation",) if token == lexicon.first else ("deliberation", "wait")
        elif token == lexicon.so:
            names = ("so",) if before == lexicon.yes else ("so", "so_early")
        elif before == lexicon.so:
            early = t < 2 or response_ids[t - 2] != lexicon.yes
            names = ("answer_right", "answer_right_early") if early else ("answer_right",)
            if reward <= 0:
                names = ("answer_wrong",)
        elif before in lexicon.deliberation:
            names = ("candidate",)
        else:
            names = ("other",)
        out.append(names)
    return out


def verified(response_ids: Sequence[int], lexicon: Lexicon) -> bool:
    """Whether the response ends `yes So x <end>`: a tested answer."""
    return (
        len(response_ids) > 3
        and response_ids[-4] == lexicon.yes
        and response_ids[-3] == lexicon.so
        and response_ids[-1] == lexicon.end
    )


@dataclass(frozen=True)
class PuzzleReport:
    """The numbers of one set of responses. Means over nothing are NaN."""

    responses: int
    accuracy: float
    length: float  # mean tokens a response, the end token included
    truncated: float  # fraction of responses without an end token
    deliberations: float  # mean deliberation words a response
    deliberation_rate: float  # deliberation words over all response tokens
    early_answers: float  # mean early `So` a response
    verified: float  # fraction of responses that end `yes So x`
    accuracy_verified: float  # accuracy among those
    pmi: Mapping[str, float] = field(default_factory=dict)  # mean u by token class (nats); empty without u
    pmi_tokens: Mapping[str, int] = field(default_factory=dict)  # tokens behind each mean


def summarize(
    responses: Sequence[Sequence[int]],
    rewards: Sequence[float],
    lexicon: Lexicon,
    pmi: Sequence[Sequence[float] | None] | None = None,
) -> PuzzleReport:
    """Summarises responses given as token ids.

    `pmi[i]` is u of every token of response i, in nats; None for a response without privileged context, which then
    counts in everything but u. Raises ValueError if the lists do not match.
    """
    if len(rewards) != len(responses) or (pmi is not None and len(pmi) != len(responses)):
        raise ValueError("responses, rewards and pmi must be equally many")
    count, tokens = len(responses), sum(map(len, responses))
    sums, counts = dict.fromkeys(TOKEN_CLASSES, 0.0), dict.fromkeys(TOKEN_CLASSES, 0)
    deliberations = early = 0
    for i, (ids, reward) in enumerate(zip(responses, rewards, strict=True)):
        classes = token_classes(ids, reward, lexicon)
        deliberations += sum("deliberation" in names for names in classes)
        early += sum("so_early" in names for names in classes)
        values = None if pmi is None else pmi[i]
        if values is None:
            continue
        for names, value in zip(classes, values, strict=True):
            for name in names:
                sums[name] += float(value)
                counts[name] += 1
    tested = [verified(ids, lexicon) for ids in responses]
    return PuzzleReport(
        responses=count,
        accuracy=_ratio(sum(rewards), count),
        length=_ratio(tokens, count),
        truncated=_ratio(sum(not ids or ids[-1] != lexicon.end for ids in responses), count),
        deliberations=_ratio(deliberations, count),
        deliberation_rate=_ratio(deliberations, tokens),
        early_answers=_ratio(early, count),
        verified=_ratio(sum(tested), count),
        accuracy_verified=_ratio(sum(r for r, v in zip(rewards, tested, strict=True) if v), sum(tested)),
        pmi={name: sums[name] / counts[name] for name in TOKEN_CLASSES if counts[name]},
        pmi_tokens={name: counts[name] for name in TOKEN_CLASSES if counts[name]},
    )


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan
