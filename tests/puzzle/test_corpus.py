"""The warm-start corpus: what its traces are, what they weigh, and that a step is a function of its number."""

from __future__ import annotations

from dataclasses import replace

import pytest

from asd_megatron.antisd.privileged import feedback
from asd_megatron.data.prompts import PromptRenderer, TeacherLimits
from asd_megatron.data.sft import SftExample
from asd_megatron.errors import UserError
from asd_megatron.puzzle.corpus import (
    CORRECT,
    INCORRECT,
    Corpus,
    CorpusOptions,
    Trace,
    privileged_trace,
    unprivileged_trace,
)
from asd_megatron.puzzle.task import MODULUS, Puzzle, draw_puzzle, keyed_rng
from asd_megatron.puzzle.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
RENDERER = PromptRenderer(TOKENIZER)
CORPUS = Corpus(RENDERER, TOKENIZER, TeacherLimits())
HABITS = CorpusOptions().drill_steps + 1
VERDICTS = ("no", "nope", "nah", "yes")


def check(puzzle: Puzzle, trace: Trace) -> tuple[list[int], int]:
    """Asserts that a trace is well formed and true; returns the candidates tested and the answer."""
    *tests, so, answer, end = trace.words
    assert (so, end) == ("So", "<|end|>") and len(tests) % 5 == 0
    tested = []
    for i in range(0, len(tests), 5):
        word, x, product, total, verdict = tests[i : i + 5]
        assert word == "Let" if i == 0 else word in ("Wait", "Maybe", "Hmm")
        m, b = puzzle.multiplier, puzzle.addend
        assert (product, total) == (f"={m * int(x) % MODULUS}", f"+{(m * int(x) + b) % MODULUS}")
        assert verdict == "yes" if int(x) == puzzle.solution else verdict in VERDICTS[:3]
        tested.append(int(x))
    assert len(set(tested)) == len(tested) and set(tested) <= set(puzzle.candidates)
    assert puzzle.solution not in tested[:-1] and int(answer) in puzzle.candidates
    assert trace.correct == (int(answer) == puzzle.solution)
    return tested, int(answer)


def puzzles(n: int) -> list[tuple[Puzzle, int]]:
    return [(draw_puzzle(keyed_rng("test", i), "train"), i) for i in range(n)]


def test_a_drill_searches_to_the_end() -> None:
    for puzzle, i in puzzles(50):
        tested, answer = check(puzzle, unprivileged_trace(puzzle, 0.0, keyed_rng(i)))
        assert tested[-1] == answer == puzzle.solution


def test_habits_give_up_after_a_failed_test() -> None:
    lengths = []
    for puzzle, i in puzzles(300):
        tested, answer = check(puzzle, unprivileged_trace(puzzle, 0.85, keyed_rng(i)))
        assert tested and (answer not in tested or tested[-1] == answer)
        lengths.append(len(tested))
    assert lengths.count(1) / 300 == pytest.approx(0.1 + 0.9 * 0.85, abs=0.07)


def test_privileged_traces_know_the_answer() -> None:
    traces = [
        (puzzle, privileged_trace(puzzle, CorpusOptions(), keyed_rng("privileged", i))) for puzzle, i in puzzles(400)
    ]
    for puzzle, trace in traces:
        tested, answer = check(puzzle, trace)
        assert answer == puzzle.solution and trace.given_tests <= len(tested)
        assert puzzle.solution not in tested[: trace.given_tests]
    given = [trace.given_tests for _, trace in traces]
    assert set(given) == set(range(9))
    assert given.count(0) / 400 == pytest.approx(0.5, abs=0.08)
    at_once = sum(trace.words[0] == "So" for _, trace in traces if not trace.given_tests)
    assert at_once / given.count(0) == pytest.approx(0.98, abs=0.03)


def test_loss_weights() -> None:
    words = ["Let", "3", "=6", "+10", "nope", "Wait", "7", "=14", "+1", "yes", "So", "7", "<|end|>"]
    assert CORPUS.loss_weights(Trace(tuple(words), True)) == [1, 1, 1, 1, 2, 1, 1, 1, 1, 5, 1, 1, 1]
    assert CORPUS.loss_weights(Trace(tuple(words), True, given_tests=1)) == [0, 0, 1, 1, 2, 1, 1, 1, 1, 5, 1, 1, 1]


def is_privileged(example: SftExample) -> bool:
    return "attempt:" in TOKENIZER.decode(example.prompt_ids)


@pytest.mark.parametrize("step", [1, HABITS])
def test_examples(step: int) -> None:
    examples = CORPUS.batch(step, 400, 3)
    end, unknown = TOKENIZER.eos_token_id, TOKENIZER.unk_token_id
    for example in examples:
        assert len(example.response_ids) == len(example.loss_weights)
        assert example.response_ids[-1] == end and example.response_ids.count(end) == 1
        assert unknown not in example.prompt_ids + example.response_ids
    assert sum(map(is_privileged, examples)) / 400 == pytest.approx(0.35, abs=0.07)
    student = [len(e.response_ids) for e in examples if not is_privileged(e)]
    mean = sum(student) / len(student)
    assert 25 < mean < 36 if step == 1 else 8 < mean < 12


def test_privileged_prompts_are_those_of_the_training_run() -> None:
    example = next(e for e in CORPUS.batch(HABITS, 50, 3) if is_privileged(e))
    text = TOKENIZER.decode(example.prompt_ids)
    question, rest = text.removeprefix("<|user|> ").split(" Your previous attempt: ")
    demonstration, rest = rest.split(" Previous assessment: ")
    assert rest.removesuffix(" Now solve this problem step by step. <|end|> <|assistant|>") in (CORRECT, INCORRECT)
    assert demonstration.startswith("Let") and demonstration.split()[-2] == "So" and "<|end|>" not in demonstration
    assert question.startswith("Problem:") and question.endswith("Solve")


def test_feedback_lines_are_the_ordinary_ones() -> None:
    assert (feedback(1.0), feedback(0.0)) == (CORRECT, INCORRECT)


def test_a_step_is_a_function_of_its_number() -> None:
    batch = CORPUS.batch(HABITS, 8, 5)
    assert batch == Corpus(RENDERER, TOKENIZER, TeacherLimits()).batch(HABITS, 8, 5)
    assert batch[:3] == CORPUS.batch(HABITS, 3, 5)
    assert batch != CORPUS.batch(HABITS + 1, 8, 5) and batch != CORPUS.batch(HABITS, 8, 6)


def test_only_train_puzzles() -> None:
    prompts = {TOKENIZER.decode(e.prompt_ids) for e in CORPUS.batch(1, 200, 0)}
    for prompt in prompts:
        words = prompt.split()[1:]
        xs, m, b = tuple(map(int, words[1:11])), int(words[11][1:]), int(words[12].removeprefix("add"))
        (x,) = [x for x in xs if f"+{(m * x + b) % MODULUS}" == words[14]]
        assert Puzzle(xs, m, b, x).split == "train"


def test_limits_that_are_too_small_are_named() -> None:
    corpus = Corpus(RENDERER, TOKENIZER, replace(TeacherLimits(), max_teacher_tokens=40))
    with pytest.raises(UserError, match=r"privileged\.max_teacher_tokens"):
        corpus.batch(1, 50, 0)
