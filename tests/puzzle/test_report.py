"""Token classes and summaries on hand-written responses."""

from __future__ import annotations

import math

import pytest

from asd_megatron.puzzle.report import TOKEN_CLASSES, Lexicon, summarize, token_classes, verified
from asd_megatron.puzzle.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
LEXICON = Lexicon.of(TOKENIZER)


def ids(text: str) -> list[int]:
    out: list[int] = TOKENIZER.encode(text)
    return out


SEARCHED = ids("Let 3 =6 +10 no Wait 7 =14 +1 yes So 7 <|end|>")
LUCKY = ids("Let 3 =6 +10 no So 7 <|end|>")
WRONG = ids("So 3 <|end|>")
CUT = ids("Let 3 =6")


def test_token_classes() -> None:
    delib, cand, other = ("deliberation",), ("candidate",), ("other",)
    assert token_classes(SEARCHED, 1.0, LEXICON) == [
        *(delib, cand, other, other, other),
        *(("deliberation", "wait"), cand, other, other, other),
        *(("so",), ("answer_right",), other),
    ]
    assert token_classes(LUCKY, 1.0, LEXICON)[5:] == [
        ("so", "so_early"),
        ("answer_right", "answer_right_early"),
        other,
    ]
    assert token_classes(WRONG, 0.0, LEXICON) == [("so", "so_early"), ("answer_wrong",), other]
    assert {name for names in token_classes(SEARCHED, 1.0, LEXICON) for name in names} <= set(TOKEN_CLASSES)


def test_verified() -> None:
    assert [verified(r, LEXICON) for r in (SEARCHED, LUCKY, WRONG, CUT)] == [True, False, False, False]
    assert not verified(SEARCHED[:-1], LEXICON)


def test_summary() -> None:
    u = [[0.1] * 13, [-4.0, 0.0, 0.0, 0.0, 0.0, 0.5, 2.0, 0.0], None, [-2.0, 0.0, 0.0]]
    report = summarize([SEARCHED, LUCKY, WRONG, CUT], [1.0, 1.0, 0.0, 0.0], LEXICON, u)
    assert (report.responses, report.accuracy, report.length) == (4, 0.5, 27 / 4)
    assert (report.truncated, report.verified, report.accuracy_verified) == (0.25, 0.25, 1.0)
    assert (report.deliberations, report.deliberation_rate, report.early_answers) == (1.0, 4 / 27, 0.5)
    assert report.pmi["deliberation"] == pytest.approx((0.1 + 0.1 - 4 - 2) / 4)
    assert report.pmi["so"] == pytest.approx(0.3) and report.pmi["answer_right_early"] == 2.0
    assert report.pmi_tokens["deliberation"] == 4 and "answer_wrong" not in report.pmi


def test_nothing_verified_and_nothing_at_all() -> None:
    report = summarize([WRONG], [0.0], LEXICON)
    assert math.isnan(report.accuracy_verified)
    assert report.pmi == {}
    assert math.isnan(summarize([], [], LEXICON).accuracy)


def test_lists_must_match() -> None:
    with pytest.raises(ValueError, match="equally many"):
        summarize([WRONG], [], LEXICON)
    with pytest.raises(ValueError):
        summarize([WRONG], [0.0], LEXICON, [[1.0]])
