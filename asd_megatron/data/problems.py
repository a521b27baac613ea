"""Problem files and the order in which training visits them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from asd_megatron.data.jsonl import DataError, FrozenDict, LineError, freeze, prompt_or_messages, read_jsonl, text_field
from asd_megatron.data.shapes import SHAPES, shape_of
from asd_megatron.records import Problem

FIELDS = ("prompt", "messages", "answer", "solution", "id")


@dataclass(frozen=True)
class ProblemSet:
    """The problems of one file, in its order. `shape` says how the file was read (see `shapes`)."""

    path: str
    problems: tuple[Problem, ...]
    shape: str = "canonical"
    shuffle: bool = True

    def __len__(self) -> int:
        return len(self.problems)

    def __iter__(self) -> Iterator[Problem]:
        return iter(self.problems)

    def take(self, n: int | None = None) -> list[Problem]:
        """The first `n` problems of the file (None: all)."""
        return list(self.problems[:n])

    def batch(self, step: int, n: int, seed: int) -> list[Problem]:
        """The `n` distinct problems of training step `step` (from 1).

        A function of (step, n, seed), so that a resumed run needs no other state.

        Shuffled: each epoch of `len(self) // n` steps has an order of its own, and the problems left over sit that
        epoch out. Not shuffled: the file's order, round and round. Raises DataError if the set has fewer than `n`
        problems.
        """
        total = len(self.problems)
        if n > total:
            raise DataError(
                f"{self.path} has {total} problems, fewer than the {n} of one step: "
                f"lower sampling.problems_per_step to {total} or add problems"
            )
        if not self.shuffle:
            return [self.problems[((step - 1) * n + i) % total] for i in range(n)]
        epoch, place = divmod(step - 1, total // n)
        order = _order(total, seed, epoch)
        return [self.problems[i] for i in order[place * n : (place + 1) * n]]


@lru_cache(maxsize=4)
def _order(total: int, seed: int, epoch: int) -> tuple[int, ...]:
    # sorting by a hash: the same order for ever, whatever the version of a random number library
    def key(i: int) -> bytes:
        return hashlib.blake2b(f"order/{seed}/{epoch}/{i}".encode(), digest_size=16).digest()

    return tuple(sorted(range(total), key=key))


def load_problems(path: str | Path, *, shuffle: bool = True) -> ProblemSet:
    """Read a JSONL problem file (docs/data.md).

    Raises DataError, as `file:line: reason` for a line that cannot be used: a missing or empty file, a malformed
    line, a line without its fields, two lines with the same id or the same content.
    """
    problems: list[Problem] = []
    lines: dict[str, int] = {}
    shape = ""
    for number, line in read_jsonl(path):
        try:
            shape = shape or shape_of(line)
            problem = _problem(SHAPES[shape](line))
            if problem.prompt_id in lines:
                what = (
                    f"the id {problem.prompt_id!r} is that" if "id" in line else "the same problem and answer as those"
                )
                raise LineError(
                    f"{what} of line {lines[problem.prompt_id]}; remove one of them or give each an `id` of its own"
                )
        except LineError as e:
            raise DataError(f"{path}:{number}: {e}") from e
        lines[problem.prompt_id] = number
        problems.append(problem)
    if not problems:
        raise DataError(f"{path} has no problems: every line is blank; write one JSON object a line")
    return ProblemSet(str(path), tuple(problems), shape, shuffle)


def _problem(line: dict[str, Any]) -> Problem:
    prompt, messages = prompt_or_messages(line)
    answer = _scalar(line, "answer")
    if answer is None:
        raise LineError("`answer` is missing")
    solution = text_field(line, "solution")
    prompt_id = _scalar(line, "id") or _content_hash(prompt, messages, answer)
    extra = freeze({k: v for k, v in line.items() if k not in FIELDS})
    return Problem(prompt_id, answer, prompt, messages, solution, extra)


def _scalar(line: dict[str, Any], name: str) -> str | None:
    """Text or a number as text; a whole number loses its `.0`."""
    value = line.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise LineError(f"`{name}` is too large a number; write it as text")
        return str(int(value)) if value == int(value) else str(value)
    text = text_field(line, name)
    return None if text is None else text.strip()


def _content_hash(prompt: str | None, messages: tuple[FrozenDict, ...] | None, answer: str) -> str:
    content = json.dumps([prompt, messages, answer], sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
