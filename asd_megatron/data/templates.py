r"""The wording of prompts as templates: their placeholders, what is wrong with one, and how they are filled.

Placeholders are `{prompt}` (the problem), `{solution}` (the demonstration) and `{feedback}` (the assessment of the
student's own response). All other braces are plain text, so `\boxed{}` needs no escaping. Values are put in once:
a placeholder inside a value is text too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# The paper's wording (section 4 set-up, Appendix C): the teacher's user turn.
PAPER_WORDING = (
    "{prompt}\n\n"
    "Your previous attempt:\n{solution}\n\n"
    "Previous assessment:\n{feedback}\n\n"
    "Now solve this problem step by step."
)
PLACEHOLDER = re.compile(r"\{(prompt|solution|feedback)\}")
MISNAMED = {
    "problem": "prompt",
    "question": "prompt",
    "demonstration": "solution",
    "attempt": "solution",
    "answer": "solution",
    "assessment": "feedback",
}
_MISNAMED = re.compile(rf"(?<![\w\\}}])\{{({'|'.join(MISNAMED)})\}}")  # not the argument of a LaTeX command
_BETWEEN_PARAGRAPHS = re.compile(r"(\n[ \t]*\n\s*)")


def student_template_fault(template: str) -> str | None:
    """What is wrong with `data.raw_prompt`, with what to do; None if nothing is."""
    if PLACEHOLDER.findall(template) != ["prompt"]:
        return f"must hold {{prompt}} exactly once, and neither {{solution}} nor {{feedback}}{_hint(template)}"
    return None


def teacher_template_fault(template: str, *, paragraphs: bool) -> str | None:
    """What is wrong with a teacher's template, with what to do; None if nothing is.

    `paragraphs`: it is filled by `fill_paragraphs` (`privileged.chat_template`), otherwise by `fill_lines`
    (`privileged.raw_template`).
    """
    found = PLACEHOLDER.findall(template)
    misnamed = _hint(template)
    if found.count("prompt") != 1 or "solution" not in found or misnamed:
        return f"must hold {{prompt}} exactly once and {{solution}}; {{feedback}} is optional{misnamed}"
    for text in _BETWEEN_PARAGRAPHS.split(template) if paragraphs else ():
        kinds = sorted(set(PLACEHOLDER.findall(text)))
        if len(kinds) > 1:
            return (
                f"has {{{kinds[0]}}} and {{{kinds[1]}}} in one paragraph, which is left out when one of them has no"
                " value: put an empty line between them"
            )
    return None


def _hint(template: str) -> str:
    wrong = _MISNAMED.search(template)
    return "" if wrong is None else f". It holds {wrong[0]}: write {{{MISNAMED[wrong[1]]}}}"


def fill_lines(template: str, values: Mapping[str, str | None]) -> str:
    """Replace the placeholders; a line that holds one without a value is left out, unless it holds `{prompt}` too."""
    return _fill((line for line in template.splitlines(keepends=True) if _known(line, values)), values)


def fill_paragraphs(template: str, values: Mapping[str, str | None]) -> str:
    r"""Replace the placeholders; a paragraph (text between empty lines) that holds one without a value is left out.

    Example: PAPER_WORDING without `solution` gives "PROMPT\n\nPrevious assessment:\nFEEDBACK\n\nNow solve ...".
    """
    # texts at even places, the empty lines before each at odd ones: [p0, gap1, p1, gap2, p2]
    pieces = _BETWEEN_PARAGRAPHS.split(template)
    kept: list[str] = []
    for i in range(0, len(pieces), 2):
        if _known(pieces[i], values):
            kept += [pieces[i - 1], pieces[i]] if kept else [pieces[i]]
    return _fill(kept, values)


def _known(text: str, values: Mapping[str, str | None]) -> bool:
    found = PLACEHOLDER.findall(text)
    return "prompt" in found or all(values.get(name) is not None for name in found)


def _fill(parts: Iterable[str], values: Mapping[str, str | None]) -> str:
    return PLACEHOLDER.sub(lambda m: values.get(m[1]) or "", "".join(parts))
