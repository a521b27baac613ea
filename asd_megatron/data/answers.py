r"""Finds the final answer in a text: answer tags, the last `\boxed{...}`, the last `#### N`. In linear time."""

from __future__ import annotations

import re
from dataclasses import dataclass

HASHES = "####"
BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped character (`\{`) is skipped
# A box without braces, `\boxed 2`: the rest of its formula, or else one number, symbol or pair of brackets.
REST_OF_FORMULA = re.compile(r"([^$\n]{0,200}?)[ \t]*(?:\$|\\\)|\\\])")
PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}")
BARE = re.compile(
    r"[-+]?(?:\d+(?:,\d+)*(?:\.\d+)?|\.\d+)(?:/\d+)?|\$[^$\n]{1,200}\$|\([^()\n]{1,200}\)|\[[^\[\]\n]{1,200}\]"
    r"|[A-Za-z](?![A-Za-z'])"
)
BETWEEN_BOXES = re.compile(  # of one list: `$, $`, ` and `, `\\text{ or }`, `$ and $y = `
    r"(?:[\s$,;&]|\\[()\[\],;: ]|\\q?quad|\\text ?\{ ?(?:and|or) ?\}|and|or|[A-Za-z](?:_\{?\w\}?)? ?=){0,60}"
)
MOST_BOXES = 100  # of one list
THINKING = re.compile(r"<\s*(/?)\s*(?:think|thinking|thought|reasoning)\b[^<>]*>", re.IGNORECASE)
ANSWER = re.compile(r"<\s*(/?)\s*(?:final[_ -]?)?answer\b[^<>]*>", re.IGNORECASE)


@dataclass(frozen=True)
class Boxed:
    r"""One `\boxed{content}`; text[start:end] is all of it, braces included. Not `closed`: the text ends inside it."""

    start: int
    end: int
    content: str
    closed: bool = True


def last_boxed(text: str) -> Boxed | None:
    r"""The last box that is complete, None if there is none.

    Boxes are `\boxed{...}`, `\fbox{...}` and, as in some solutions of MATH, `\boxed 2` without braces. Braces must
    balance (`\{` and `\}` do not count). Of nested boxes the innermost counts.
    """
    stop = len(text)
    for command in reversed(list(BOX.finditer(text))):
        # never looks past the next box, so that many unclosed boxes cost no more than one scan of the text
        box = _read_box(text, command.start(), command.end(), stop)
        if box is not None and box.closed:
            return box
        stop = command.start()
    return None


def last_hashes(text: str) -> str | None:
    """What follows the last `####` on its line, stripped (`#### 72` gives `72`); None if there is no `####`."""
    start = text.rfind(HASHES)
    return None if start < 0 else text[start + len(HASHES) :].partition("\n")[0].strip()


def outside_thinking(text: str) -> str | None:
    """The text without its `<think>...</think>` blocks; None if it ends inside a block.

    A `</think>` without `<think>` ends a block that the prompt opened: everything before it is thinking.
    `<thinking>`, `<thought>` and `<reasoning>` count too, in upper case or with attributes as well.
    """
    kept: list[str] = []
    start, inside = 0, False
    for tag in THINKING.finditer(text):
        if tag[1]:
            kept = kept if inside else []
            start, inside = tag.end(), False
        elif not inside:
            kept.append(text[start : tag.start()])
            inside = True
    return None if inside else "".join([*kept, text[start:]])


def marked_answer(text: str, *, several: bool = False) -> str | None:
    r"""The answer that the text marks: the content of the last `<answer>` tag (of the last box in it, if any), else
    of the last box, else what follows the last `####` on its line. With `several`, the contents of the last boxes with
    nothing but `,` or `and` between them, as a list: `\boxed{1} and \boxed{2}` is `1, 2`.

    Empty if the last mark is empty or the text ends inside it; None if the text marks no answer. Think blocks are for
    the caller to remove.
    """
    opening = next((m for m in reversed(list(ANSWER.finditer(text))) if not m[1]), None)
    if opening is None:
        boxes = _last_boxes(text, MOST_BOXES if several else 1)
        return ", ".join(boxes) if boxes else last_hashes(text)
    closing = next((m for m in ANSWER.finditer(text, opening.end()) if m[1]), None)
    content = text[opening.end() : closing.start() if closing else len(text)].strip()
    boxes = _last_boxes(content, MOST_BOXES if several else 1)
    if boxes:
        return ", ".join(boxes)
    return content if closing else ""


def _last_boxes(text: str, most: int) -> list[str]:
    """The contents of the last box (empty if it is incomplete) and of those that make up one list with it, in order."""
    found: list[Boxed] = []
    stop = len(text)
    for command in reversed(list(BOX.finditer(text))):
        box = _read_box(text, command.start(), command.end(), stop)
        if box is None:  # a mere mention: `I use \boxed notation`
            continue
        if found and not (box.closed and BETWEEN_BOXES.fullmatch(text, box.end, found[-1].start)):
            break
        found.append(box)
        stop = command.start()
        if len(found) == most or not box.closed:
            break
    return [box.content for box in reversed(found)]


def _read_box(text: str, start: int, content: int, stop: int) -> Boxed | None:
    cut_off = Boxed(start, stop, "", closed=False)
    if content >= stop:
        return cut_off
    if text[content] != "{":
        return _read_bare(text, start, content, stop)
    depth = 0
    for brace in BRACE.finditer(text, content, stop):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return Boxed(start, brace.end(), text[content + 1 : brace.start()].strip())
    return cut_off


def _read_bare(text: str, start: int, content: int, stop: int) -> Boxed | None:
    formula = REST_OF_FORMULA.match(text, content, stop)
    if formula is not None and formula[1] and not PROSE.search(formula[1]):
        return Boxed(start, formula.end(1), formula[1])
    bare = BARE.match(text, content, stop)
    return None if bare is None else Boxed(start, bare.end(), bare[0])
