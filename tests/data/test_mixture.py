from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from asd_megatron.data.mixture import Mixture, shares
from asd_megatron.data.problems import ProblemSet
from asd_megatron.errors import UserError
from asd_megatron.records import Problem


def problem_set(name: str, n: int, shuffle: bool = True) -> ProblemSet:
    problems = tuple(Problem(str(i), "1", prompt=f"{name} {i}") for i in range(n))
    return ProblemSet(f"data/{name}.jsonl", problems, "canonical", shuffle)


@pytest.mark.parametrize(
    "weights", [(1.0,), (3.0, 1.0), (1.0, 1.0, 1.0), (0.7, 0.29, 0.01), (5.0, 1e-3, 1.0, 1.0, 2.0)]
)
def test_shares_follow_the_weights_and_never_fall(weights: tuple[float, ...]) -> None:
    before = (0,) * len(weights)
    for total in range(1, 400):
        counts = shares(total, weights)
        assert sum(counts) == total and all(0 <= c - b <= 1 for b, c in zip(before, counts, strict=True))
        for weight, count in zip(weights, counts, strict=True):
            part = weight / sum(weights)
            assert abs(count - total * part) <= 1 + len(weights) * part / 2
        before = counts
    assert [shares(n, (3.0, 1.0)) for n in range(1, 5)] == [(1, 0), (2, 0), (2, 1), (3, 1)]


def test_frequencies_epochs_and_distinct_problems() -> None:
    """3 : 1 of a set of 30 and one of 7, 8 a step."""
    mixture = Mixture.of([problem_set("a", 30), problem_set("b", 7)], [3, 1])
    drawn: list[str] = []
    for step in range(1, 101):
        ids = [problem.prompt_id for problem in mixture.batch(step, 8, seed=5)]
        assert len(set(ids)) == 8
        assert sum(i.startswith("a/") for i in ids) == 6
        drawn += ids
    counts = Counter(drawn)
    assert {name: sum(n for i, n in counts.items() if i.startswith(name)) for name in ("a/", "b/")} == {
        "a/": 600,
        "b/": 200,
    }
    # 20 epochs of a, 28.6 of b; a step across an epoch's end repeats and leaves out less than its own share
    assert {counts[f"a/{i}"] for i in range(30)} == {20}
    assert all(22 <= counts[f"b/{i}"] <= 35 for i in range(7))


def test_a_step_is_a_function_of_step_and_seed() -> None:
    sets = [problem_set("a", 30), problem_set("b", 9)]
    first, again = Mixture.of(sets, [1, 1]), Mixture.of(sets, [1, 1])
    expected = [[p.prompt_id for p in first.batch(step, 5, seed=3)] for step in range(1, 9)]
    assert [p.prompt_id for p in again.batch(7, 5, seed=3)] == expected[6]
    assert [p.prompt_id for p in again.batch(7, 5, seed=4)] != expected[6]


def test_draws_across_the_end_of_an_epoch() -> None:
    problems = problem_set("a", 5)
    epochs = [[p.prompt_id for p in problems.draws(5 * e, 5, seed=1)] for e in range(2)]
    assert [p.prompt_id for p in problems.draws(3, 4, seed=1)] == [epochs[0][i] for i in (3, 4, 0, 1)]
    assert [p.prompt_id for p in problems.draws(7, 2, seed=1)] == epochs[1][2:4]
    assert [p.prompt_id for p in problem_set("a", 5, shuffle=False).draws(8, 3, seed=1)] == ["3", "4", "0"]


def test_names_copies_and_sets_that_are_too_small() -> None:
    a, b = problem_set("a", 4), problem_set("b", 3)
    again = ProblemSet("other/a.parquet", (*b.problems, *a.problems[:2]), "canonical")
    mixture = Mixture.of([a, again], [1, 1])
    assert [p.prompt_id for p in mixture] == [f"a-1/{i}" for i in range(4)] + [f"a-2/{i}" for i in range(3)]
    assert mixture.sets[1].left_out == {"duplicates of other sets": 2}
    lines = mixture.describe().splitlines()
    assert lines[0] == "50.0% data/a.jsonl, schema canonical, 4 problems"
    assert lines[1].endswith("3 problems, 2 duplicates of other sets left out")
    with pytest.raises(UserError, match=r"a\.parquet has 3 problems, and .* a step takes up to 4 of it"):
        mixture.batch(1, 5, seed=0)
    with pytest.raises(UserError, match="every problem of .* is in the sets before it"):
        Mixture.of([a, a], [1, 1])
    assert len(mixture.keep(lambda p: not p.prompt_id.endswith("0"), "zeros")) == 5


def test_a_recipe_with_several_sets(tmp_path: Path) -> None:
    from asd_megatron.config.data import DataSection
    from asd_megatron.run.sources import described, training_problems

    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "answer": "1"}\n{"prompt": "y", "answer": "long"}\n')
    (tmp_path / "b.jsonl").write_text('{"q": "z", "answer": "1"}\n')
    sets = [
        str(tmp_path / "a.jsonl"),
        {"path": str(tmp_path / "b.jsonl"), "weight": 3, "fields": {"prompt": "q", "answer": "answer"}},
    ]
    data = DataSection.model_validate({"train": sets, "filter": {"max_answer_chars": 2}})
    problems = training_problems(data)
    assert [p.question for p in problems.take()] == ["x", "z"]
    assert "1 with a long answer left out" in described(data.train_name, problems)
    assert DataSection.model_validate(data.model_dump(mode="json")) == data
