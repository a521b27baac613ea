"""Puzzles, their split, the streams and the verifier."""

from __future__ import annotations

from itertools import combinations

import pytest

from asd_megatron.errors import UserError
from asd_megatron.puzzle.task import (
    ADDENDS,
    CANDIDATES,
    MODULUS,
    MULTIPLIERS,
    PUZZLES,
    Puzzle,
    PuzzleStream,
    score_response,
)

GOLDEN_TEST = "Problem: 6 8 1 4 15 5 13 2 3 12 *2 add9 Target +5 Solve"
GOLDEN_TRAIN = "Problem: 10 14 8 12 3 13 1 15 6 7 *2 add4 Target +1 Solve"
PUZZLE = Puzzle((3, 5, 7, 1, 2, 4, 6, 8, 9, 16), 2, 4, 7)


def test_a_puzzle_as_text_and_as_problem() -> None:
    assert PUZZLE.question == "Problem: 3 5 7 1 2 4 6 8 9 16 *2 add4 Target +1 Solve"
    assert PUZZLE.reference == "Let 7 =14 +1 yes So 7"
    problem = PUZZLE.to_problem()
    assert (problem.question, problem.answer, problem.solution) == (PUZZLE.question, "7", PUZZLE.reference)
    assert problem.messages == ({"role": "user", "content": PUZZLE.question},)


def test_every_puzzle_is_in_one_split_and_the_counts_are_those_stated() -> None:
    counts = {"train": 0, "test": 0}
    for xs in combinations(range(1, MODULUS), CANDIDATES):
        for m in MULTIPLIERS:
            for b in ADDENDS:
                for x in xs:
                    counts[Puzzle(xs, m, b, x).split] += 1
    assert counts == PUZZLES


def test_the_order_of_the_candidates_does_not_change_the_split() -> None:
    shuffled = Puzzle(tuple(reversed(PUZZLE.candidates)), PUZZLE.multiplier, PUZZLE.addend, PUZZLE.solution)
    assert shuffled.split == PUZZLE.split
    assert shuffled.to_problem().prompt_id != PUZZLE.to_problem().prompt_id


def test_a_puzzle_has_one_solution() -> None:
    for problem in PuzzleStream.of("test").take(50):
        words = problem.question.split()
        xs, m, b = map(int, words[1:11]), int(words[11][1:]), int(words[12].removeprefix("add"))
        assert [str(x) for x in xs if f"+{(m * x + b) % MODULUS}" == words[14]] == [problem.answer]


def test_streams_never_change() -> None:
    # golden: runs, weights and reported numbers depend on these streams
    assert PuzzleStream.of("test").take(1)[0].question == GOLDEN_TEST
    assert PuzzleStream.of("train").batch(1, 1, 1234)[0].question == GOLDEN_TRAIN


def test_train_is_an_endless_random_access_stream() -> None:
    train = PuzzleStream.of("train")
    assert len(train) == PUZZLES["train"]
    batch = train.batch(7, 32, 1)
    assert batch == PuzzleStream.of("train").batch(7, 32, 1)
    assert batch[:8] == train.batch(7, 8, 1)
    ids = {p.prompt_id for p in batch}
    assert len(ids) == 32
    for other in (train.batch(8, 32, 1), train.batch(7, 32, 2), train.take(32)):
        assert not ids & {p.prompt_id for p in other}
    with pytest.raises(TypeError, match="endless"):
        iter(train)


def test_test_is_a_fixed_list() -> None:
    test = PuzzleStream.of("test")
    assert len(test) == len(test.take()) == len({p.prompt_id for p in test}) == 500
    assert test.take(20) == PuzzleStream.of("test", 20).take()
    assert PuzzleStream.of("test", 20, seed=1).take() != test.take(20)
    few = PuzzleStream.of("test", 5)
    assert [p.prompt_id for p in few.batch(2, 3, 0)] == [few.take()[i].prompt_id for i in (3, 4, 0)]


def test_errors_say_what_to_do() -> None:
    with pytest.raises(UserError, match="puzzle:train or puzzle:test"):
        PuzzleStream.of("valid")
    with pytest.raises(UserError, match="1 to 48405"):
        PuzzleStream.of("test", 100_000)
    with pytest.raises(UserError, match="5 problems, fewer than the 6"):
        PuzzleStream.of("test", 5).batch(1, 6, 0)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Let 7 =14 +1 yes So 7", 1.0),
        ("So 7", 1.0),
        ("So 7 <|end|>", 1.0),
        ("Let 7 =14 +1 yes So 6", 0.0),
        ("So 7 So 6", 0.0),
        ("So 7 Wait", 0.0),
        ("Let 7 =14 +1 yes", 0.0),
        ("7", 0.0),
        ("", 0.0),
    ],
)
def test_score(text: str, score: float) -> None:
    assert score_response(PUZZLE.to_problem(), text) == score


def test_a_truncated_response_never_counts() -> None:
    assert score_response(PUZZLE.to_problem(), "So 7", finished=False) == 0.0
