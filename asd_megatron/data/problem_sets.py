"""Sets of problems and the order in which training visits them. `reading` reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

from asd_megatron.data.jsonl import DataError
from asd_megatron.errors import plural
from asd_megatron.records import Problem


class ProblemSource(Protocol):
    """Problems to train on or to evaluate, from a file or generated. A step's problems are a pure function of
    (step, n, seed), so that a resumed run needs no other state."""

    def batch(self, step: int, n: int, seed: int) -> list[Problem]:
        """The `n` problems of training step `step` (from 1)."""

    def take(self, n: int | None = None) -> list[Problem]:
        """The first `n` problems (None: all), for evaluation."""


@dataclass(frozen=True)
class ProblemSet:
    """The problems of one file, in its order. `schema` says how the file was read (see `schemas`), `left_out` how many
    rows are not among the problems, by reason."""

    path: str
    problems: tuple[Problem, ...]
    schema: str = ""
    shuffle: bool = True
    left_out: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def none(cls) -> ProblemSet:
        """The empty set, for a collector that only evaluates."""
        return cls("", ())

    def __len__(self) -> int:
        return len(self.problems)

    def __iter__(self) -> Iterator[Problem]:
        return iter(self.problems)

    def describe(self) -> str:
        """`PATH, schema verl, 17,398 problems, 1,774,302 duplicates left out`."""
        parts = [
            self.path,
            *([f"schema {self.schema}"] if self.schema else []),
            f"{len(self):,} problem{'' if len(self) == 1 else 's'}",
        ]
        return ", ".join([*parts, *(f"{n:,} {reason} left out" for reason, n in self.left_out.items() if n)])

    def keep(self, fits: Callable[[Problem], bool], reason: str) -> ProblemSet:
        """The set without the problems that do not fit; `reason` names them where they are counted. Raises DataError if
        none is left."""
        kept = tuple(problem for problem in self.problems if fits(problem))
        if not kept:
            raise DataError(f"{self.path} has no problems: all {len(self):,} are {reason}")
        left_out = {**self.left_out, reason: len(self) - len(kept)}
        return replace(self, problems=kept, left_out=left_out)

    def draws(self, first: int, n: int, seed: int) -> list[Problem]:
        """The `n` distinct problems from place `first` (from 0) of an endless order, for a set of which a step takes
        varying numbers: a function of (first, n, seed).

        The order is that of one epoch after another, each its own. A call that goes beyond an epoch's end is filled
        from that epoch's beginning, so that nothing is drawn twice; the next epoch leaves out as many at its beginning.
        Raises DataError if the set has fewer than `n` problems.

        Example: 5 problems in the orders [3, 0, 4, 1, 2] and [1, 0, 2, 4, 3]: draws(3, 3) are 1, 2 and 3, and then
        draws(6, 3) are 0, 2 and 4.
        """
        total = len(self.problems)
        if n > total:
            raise self._too_small(n)
        epoch, place = divmod(first, total)
        order = _order(total, seed, epoch) if self.shuffle else range(total)
        return [self.problems[order[(place + i) % total]] for i in range(n)]

    def _too_small(self, n: int) -> DataError:
        total = len(self.problems)
        return DataError(
            f"{self.path} has {plural(total, 'problem')}, fewer than the {n} of one step: "
            f"lower sampling.problems_per_step to {total} or add problems"
        )

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
            raise self._too_small(n)
        if not self.shuffle:
            return [self.problems[((step - 1) * n + i) % total] for i in range(n)]
        epoch, place = divmod(step - 1, total // n)
        order = _order(total, seed, epoch)
        return [self.problems[i] for i in order[place * n : (place + 1) * n]]


@lru_cache(maxsize=16)  # each step asks for the orders of all sets of a mixture
def _order(total: int, seed: int, epoch: int) -> tuple[int, ...]:
    # sorted by a hash: the same order in every version of every random number library
    def key(i: int) -> bytes:
        return hashlib.blake2b(f"order/{seed}/{epoch}/{i}".encode(), digest_size=16).digest()

    return tuple(sorted(range(total), key=key))
