"""Several problem sets as one, each giving its part of every step by weight."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from asd_megatron.data.jsonl import DataError
from asd_megatron.data.problem_sets import ProblemSet
from asd_megatron.data.reading import DUPLICATES, content_hash
from asd_megatron.errors import plural
from asd_megatron.records import Problem


@lru_cache(maxsize=64)
def shares(total: int, weights: tuple[float, ...]) -> tuple[int, ...]:
    """`total` problems divided over sets by weight, in whole numbers: Webster's (Sainte-Lague's) method, in which no
    set's number falls when the total grows.

    The next problem goes to the set with the largest weight / (2 * its number + 1), the first of several. A set's
    number is within 1 + K w / 2 of total * w, for K sets and weights w that sum to 1.

    Example: weights (3, 1) give (1, 0), (2, 0), (2, 1), (3, 1) for the totals 1 to 4.
    """
    parts = [weight / sum(weights) for weight in weights]
    # at most what the sets get in the end, so that few problems are left to divide one by one
    slack = len(parts) / 2
    counts = [max(0, math.floor((total - slack) * part - 0.5) - 1) for part in parts]
    for _ in range(total - sum(counts)):
        first = max(range(len(parts)), key=lambda i: (parts[i] / (2 * counts[i] + 1), -i))
        counts[first] += 1
    return tuple(counts)


@dataclass(frozen=True)
class Mixture:
    """Problem sets with weights, as one `ProblemSource`.

    Of the first T problems that a run draws, set k has given shares(T)[k], so every step has its weights' proportions
    to within one problem or two. Each set is visited in its own order, epoch after epoch (`ProblemSet.draws`): a small
    set with a large weight is repeated more often. No problem comes twice in one step. A problem's id is `SET/ID`.
    """

    sets: tuple[ProblemSet, ...]
    weights: tuple[float, ...]
    names: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, sets: Sequence[ProblemSet], weights: Sequence[float]) -> Mixture:
        """The mixture of sets, without the problems that an earlier one of them has too."""
        names = _names([problems.path for problems in sets])
        seen: set[str] = set()
        kept: list[ProblemSet] = []
        for name, problems in zip(names, sets, strict=True):
            keys = [content_hash(problem) for problem in problems]
            own = [problem for problem, key in zip(problems, keys, strict=True) if key not in seen]
            left_out = Counter(problems.left_out)
            left_out[f"{DUPLICATES} of other sets"] = len(problems) - len(own)
            if not own:
                raise DataError(f"data.train: every problem of {problems.path} is in the sets before it: leave it out")
            seen.update(keys)
            renamed = tuple(replace(problem, prompt_id=f"{name}/{problem.prompt_id}") for problem in own)
            kept.append(replace(problems, problems=renamed, left_out=dict(left_out)))
        return cls(tuple(kept), tuple(map(float, weights)), names)

    def __len__(self) -> int:
        return sum(map(len, self.sets))

    def __iter__(self) -> Iterator[Problem]:
        return (problem for problems in self.sets for problem in problems)

    def take(self, n: int | None = None) -> list[Problem]:
        """The first `n` problems, one set after another (None: all)."""
        return list(self)[:n]

    def batch(self, step: int, n: int, seed: int) -> list[Problem]:
        """The `n` distinct problems of training step `step` (from 1), a function of (step, n, seed). Raises DataError
        for a set that is smaller than what a step may take of it."""
        total = sum(self.weights)
        for problems, weight in zip(self.sets, self.weights, strict=True):
            part = weight / total
            most = min(n, math.floor(n * part + len(self.sets) * part + 1))
            if most > len(problems):
                raise DataError(
                    f"{problems.path} has {plural(len(problems), 'problem')}, and with its weight in data.train a step"
                    f" takes up to {most} of it: lower its weight or sampling.problems_per_step, or add problems"
                )
        before, after = (shares(first * n, self.weights) for first in (step - 1, step))
        drawn = []
        for problems, start, end in zip(self.sets, before, after, strict=True):
            drawn += problems.draws(start, end - start, seed)
        return drawn

    def keep(self, fits: Callable[[Problem], bool], reason: str) -> Mixture:
        """The mixture without the problems that do not fit; `reason` names them where they are counted."""
        return replace(self, sets=tuple(problems.keep(fits, reason) for problems in self.sets))

    def describe(self) -> str:
        """A line for each set, with its fraction of the problems that are drawn."""
        total = sum(self.weights)
        return "\n".join(
            f"{weight / total:.1%} {problems.describe()}"
            for problems, weight in zip(self.sets, self.weights, strict=True)
        )


def _names(paths: Sequence[str]) -> tuple[str, ...]:
    """A short name for each path, its last part without suffixes; several that would be equal are numbered."""
    stems = [Path(path).name.partition(".")[0] or path for path in paths]
    return tuple(
        stem if stems.count(stem) == 1 else f"{stem}-{stems[: i + 1].count(stem)}" for i, stem in enumerate(stems)
    )
