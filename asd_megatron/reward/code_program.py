"""The program in a response: its last fenced block of Python."""

from __future__ import annotations

import re
import textwrap

from asd_megatron.data.answers import outside_thinking

FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[^`\r\n]*?)[ \t]*$")
AFTER_WORDS = re.compile(r"^(?P<indent>[ \t]*)[^`]*(?P<fence>`{3,})(?P<language>(?:python|py)3?)[ \t]*$", re.IGNORECASE)
PYTHON = re.compile(r"\{?\.?(?:python|py)[\d.]*(?![\w-])", re.IGNORECASE)  # python3.11, {.python}, python:main.py


def program_of(response: str) -> str | None:
    """The last block that is marked as Python (```python, ```py, ~~~python), else the last without a language; None if
    there is none, or if the response ends inside such a block or inside a think block.

    Blocks of other languages (output, shell commands) are passed over. Think blocks do not count. As in Markdown, a
    fence that is indented by 4 columns more than the opening one is part of the block (of a docstring, for instance).
    """
    text = outside_thinking(response)
    marked = unmarked = None
    fence, language, indent, lines = "", "", 0, list[str]()
    for line in re.split(r"\r?\n", text or ""):  # not splitlines: other separators may stand in a program's texts
        m = FENCE.match(line)
        if not fence or m and PYTHON.match(m["language"]) and not any(map(str.strip, lines)):
            m = m or AFTER_WORDS.match(line)
            if m is not None:
                fence, language, indent, lines = m["fence"], m["language"], _columns(m["indent"]), []
        elif m is not None and _closes(m, fence, indent):
            fence = ""
            program = textwrap.dedent("\n".join(lines)) + "\n"
            if PYTHON.match(language):
                marked = program
            elif not language:
                unmarked = program
        else:
            lines.append(line)
    if fence and (not language or PYTHON.match(language)):
        return None
    return marked if marked is not None else unmarked


def _closes(m: re.Match[str], fence: str, indent: int) -> bool:
    """Whether a line of a block with this opening fence ends it."""
    long_enough = m["fence"][0] == fence[0] and len(m["fence"]) >= len(fence)
    return long_enough and not m["language"] and _columns(m["indent"]) < indent + 4


def _columns(indent: str) -> int:
    return len(indent.expandtabs(4))
