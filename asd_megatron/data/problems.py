"""Problem files and the order in which training visits them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from asd_megatron.data.jsonl import (
    DataError,
    FrozenDict,
    LineError,
    freeze,
    optional_text_field,
    prompt_or_messages,
    read_jsonl,
    scalar_field,
)
from asd_megatron.data.shapes import SHAPES, shape_of
from asd_megatron.errors import plural
from asd_megatron.records import Problem

FIELDS = ("prompt", "messages", "answer", "solution", "id")


class ProblemSource(Protocol):
    """Problems to train on or to evaluate, from a file or generated. A step's problems are a pure function of
    (step, n, seed), so that a resumed run needs no other state."""

    def batch(self, step: int, n: int, seed: int) -> list[Problem]:
        """The `n` problems of training step `step` (from 1)."""

    def take(self, n: int | None = None) -> list[Problem]:
        """The first `n` problems (None: all), for evaluation."""


@dataclass(frozen=True)
class ProblemSet:
    """The problems of one file, in its order. `shape` says how the file was read (see `shapes`)."""

    path: str
    problems: tuple[Problem, ...]
    shape: str = "canonical"
    shuffle: bool = True

    @classmethod
    def none(cls) -> ProblemSet:
        """The empty set, for a collector that only evaluates."""
        return cls("", ())

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

        Shuffled: each epoch of `len(self) // n` steps has an order of its own; the problems left over are dropped for
        that epoch. Not shuffled: the file's order, repeated. Raises DataError if the set has fewer than `n` problems.

        Example: 5 problems and n = 2 make epochs of two steps; epoch 0 may visit [3, 0], [4, 1] and drop 2.
        """
        total = len(self.problems)
        if n > total:
            raise DataError(
                f"{self.path} has {plural(total, 'problem')}, fewer than the {n} of one step: "
                f"lower sampling.problems_per_step to {total} or add problems"
            )
        if not self.shuffle:
            return [self.problems[((step - 1) * n + i) % total] for i in range(n)]
        epoch, place = divmod(step - 1, total // n)
        order = _order(total, seed, epoch)
        return [self.problems[i] for i in order[place * n : (place + 1) * n]]


@lru_cache(maxsize=4)
def _order(total: int, seed: int, epoch: int) -> tuple[int, ...]:
    # sorted by a hash: the same order in every version of every random number library
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
    answer = scalar_field(line, "answer")
    if answer is None:
        raise LineError("`answer` is missing")
    solution = optional_text_field(line, "solution")
    prompt_id = scalar_field(line, "id") or _content_hash(prompt, messages, answer)
    extra = freeze({k: v for k, v in line.items() if k not in FIELDS})
    return Problem(prompt_id, answer, prompt, messages, solution, extra)


def _content_hash(prompt: str | None, messages: tuple[FrozenDict, ...] | None, answer: str) -> str:
    content = json.dumps([prompt, messages, answer], sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
