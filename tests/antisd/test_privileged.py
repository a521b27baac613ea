"""Which demonstration and which feedback a teacher sees."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asd_megatron.antisd import Demonstration, PrivilegedContextError, choose_demonstrations, feedback
from asd_megatron.records import DemonstrationSource as Source

KEY = (1234, 7, "problem-1")


def sources(rewards: list[float], **options: object) -> list[Source]:
    return [d.source for d in choose_demonstrations(rewards, key=KEY, **options)]  # type: ignore[arg-type]


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=10), st.integers(0, 99), st.booleans())
def test_demonstrations_are_correct_and_not_ones_own(rewards: list[float], step: int, reference: bool) -> None:
    chosen = choose_demonstrations(rewards, key=(0, step, "p"), has_reference=reference)
    for i, d in enumerate(chosen):
        others = [j for j, r in enumerate(rewards) if r >= 1 and j != i]
        if others:
            assert d.source is Source.GROUP and d.sample in others
        else:
            assert d == Demonstration(Source.REFERENCE if reference else Source.NONE, -1)


def test_sole_success() -> None:
    assert sources([0, 1, 0]) == [Source.GROUP, Source.NONE, Source.GROUP]
    assert sources([0, 1, 0], has_reference=True) == [Source.GROUP, Source.REFERENCE, Source.GROUP]
    assert sources([0, 1, 0], when_no_solution="feedback_only")[1] is Source.FEEDBACK_ONLY
    assert sources([0, 1, 0], when_no_solution="reference_answer")[1] is Source.REFERENCE_ANSWER
    own = choose_demonstrations([0, 1, 0], key=KEY, exclude_self=False)
    assert own == [Demonstration(Source.GROUP, 1), Demonstration(Source.SELF, 1), Demonstration(Source.GROUP, 1)]


def test_exclude_self_off_makes_ones_own_a_candidate() -> None:
    drawn: Counter[int] = Counter()
    for step in range(300):
        for i, d in enumerate(choose_demonstrations([1, 1, 1], key=(0, step, "p"), exclude_self=False)):
            assert d.source is (Source.SELF if d.sample == i else Source.GROUP)
            drawn[d.sample] += 1
    assert all(240 < drawn[j] < 360 for j in range(3))


@pytest.mark.parametrize("per_group", [1, 2, 3])
def test_a_group_draws_from_few_demonstrations(per_group: int) -> None:
    rewards = [1, 0, 1, 1, 0, 1, 1, 0]
    first: Counter[int] = Counter()
    for step in range(400):
        chosen = choose_demonstrations(rewards, key=(0, step, "p"), per_group=per_group)
        of_others = {d.sample for d in chosen}
        assert len(of_others) <= per_group + (per_group == 1)  # its author alone needs another
        assert all(d.sample != i and rewards[d.sample] == 1 and d.source is Source.GROUP for i, d in enumerate(chosen))
        first[chosen[1].sample] += 1
    assert set(first) == {0, 2, 3, 5, 6} and all(45 < n < 115 for n in first.values())  # uniform, as without


def test_sharing_changes_nothing_where_there_is_nothing_to_choose() -> None:
    assert sources([1, 0], per_group=1) == [Source.NONE, Source.GROUP]
    assert sources([0, 0], per_group=1, has_reference=True) == [Source.REFERENCE] * 2
    assert [d.sample for d in choose_demonstrations([1, 0, 0], key=KEY, per_group=2, exclude_self=False)] == [0, 0, 0]


def test_all_wrong() -> None:
    assert sources([0, 0]) == [Source.NONE] * 2
    assert sources([0, 0], has_reference=True, when_no_solution="feedback_only") == [Source.REFERENCE] * 2
    assert sources([0, 0], when_no_solution="reference_answer") == [Source.REFERENCE_ANSWER] * 2
    assert sources([0, 0], when_no_solution="reference_answer", has_answer=False) == [Source.NONE] * 2
    assert sources([0, 0], when_no_solution="feedback_only") == [Source.FEEDBACK_ONLY] * 2


def test_success_threshold() -> None:
    assert sources([0.8, 0.2]) == [Source.NONE] * 2
    assert sources([0.8, 0.2], success_threshold=0.8) == [Source.NONE, Source.GROUP]


def test_rollouts_that_may_not_demonstrate() -> None:
    assert sources([1, 1, 0], eligible=[False, True, True]) == [Source.GROUP, Source.NONE, Source.GROUP]
    with pytest.raises(ValueError):
        choose_demonstrations([1, 0], key=KEY, eligible=[True])


def test_the_draw_depends_on_the_key_alone_and_is_even() -> None:
    rewards = [1.0] * 5
    assert choose_demonstrations(rewards, key=KEY) == choose_demonstrations(rewards, key=KEY)
    # a golden draw: Python's own hash would differ between processes
    assert [d.sample for d in choose_demonstrations(rewards, key=KEY)] == [3, 2, 0, 4, 3]
    drawn = Counter(choose_demonstrations(rewards, key=(0, step, "p"))[0].sample for step in range(2000))
    assert set(drawn) == {1, 2, 3, 4}
    assert all(400 < n < 600 for n in drawn.values())
    assert len({tuple(d.sample for d in choose_demonstrations(rewards, key=(seed, 0, "p"))) for seed in range(20)}) > 10


def test_feedback_lines() -> None:
    assert feedback(1.0) == "Your answer is correct."
    assert feedback(0.0) == "Your answer is incorrect."
    assert feedback(0.5, success_threshold=0.5) == "Your answer is correct."
    assert feedback(0.6, "fraction", tests=5) == "Your code passes 3 of 5 test cases."


def test_refusals() -> None:
    with pytest.raises(PrivilegedContextError, match="choose mask, reference_answer or feedback_only"):
        sources([0, 1], when_no_solution="skip")
    with pytest.raises(PrivilegedContextError, match="binary or fraction"):
        feedback(1.0, "stars")
    with pytest.raises(PrivilegedContextError, match="number of test cases"):
        feedback(1.0, "fraction")
