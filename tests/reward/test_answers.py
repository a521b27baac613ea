from __future__ import annotations

import time

import pytest

from asd_megatron.data.answers import last_boxed, last_hashes, marked_answer, outside_thinking
from asd_megatron.reward.answers import Candidate, final_answer, gold_answer, is_list, quick_verdict, tidy


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{5}", "5"),
        (r"first \boxed{4}, then \boxed {\frac{1}{2}} end", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a \boxed{b} c}", "b"),
        (r"\fbox{\boxed{5}}", "5"),
        (r"\boxed{7} and \boxed{8", "7"),
        (r"\boxed{7} and \boxed", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{4} or \fbox{5}", "5"),
        (r"escaped twice: \\boxed{5}", "5"),
        (r"a row \\\boxed{5}", "5"),
        (r"The largest value is $\boxed 2$.", "2"),
        (r"$x = \boxed -12 $, so", "-12"),
        (r"$\boxed\frac{\sqrt{3}}{2}$", r"\frac{\sqrt{3}}{2}"),
        (r"\(\boxed 3\sqrt{13}\)", r"3\sqrt{13}"),
        (r"it is \boxed2, which costs $3", "2"),
        (r"it is \boxed 1,234.5 and so on", "1,234.5"),
        (r"it is \boxed(5).", "(5)"),
        (r"it is \fbox B.", "B"),
        (r"\boxed{5}, as I say with \boxed notation", "5"),
    ],
)
def test_last_boxed(text: str, content: str) -> None:
    box = last_boxed(text)
    assert box is not None and box.content == content
    assert text[box.start : box.end].startswith(("\\boxed", "\\fbox")) and content in text[box.start : box.end]


@pytest.mark.parametrize("text", ["", "5", r"\boxed", r"\boxed{5", r"\boxed{\}", r"\boxed notation", r"\boxes{5}"])
def test_no_box(text: str) -> None:
    assert last_boxed(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 300_000,
        "{" * 1_000_000 + r"\boxed{1}" + "}" * 1_000_000,
        "\\boxed " * 100_000,
        "<think>" * 100_000,
        "</think>" * 100_000,
        "<answer" * 100_000,
        "<answer>" * 100_000 + "5",
        "so" + " " * 1_000_000 + "x",
        "\\boxed{1} and " * 100_000,
        "Answer: the answer is " * 100_000,
        "Answer: $" + "\\(" * 100_000,
        "1 " * 500_000,
        "1e" * 500_000,
    ],
)
def test_answers_are_found_in_linear_time(text: str) -> None:
    start = time.perf_counter()
    final_answer(text, several=True)
    gold_answer(text[:20_000])
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("text", "outside"),
    [
        ("<think>a</think>b", "b"),
        ("a</think>b", "b"),  # the prompt opened the block
        ("a <think>b</think> c <think>d</think> e", "a  c  e"),
        ("<think>a<think>b</think>c</think>d", "d"),
        ('<THINKING kind="long">a</THINKING>b', "b"),
        ("<reasoning>a</reasoning>b", "b"),
        ("<think>a</think>", ""),
        ("<think>a", None),
        ("5 <think>a</think> 6 <think>wait", None),
        ("<thinker>a", "<thinker>a"),
    ],
)
def test_outside_thinking(text: str, outside: str | None) -> None:
    assert outside_thinking(text) == outside


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>1</answer> no, <answer> 2\n</answer>.", "2"),
        (r"<answer>1</answer> \boxed{2} #### 3", "1"),
        (r"<answer>so \boxed{5}</answer>", "5"),
        (r"<answer>\boxed{5}", "5"),
        ('<Answer type="int">5</ANSWER>', "5"),
        ("<final_answer>5</final_answer>", "5"),
        ("</answer> #### 3\nrest", "3"),
        ("<answer>1</answer> and <answer>2", ""),
        (r"<answer>1</answer> and <answer>\boxed{2", ""),
        (r"\boxed{1} and \boxed{2", ""),
        (r"\boxed{1} and \boxed", ""),
        (r"#### 1 and \boxed{", ""),
        ("no mark: 3", None),
    ],
)
def test_marked_answer(text: str, answer: str | None) -> None:
    assert marked_answer(text) == answer


