"""pass@k, majority@k and their errors against brute force over all subsets."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from asd_megatron.evaluation.estimators import majority_at_k, pass_at_k, powers_of_two
from asd_megatron.evaluation.intervals import difference, estimate, estimates


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_fraction_of_subsets_with_a_correct_sample(n: int) -> None:
    for c in range(n + 1):
        flags = [i < c for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(combinations(flags, k))
            want = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(n, np.array([c]), k)[0] == pytest.approx(want, abs=1e-14)


def test_pass_at_k_of_many_samples_is_stable() -> None:
    """Where the binomial coefficients have hundreds of digits."""
    n, c, k = 2000, 3, 700
    want = 1 - math.comb(n - c, k) / math.comb(n, k)
    assert pass_at_k(n, np.array([c, 0, n]), k) == pytest.approx([want, 0.0, 1.0], abs=1e-12)
    for wrong in (0, 5):
        with pytest.raises(ValueError, match="k is between"):
            pass_at_k(4, np.array([1]), wrong)


def _voted(answers: list[str | None], rewards: list[float], k: int) -> float:
    """By brute force: the mean over all subsets of the mean over the answers with the most votes."""
    total, subsets = 0.0, list(combinations(range(len(answers)), k))
    for subset in subsets:
        votes = {a: sum(answers[i] == a for i in subset) for a in {answers[i] for i in subset} - {None}}
        winners = [a for a, number in votes.items() if number == max(votes.values())]
        of_answer = {a: [r for r, b in zip(rewards, answers, strict=True) if b == a] for a in winners}
        total += sum(sum(of_answer[a]) / len(of_answer[a]) for a in winners) / len(winners) if winners else 0.0
    return total / len(subsets)


def test_majority_at_k_is_the_expected_vote_of_all_subsets() -> None:
    random = np.random.default_rng(0)
    for _ in range(40):
        n = int(random.integers(1, 9))
        answers = [("a", "b", "c", "d", None)[i] for i in random.integers(0, 5, n)]
        rewards = [float(a == "a") if random.random() < 0.9 else 0.5 for a in answers]
        for k in range(1, n + 1):
            assert majority_at_k(answers, rewards, k) == pytest.approx(_voted(answers, rewards, k), abs=1e-12)


def test_majority_of_one_is_the_mean_reward_and_ties_are_shared() -> None:
    assert majority_at_k(["a", "b", "b", None], [1.0, 0.0, 0.0, 0.0], 1) == 0.25
    assert majority_at_k(["a", "b"], [1.0, 0.0], 2) == 0.5
    assert majority_at_k([None, None], [0.0, 0.0], 2) == 0.0
    many = [str(i % 11) for i in range(64)]
    assert 0 < majority_at_k(many, [float(a == "0") for a in many], 32) < 1


def test_powers_of_two() -> None:
    assert [powers_of_two(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_estimates_cluster_by_problem() -> None:
    """Samples of one problem that are all alike count once, not n times; the interval covers the truth as often as it
    says."""
    random = np.random.default_rng(1)
    values = random.random(50)
    found = estimate(values)
    assert found.error == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    assert found.low < found.value < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.error, rel=0.1)
    rows = estimates(np.stack([values, np.ones(50)]))
    assert rows[0] == found and (rows[1].low, rows[1].high) == (1.0, 1.0)
    alone = estimate(np.array([0.5]))
    assert alone.value == 0.5 and math.isnan(alone.error) and math.isnan(alone.low)


def test_paired_differences_are_sharper_than_two_intervals() -> None:
    random = np.random.default_rng(2)
    base = random.random(80)
    found = difference(base, base + 0.02 + 0.01 * random.standard_normal(80))
    assert found.estimate.low > 0 and found.estimate.error < 0.1 * estimate(base).error
    assert difference(np.array([0.1 + 0.2 + 0.3]), np.array([0.3 + 0.2 + 0.1])).equal == 1
    assert difference(np.array([0.0, 1.0, 0.5]), np.array([1.0, 0.0, 0.5])).as_json().items() >= {
        "better": 1, "worse": 1, "equal": 1, "problems": 3,
    }.items()  # fmt: skip
