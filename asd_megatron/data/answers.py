r"""Where the answer is in a mathematical text: the last `\boxed{...}`, the last `#### N`. In linear time."""

from __future__ import annotations

from dataclasses import dataclass

BOXED = r"\boxed"
HASHES = "####"


@dataclass(frozen=True)
class Boxed:
    r"""One `\boxed{content}`; text[start:end] is the whole of it, braces included."""

    start: int
    end: int
    content: str


def last_boxed(text: str) -> Boxed | None:
    r"""The last `\boxed{...}` whose braces balance (`\{` and `\}` do not count), None if there is none."""
    stop = len(text)
    while (start := text.rfind(BOXED, 0, stop)) >= 0:
        # never looks past the next box, so that many unclosed boxes cost no more than one scan of the text
        box = _read_box(text, start, stop)
        if box is not None:
            return box
        stop = start
    return None


def _read_box(text: str, start: int, stop: int) -> Boxed | None:
    i = start + len(BOXED)
    while i < stop and text[i].isspace():
        i += 1
    if i >= stop or text[i] != "{":
        return None
    opening, depth = i, 0
    while i < stop:
        if text[i] == "\\":
            i += 2
            continue
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return Boxed(start, i + 1, text[opening + 1 : i].strip())
        i += 1
    return None


def last_hashes(text: str) -> str | None:
    """What follows the last `####` on its line, stripped (`#### 72` gives `72`); None if there is no `####`."""
    start = text.rfind(HASHES)
    return None if start < 0 else text[start + len(HASHES) :].partition("\n")[0].strip()