def test_last_hashes() -> None:
    assert last_hashes("a\n#### 5\nb #### 1,072 \nrest") == "1,072"
    assert last_hashes("####") == "" and last_hashes("### 5") is None


def test_final_answer_order() -> None:
    assert final_answer(r"#### 3 but \boxed{4}") == Candidate("4", True)
    assert final_answer("12 + 5 = 17. #### 17") == Candidate("17", True)
    assert final_answer("The answer is 5, as 2 + 3 is.") == Candidate("The answer is 5, as 2 + 3 is.", False)
    unmarked = final_answer("x" * 5_000 + " 5")
    assert unmarked is not None and len(unmarked.text) == 2_000 and unmarked.text.endswith(" 5")
    assert final_answer(r"<think>\boxed{7}</think> It is `9`.") == Candidate("It is 9.", False)
    taken_back = (
        r"\boxed{5}. No, \boxed{7",
        r"\boxed{5} <think>no",
        "<answer>5</answer> <answer>7",
        r"\boxed{5} \boxed{}",
    )
    for nothing in ("", " \n", r"\boxed{}", "####", "\\boxed{" + "1" * 3_000 + "}", "<think>5</think>", *taken_back):
        assert final_answer(nothing) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("17 + 17 = 34, not 35.\nAnswer: 34", "34"),  # DAPO's prompt asks for this line
        ("**Answer:** 34", "34"),
        ("**Final Answer**: $34$.", "34"),
        ("ANSWER\uff1a34", "34"),
        (r"The answer is: $\frac12$", r"\frac12"),
        (r"Final Answer: The final answer is $\frac12$. I hope it is correct.", r"\frac12"),  # Minerva's prompt
        ("So, the answer is $5$ square meters.", "5"),
        ("Answer: 34 apples", "34"),
        ("Answer: Sunday", "Sunday"),
        ("Answer: (1, 2)", "(1, 2)"),
        ("Answer: 17 or 18", "17 or 18"),
        ("The answer is $5$ or $6$.", "5 or 6"),
        ("The answer is 12. Wait, no.\nAnswer: 34\nI checked 35 and 36.", "34"),
        ("The answer is 12.\n#### 34", "34"),
    ],
)
def test_a_line_that_states_the_answer(text: str, answer: str) -> None:
    assert final_answer(text) == Candidate(answer, True)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"$\boxed{2}$, $\boxed{1}$.", "2, 1"),
        (r"\boxed{9}. Hence $x = \boxed{1}$, \(x_2=\boxed{2}\) \text{ or } \fbox{3}.", "1, 2, 3"),
        (r"first \boxed{1} then \boxed{2}", "2"),
        (r"<answer>\boxed{1}, \boxed{2}</answer>", "1, 2"),
        (r"\boxed{1}, \boxed{2}, \boxed{", None),
        (r"\boxed{1, 2}", "1, 2"),
        ("#### 1, 2", "1, 2"),
    ],
)
def test_several_boxes_are_a_list_where_the_answer_is_one(text: str, answer: str | None) -> None:
    found = final_answer(text, several=True)
    assert (found and found.text) == answer
    lists = ("1, 2", r"\{1, 2\}", r"\left\{1, 2\right\}", "1 or 2", r"1 \text{ and } 2", "(1,2),(3,4)")
    assert [is_list(x) for x in lists] == [True] * len(lists)
    assert not any(
        is_list(x) for x in ("1", "(1, 2)", "[0, 1)", r"\frac{1,2}{3}", "random", r"\operatorname{or}(x)", r"1\,2")
    )


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
        ("17 apples", "17"),
        ("1,200 square feet.", "1200"),
        ("12 and a half", "12 and a half"),
        ("3 dozen", "3 dozen"),
        ("5 apples and 3 pears", "5 apples and 3 pears"),
        ("2 x", "2 x"),
        ("-1./3", "-1/3"),
        ("3{,}14", "3.14"),
        (r"0.000\,01", "0.00001"),
        (r"\text{The answer is }7", "7"),
        ("+2", "2"),
        ("x = +2", "x = 2"),
        ("1 +2", "1 +2"),
        ("1+2", "1+2"),
        ("x +2", "x +2"),
        ("0.333...", "0.333..."),
        ("(-\u221e, 2)", r"(-\infty , 2)"),
        ("2\u221a3", r"2\sqrt{3}"),
        ("\u221a(x+1)", r"\sqrt{x+1}"),
        ("\u00bd", r"\frac{1}{2}"),
        ("-3 \u00bd", r"-3\frac{1}{2}"),
        ("x\u00bd", "x\u00bd"),
        ("90\u00b0", r"90^\circ"),
        ("25\u00b0C", "25\u00b0C"),
        ("\u20145", "-5"),
        ("5 \u20147", "5 \u20147"),
        ("\ufe635", "-5"),
        (r"\color{red}5", "5"),
        (r"{\color{red}{5}}", "5"),
        (r"\textcolor{red}{5}", "5"),
        (r"12\kern1pt345", "12345"),
        (r"12\mskip3mu345", "12345"),
        (r"\varnothing", r"\emptyset"),
    ],
)
def test_tidy(answer: str, tidied: str) -> None:
    assert tidy(answer) == tidied


