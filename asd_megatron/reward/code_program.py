"""The program in a response: its last fenced block of Python."""

from __future__ import annotations

import re
import textwrap

from asd_megatron.data.answers import outside_thinking

FENCE = re.compile(r"^[ \t]*(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[^`\r\n]*?)[ \t]*$")
PYTHON = frozenset(("python", "py", "python3", "py3", "{python}", "{.python}"))


def program_of(response: str) -> str | None:
    """The last block that is marked as Python (```python, ```py, ~~~python), else the last without a language; None if
    there is none, or if the response ends inside such a block or inside a think block.

    Blocks of other languages (output, shell commands) are passed over. Think blocks do not count.
    """
    text = outside_thinking(response)
    marked = unmarked = None
    fence, language, lines = "", "", list[str]()
    for line in (text or "").splitlines():
        m = FENCE.match(line)
        if not fence:
            if m is not None:
                fence, language, lines = m["fence"], m["language"].partition(" ")[0], []
        elif m is not None and not m["language"] and m["fence"][0] == fence[0] and len(m["fence"]) >= len(fence):
            fence = ""
            program = textwrap.dedent("\n".join(lines)) + "\n"
            if language.lower() in PYTHON:
                marked = program
            elif not language:
                unmarked = program
        else:
            lines.append(line)
    if fence and (not language or language.lower() in PYTHON):
        return None
    return marked if marked is not None else unmarked
