from __future__ import annotations

import pytest

from asd_megatron.data.templates import (
    PAPER_WORDING,
    fill_lines,
    fill_paragraphs,
    student_template_fault,
    teacher_template_fault,
)

VALUES = {"prompt": "P", "solution": "S", "feedback": "F"}


def test_the_default_wording_is_the_papers() -> None:
    assert fill_paragraphs(PAPER_WORDING, VALUES) == (
        "P\n\nYour previous attempt:\nS\n\nPrevious assessment:\nF\n\nNow solve this problem step by step."
    )
    assert fill_paragraphs(PAPER_WORDING, {"prompt": "P", "feedback": "F"}) == (
        "P\n\nPrevious assessment:\nF\n\nNow solve this problem step by step."
    )
    assert teacher_template_fault(PAPER_WORDING, paragraphs=True) is None


def test_parts_without_a_value_are_left_out() -> None:
    template = "Seen: {solution}\n \n\n{prompt}\n\n{feedback}\nAgain.\n"
    assert fill_paragraphs(template, VALUES) == "Seen: S\n \n\nP\n\nF\nAgain.\n"
    assert fill_paragraphs(template, {"prompt": "P", "solution": None}) == "P"
    assert fill_lines("{prompt} {solution}\n{solution}\n{feedback}!\nEnd", {"prompt": "P", "feedback": "F"}) == (
        "P \nF!\nEnd"
    )
    # a placeholder in a value, and braces of LaTeX, are text
    assert fill_paragraphs(r"\boxed{answer} {prompt}", {"prompt": "{solution}\n\n{x}"}) == (
        "\\boxed{answer} {solution}\n\n{x}"
    )


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{solution}", "{prompt} exactly once"),
        ("{prompt}\n\n{prompt}\n\n{solution}", "{prompt} exactly once"),
        ("{prompt}\n\n{feedback}", "and {solution}"),
        ("{problem}\n\n{solution}", "It holds {problem}: write {prompt}"),
        ("{prompt}\n\n{demonstration}", "It holds {demonstration}: write {solution}"),
        ("{prompt}\n\n{solution}\n\n{assessment}", "It holds {assessment}: write {feedback}"),
        ("{prompt}\nAttempt:\n{solution}", "put an empty line between"),
        ("{prompt}\n\n{solution} {feedback}", "{feedback} and {solution} in one paragraph"),
    ],
)
def test_faults_of_a_teachers_template(template: str, reason: str) -> None:
    assert reason in (teacher_template_fault(template, paragraphs=True) or "")


def test_other_faults() -> None:
    assert teacher_template_fault("{prompt} {solution}", paragraphs=False) is None
    assert teacher_template_fault("{prompt}\n\n{solution}\n\nPut it into \\boxed{answer}.", paragraphs=True) is None
    assert "write {prompt}" in (student_template_fault("Q: {question}") or "")
    assert student_template_fault("Q: {prompt}") is None
