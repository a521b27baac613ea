from __future__ import annotations

import time

import pytest

from asd_megatron.data.answers import last_boxed, last_hashes
from asd_megatron.reward.answers import Candidate, final_answer, gold_answer, quick_verdict, tidy


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{5}", "5"),
        (r"first \boxed{4}, then \boxed {\frac{1}{2}} end", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a \boxed{b} c}", "b"),
        (r"\boxed{7} and \boxed{8", "7"),
        (r"\boxed{}", ""),
    ],
)
def test_last_boxed(text: str, content: str) -> None:
    box = last_boxed(text)
    assert box is not None and box.content == content
    assert text[box.start : box.end].startswith("\\boxed") and text[box.end - 1] == "}"


@pytest.mark.parametrize("text", ["", "5", r"\boxed", r"\boxed 5", r"\boxed{5", r"\boxed{\}"])
def test_no_box(text: str) -> None:
    assert last_boxed(text) is None


def test_last_boxed_takes_linear_time() -> None:
    start = time.perf_counter()
    assert last_boxed("\\boxed{" * 300_000) is None
    assert last_boxed("{" * 1_000_000 + r"\boxed{1}" + "}" * 1_000_000) is not None
    assert time.perf_counter() - start < 5


def test_last_hashes() -> None:
    assert last_hashes("a\n#### 5\nb #### 1,072 \nrest") == "1,072"
    assert last_hashes("####") == "" and last_hashes("### 5") is None


def test_final_answer_order() -> None:
    assert final_answer(r"#### 3 but \boxed{4}") == Candidate("4", True)
    assert final_answer("12 + 5 = 17. #### 17") == Candidate("17", True)
    assert final_answer("The answer is 5.") == Candidate("The answer is 5.", False)
    unmarked = final_answer("x" * 5_000 + " 5")
    assert unmarked is not None and len(unmarked.text) == 2_000 and unmarked.text.endswith(" 5")
    for nothing in ("", " \n", r"\boxed{}", "####", "\\boxed{" + "1" * 3_000 + "}"):
        assert final_answer(nothing) is None


@pytest.mark.parametrize(
    ("answer", "tidied"),
    [
        (" $18 ", "18"),
        (r"\$1,234,567.", "1234567"),
        ("$x^2$", "x^2"),
        (r"\( \frac12 \)", r"\frac12"),
        ("1,2", "1,2"),
        ("50%", r"50\%"),
        (r"50\%", r"50\%"),
        ("3 1/2", r"3\frac{1}{2}"),
        ("1.5e5", r"1.5 \times 10^{5}"),
        ("17 apples", "17"),
        ("1,200 square feet.", "1200"),
        ("12 and a half", "12 and a half"),
        ("3 dozen", "3 dozen"),
        ("5 apples and 3 pears", "5 apples and 3 pears"),
        ("2 x", "2 x"),
    ],
)
def test_tidy(answer: str, tidied: str) -> None:
    assert tidy(answer) == tidied


def test_gold_answer() -> None:
    assert gold_answer(r"so $\boxed{5}$") == gold_answer("long\n#### 5") == gold_answer("5") == "5"


def test_quick_verdict() -> None:
    assert quick_verdict("5", "05") is True and quick_verdict("5", "6") is False and quick_verdict("x", "x") is True
    assert quick_verdict("5", "5.0") is None and quick_verdict("x", "y") is None
    assert quick_verdict("5", "9" * 5_000) is None
