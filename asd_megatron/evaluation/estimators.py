"""Estimators of one problem from its samples, as pure functions: pass@k and majority@k, exact over all subsets.

Of n samples, a random subset of k is looked at. Every value here is the expectation over all C(n, k) subsets, computed
in closed form.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def pass_at_k(samples: int, correct: NDArray[np.int64], k: int) -> Floats:
    """The probability that a random subset of k of the n samples holds a correct one, for each problem.

    1 - C(n - c, k) / C(n, k), unbiased for the probability that k new samples hold one (Chen et al. 2021, "Evaluating
    Large Language Models Trained on Code", Eq. 1), computed as 1 - prod_{i = n-c+1}^{n} (1 - k / i), without large
    numbers. correct: c of each problem, int64 [problems]; returns [problems]. Raises ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples: k is between 1 and the number of samples")
    table = np.ones(samples + 1)  # by c
    for c in range(samples - k + 1):
        table[c] = 1.0 - np.prod(1.0 - k / np.arange(samples - c + 1, samples + 1))
    return table[correct]


def majority_at_k(answers: Sequence[Hashable | None], rewards: Sequence[float], k: int) -> float:
    """The expected reward of the answer that most of a random subset of k samples give.

    Equal answers vote together; None (no answer) does not vote, and a subset without any answer gets 0. Among answers
    with equally many votes one is drawn at random. The reward of an answer is the mean over all samples that give it.
    Raises ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"majority@{k} of {len(answers)} samples: k is between 1 and the number of samples")
    counts = Counter(answer for answer in answers if answer is not None)
    sums: dict[Hashable, float] = dict.fromkeys(counts, 0.0)
    for answer, reward in zip(answers, rewards, strict=True):
        if answer is not None:
            sums[answer] += float(reward)
    classes = tuple(sorted((count, sums[answer] / count) for answer, count in counts.items()))
    return _expected_vote(classes, len(answers) - sum(counts.values()), k)


@lru_cache(4096)
def _expected_vote(classes: tuple[tuple[int, float], ...], silent: int, k: int) -> float:
    """classes: (samples, reward) of each answer. silent: samples without an answer.

    For every number x of winning votes, the subsets are counted by generating functions in the number of votes cast:
    `ways[v, t]` is the number of ways to draw v samples of the classes so far with t classes at x votes and none above,
    `reward[v, t]` the sum over these ways of the rewards of the classes at x. With t winners, each wins with
    probability 1 / t.
    """
    n = silent + sum(count for count, _ in classes)
    total = 0.0
    for x in range(1, min(k, max((count for count, _ in classes), default=0)) + 1):
        most = min(len(classes), k // x)
        ways = [[0.0] * (most + 1) for _ in range(k + 1)]
        reward = [[0.0] * (most + 1) for _ in range(k + 1)]
        for v in range(min(silent, k) + 1):
            ways[v][0] = float(math.comb(silent, v))
        for count, value in classes:
            ways, reward = _with_class(ways, reward, count, value, x)
        total += sum(reward[k][t] / t for t in range(1, most + 1))
    return total / math.comb(n, k)


Table = list[list[float]]


def _with_class(ways: Table, reward: Table, count: int, value: float, x: int) -> tuple[Table, Table]:
    """The two tables with one class more, of `count` samples and reward `value`."""
    k, most = len(ways) - 1, len(ways[0]) - 1
    new_ways, new_reward = ([[0.0] * (most + 1) for _ in range(k + 1)] for _ in range(2))
    for v, row in enumerate(ways):
        for t, number in enumerate(row):
            if not number:
                continue
            for votes in range(min(count, x, k - v) + 1):
                wins = int(votes == x)
                if t + wins > most:
                    continue
                choices = math.comb(count, votes)
                new_ways[v + votes][t + wins] += number * choices
                new_reward[v + votes][t + wins] += (reward[v][t] + wins * value * number) * choices
    return new_ways, new_reward


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... below n, and n."""
    return [*(2**i for i in range(n.bit_length()) if 2**i < n), n]
