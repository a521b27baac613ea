"""Training and held-out problems: functions of their arguments, and never the same."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from asd_megatron.config.data import DataSection
from asd_megatron.errors import UserError
from asd_megatron.gym.stream import DRAWS, TRAIN_SEEDS, Task, TrainingStream, item_of
from asd_megatron.gym.tasks import MOST_TEST_PROBLEMS
from asd_megatron.run.sources import held_out_problems

SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # 200 questions: 10 x 10 x {+, -}


def stream(parameters: dict[str, Any] = SMALL, test_problems: int = 60) -> TrainingStream:
    return TrainingStream(Task("chain_sum", parameters, test_problems))


def test_a_step_is_a_function_of_step_number_and_seed() -> None:
    big = {"min_terms": 2, "max_terms": 4}
    batch = stream(big).batch(3, 16, 7)
    assert stream(big).batch(3, 16, 7) == batch
    assert len({p.question for p in batch}) == 16 == len({p.prompt_id for p in batch})
    for other in (stream(big).batch(4, 16, 7), stream(big).batch(3, 16, 8)):
        assert not {p.question for p in other} & {p.question for p in batch}


def test_a_problem_holds_what_its_item_has() -> None:
    problem = stream().batch(1, 4, 0)[0]
    item = item_of(problem)
    assert (problem.question, problem.answer, problem.solution) == (item["question"], item["answer"], None)
    assert problem.prompt_id == f"chain_sum-{problem.extra['digest']}"
    assert eval(problem.question.rpartition(":")[2].strip(" =")) == int(problem.answer)
    assert pickle.loads(pickle.dumps(problem)) == problem
    with pytest.raises(TypeError, match="read-only"):
        problem.extra["parameters"]["min_terms"] = 3  # type: ignore[index]


def test_held_out_problems_are_fixed_and_never_trained_on() -> None:
    held_out = held_out_problems(
        DataSection(train="x", test="reasoning_gym:chain_sum", reasoning_gym=SMALL, test_problems=60)
    )
    assert held_out is not None and len(held_out.take()) == 60 == len({p.question for p in held_out.take()})
    assert held_out.take(5) == held_out.take()[:5]
    assert held_out.batch(4, 16, 3) == held_out.batch(4, 16, 9)
    trained = {p.question for step in range(1, 30) for p in stream().batch(step, 16, 0)}
    trained |= {p.question for p in stream().take()}
    assert 130 < len(trained) <= 140, "nearly all of the others are met"
    assert not trained & {p.question for p in held_out.take()}


def test_the_seeds_of_the_two_splits_do_not_meet() -> None:
    assert TRAIN_SEEDS.start > MOST_TEST_PROBLEMS * DRAWS
    assert TRAIN_SEEDS.stop + MOST_TEST_PROBLEMS * DRAWS < 2**32, "NumPy's largest seed"


def test_too_few_distinct_problems() -> None:
    with pytest.raises(UserError, match=r"5,000 draws gave 200 distinct problems, fewer than data.test_problems 500"):
        stream(test_problems=500).batch(1, 4, 0)
    with pytest.raises(
        UserError, match=r"that are not held out, fewer than the 150 of step 1: lower sampling.problems"
    ):
        stream().batch(1, 150, 0)
    assert len(stream(test_problems=190).take()) <= 10, "those there are"


def test_items_that_a_generator_gives_up_on_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from asd_megatron.gym import stream as module

    make_item = module.make_item

    def moody(dataset: Any, index: int) -> Any:
        if index % 2:
            raise ValueError("no puzzle found")
        return make_item(dataset, index)

    monkeypatch.setattr(module, "make_item", moody)
    batch = stream().batch(1, 8, 0)
    assert [p.extra["index"] % 2 for p in batch] == [0] * 8
    with pytest.raises(UserError, match=r"failed on others \(ValueError: no puzzle found\)"):
        stream(test_problems=199).batch(1, 8, 0)