@pytest.mark.parametrize(
    "answer",
    [
        *(rf"10{space}000" for space in (r"\,", r"\;", r"\:", r"\ ", "~", r"\thinspace ", r"{\,}", r"\hspace{1mm}")),
        *("10{,}000", r"10,\!000", r"10,\! 000"),
        *(f"10{space}000" for space in (" ", "\u2009", "\u202f", "\xa0", "\u2007", ",", "'", "\u2019", "_", "\u200b")),
        *("1e4", "1E+4", ".1e5", "10^4", "10^{4}", "10**4", "10\u2074", r"1 \times 10^{4}", r"0.1\cdot10^5", "1*10^4"),
        *("1 x 10^4", "1\u00d710\u2074", r"100000 \times 10^{-1}", "1e4 meters", "**10,000**", "**10 000** apples"),
    ],
)  # fmt: skip
def test_spellings_of_ten_thousand(answer: str) -> None:
    assert quick_verdict("10000", tidy(answer)) is True


def test_numbers_inside_an_expression() -> None:
    assert tidy(r"(10\,000, 2 \times 10^{3})") == "(10000, 2000)"
    assert tidy("x = 0.123 456") == "x = 0.123456"


@pytest.mark.parametrize(
    "answer",
    [
        r"\textbf{(073)}", r"\text{73}", r"\mathrm{(73)}.", r"\boldsymbol{\mathbf{073}}", r"\left(73\right)", "{73}",
        "**73**", "***73***", "__73__", "`73`", "```73```", "73**", "$73", r"\$73", "\u20ac73", "73 \u20ac", "US$73",
        "**$73**", "The answer is 73", "**Answer: 73**", "#### 73", "\uff17\uff13", r"\displaystyle 73", '"73"',
    ],
)  # fmt: skip
def test_what_surrounds_an_answer_is_removed(answer: str) -> None:
    assert quick_verdict("73", tidy(answer)) is True


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("12 345/346", r"12\frac{345}{346}"),
        ("x_1 000", "x_1 000"),
        ("2e^3", "2e^3"),
        ("1e4x", "1e4x"),
        ("2/3*10^4", "2/3*10^4"),
        ("10^{5000}", "10^{5000}"),
        ("10^{4}!", "10^{4}!"),
        (r"\text{a} + \text{b}", r"\text{a} + \text{b}"),
        ("{1}, {2}", "{1}, {2}"),
        ("(1,234)", "(1,234)"),
        ("**a** and **b**", "a and b"),
        ("2**3**2", "2**3**2"),
    ],
)
def test_other_things_are_left_alone(answer: str, kept: str) -> None:
    assert tidy(answer) == kept


def test_gold_answer() -> None:
    assert gold_answer(r"so $\boxed{5}$") == gold_answer("long\n#### 5") == gold_answer("5") == "5"
    assert gold_answer(r"so $\boxed 5$") == gold_answer(r"\fbox{5}") == "5"


def test_quick_verdict() -> None:
    assert quick_verdict("5", "05") is True and quick_verdict("5", "6") is False and quick_verdict("x", "x") is True
    assert quick_verdict("5", "5.0") is True and quick_verdict("0.50", ".5") is True and quick_verdict("x", "y") is None
    assert quick_verdict("5", "5.1") is None and quick_verdict("5", "9" * 5_000) is None
