"""The samples of one set as arrays, and the values of each problem that results are means of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asd_megatron.evaluation.estimators import Floats, majority_at_k, pass_at_k, powers_of_two
from asd_megatron.evaluation.intervals import standard_error
from asd_megatron.records import FinishReason, Group
from asd_megatron.reward.answers import final_answer

FAILURES = ("errors", "timeouts")
"""Counters of a verifier that say that answers scored 0 unjudged."""


@dataclass(frozen=True)
class Sample:
    """One sampled response of a problem. `extracted` is the final answer that it marks, tidied; None: it marks none."""

    response: str
    tokens: int
    finish_reason: str
    reward: float
    extracted: str | None

    @property
    def truncated(self) -> bool:
        return self.finish_reason == FinishReason.LENGTH


def extracted_answer(response: str) -> str | None:
    """The answer that a response marks (`reward/answers`), tidied; None if it marks none."""
    found = final_answer(response)
    return found.text if found is not None and found.marked and found.text else None


def samples_of(group: Group) -> tuple[Sample, ...]:
    """The samples of a rewarded group."""
    return tuple(
        Sample(r.text, len(r.response_ids), str(r.finish_reason), float(reward), extracted_answer(r.text))
        for r, reward in zip(group.rollouts, group.rewards, strict=True)
    )


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What the samples of one set did. `rewards` float64, `lengths` int64 (tokens, the end token included), `truncated`
    bool: [problems, samples]. `answers`: the extracted ones, None where there is none. `failures`: answers that
    scored 0 unjudged, by kind (`errors`, `timeouts`)."""

    rewards: Floats
    lengths: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    answers: tuple[tuple[str | None, ...], ...]
    failures: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, problems: Sequence[Sequence[Sample]], failures: Mapping[str, int] | None = None) -> Outcomes:
        """problems: the samples of each, equally many."""

        def array(name: str, dtype: Any) -> Any:
            return np.array([[getattr(sample, name) for sample in row] for row in problems], dtype=dtype)

        return cls(
            array("reward", np.float64),
            array("tokens", np.int64),
            array("truncated", np.bool_),
            tuple(tuple(sample.extracted for sample in row) for row in problems),
            dict(failures or {}),
        )

    @property
    def samples(self) -> int:
        """Samples of each problem."""
        return self.rewards.shape[1]

    @property
    def has_answers(self) -> bool:
        """Whether any response marks an answer: otherwise there is nothing to vote on."""
        return any(answer is not None for row in self.answers for answer in row)

    def average(self) -> Floats:
        """Mean reward of each problem's samples: avg@n is its mean over problems."""
        return self.rewards.mean(axis=1)

    def passed(self, k: int, threshold: float) -> Floats:
        """pass@k of each problem; correct: a reward of at least `threshold`."""
        return pass_at_k(self.samples, (self.rewards >= threshold).sum(axis=1), k)

    def majority(self, k: int) -> Floats:
        """majority@k of each problem."""
        pairs = zip(self.answers, self.rewards.tolist(), strict=True)
        return np.array([majority_at_k(answers, rewards, k) for answers, rewards in pairs])

    def by_problem(self, threshold: float, *, every_k: bool) -> dict[str, Floats]:
        """The values of each problem by metric: `avg@n`, `pass@k` (every k from 1 to n, or the powers of two and n),
        `maj@k` (powers of two from 2 and n; none without answers), `length_mean`, `truncated`."""
        n = self.samples
        few = powers_of_two(n)
        found = {f"avg@{n}": self.average()}
        found |= {f"pass@{k}": self.passed(k, threshold) for k in (range(1, n + 1) if every_k else few)}
        if self.has_answers:
            found |= {f"maj@{k}": self.majority(k) for k in few if k > 1}
        return found | {"length_mean": self.lengths.mean(axis=1), "truncated": self.truncated.mean(axis=1)}

    def metrics(self, threshold: float) -> dict[str, float]:
        """The metrics of a training step: means over problems, the standard errors of avg@n and pass@n, and how many
        answers were not judged."""
        values = self.by_problem(threshold, every_k=False)
        found = {name: float(numbers.mean()) for name, numbers in values.items()}
        n = self.samples
        shown = dict.fromkeys((f"avg@{n}", f"pass@{n}"))
        found |= {f"{name}_se": standard_error(values[name]) for name in shown}
        return found | {"errors": float(sum(self.failures.get(kind, 0) for kind in FAILURES))}
