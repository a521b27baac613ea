"""The warm-start corpus: un-privileged traces that give up early, privileged ones that take the shortcut.

Un-privileged traces search in random order without replacement; after each failed test they give up with probability
g and announce an untested candidate. Privileged traces have a verified solution and a feedback line in the prompt,
through the ordinary privileged template, and at each decision announce the known solution, test it first, or test a
wrong candidate. In the first `drill_steps` steps g is 0: they teach the arithmetic; the rest teaches the habits.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asd_megatron.data.prompts import PromptRenderer, TeacherLimits
from asd_megatron.data.sft import SftExample
from asd_megatron.errors import UserError
from asd_megatron.puzzle.task import (
    END_TOKEN,
    FIRST_WORD,
    LATER_WORDS,
    NO_WORDS,
    YES_WORD,
    Puzzle,
    answer_words,
    draw_puzzle,
    keyed_rng,
    trial_words,
)
from asd_megatron.records import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORDS_PER_TEST = 5  # deliberation word, candidate, product, sum, verdict
CORRECT, INCORRECT = "Your answer is correct.", "Your answer is incorrect."


@dataclass(frozen=True)
class CorpusOptions:
    """The corpus in numbers. `docs/puzzle.md` states the defaults; the shipped weights learned from them."""

    drill_steps: int = 1000  # first steps, in which every un-privileged trace searches to the end
    habit_steps: int = 500
    privileged_share: float = 0.35
    moderate_share: float = 0.10  # of the un-privileged traces: these give up with probability give_up_moderate
    give_up_moderate: float = 0.5
    give_up: float = 0.85  # after each failed test, all other un-privileged traces
    reference_share: float = 0.3  # of the privileged prompts: show the reference; the rest show a successful trace
    announce: float = 0.98  # privileged, at each decision: announce the known solution untested
    test_solution: float = 0.005  # privileged, at each decision: test the known solution, then announce it
    resume_share: float = 0.5  # of the privileged traces: resume a search after some failed tests
    yes_weight: float = 5.0  # loss weight of the verdict `yes`
    no_weight: float = 2.0  # loss weight of the verdicts no, nope, nah

    @property
    def steps(self) -> int:
        return self.drill_steps + self.habit_steps


@dataclass(frozen=True)
class Trace:
    """The words of a response, the end token included. The decisions (deliberation word and candidate) of the first
    `given_tests` tests carry no loss: the model is shown them, not taught to make them."""

    words: tuple[str, ...]
    correct: bool
    given_tests: int = 0


def deliberation_word(rng: random.Random, index: int) -> str:
    """The first word of test number `index`."""
    return FIRST_WORD if index == 0 else rng.choice(LATER_WORDS)


def unprivileged_trace(puzzle: Puzzle, give_up: float, rng: random.Random) -> Trace:
    """A search in random order that stops after each failed test with probability `give_up` and then guesses."""
    order = list(puzzle.candidates)
    words: list[str] = []
    rng.shuffle(order)
    for i, x in enumerate(order):
        if i > 0 and rng.random() < give_up:
            return Trace((*words, *answer_words(x), END_TOKEN), x == puzzle.solution)
        words += trial_words(puzzle, x, deliberation_word(rng, i), rng)
        if x == puzzle.solution:
            break
    return Trace((*words, *answer_words(puzzle.solution), END_TOKEN), True)


def privileged_trace(puzzle: Puzzle, options: CorpusOptions, rng: random.Random) -> Trace:
    """The response to a prompt that shows a verified solution. A fraction (`resume_share`) of them resumes a search
    after 1 to 8 failed tests, so that the model is in distribution when it scores a student's response in mid-search.
    """
    wrong, solution = [x for x in puzzle.candidates if x != puzzle.solution], puzzle.solution
    words: list[str] = []
    rng.shuffle(wrong)
    given = rng.randint(1, len(wrong) - 1) if rng.random() < options.resume_share else 0
    for i in range(len(wrong) + 1):
        draw = rng.random() if i >= given else 1.0
        if draw < options.announce:
            break
        if draw < options.announce + options.test_solution or i == len(wrong):
            words += trial_words(puzzle, solution, deliberation_word(rng, i), rng)
            break
        words += trial_words(puzzle, wrong[i], deliberation_word(rng, i), rng)
    return Trace((*words, *answer_words(solution), END_TOKEN), True, given)


class Corpus:
    """The corpus as a random-access stream: `batch(step, n, seed)` is a function of its arguments.

    Args:
        renderer: the one that the reinforcement run uses, so that its prompts and these are the same tokens.
        tokenizer: the puzzle's.
        limits: of the privileged prompts.
    """

    def __init__(
        self,
        renderer: PromptRenderer,
        tokenizer: PreTrainedTokenizerBase,
        limits: TeacherLimits,
        options: CorpusOptions | None = None,
    ) -> None:
        self.renderer, self.limits, self.options = renderer, limits, options or CorpusOptions()
        self._ids: dict[str, int] = tokenizer.get_vocab()

    def batch(self, step: int, n: int, seed: int) -> list[SftExample]:
        """The `n` examples of supervised step `step` (from 1; the first `drill_steps` drill)."""
        return [self.example(step, keyed_rng("puzzle-corpus", seed, step, i)) for i in range(n)]

    def example(self, step: int, rng: random.Random) -> SftExample:
        puzzle, options = draw_puzzle(rng, "train"), self.options
        problem = puzzle.to_problem()
        if rng.random() < options.privileged_share:
            trace = privileged_trace(puzzle, options, rng)
            prompt = self._privileged_prompt(problem, self._demonstration(puzzle, step, rng), len(trace.words), rng)
        else:
            trace = unprivileged_trace(puzzle, self._give_up(step, rng), rng)
            prompt = self.renderer.student(problem).ids
        return SftExample(
            prompt_ids=tuple(prompt),
            response_ids=tuple(self._ids[word] for word in trace.words),
            loss_weights=tuple(self.loss_weights(trace)),
        )

    def _privileged_prompt(
        self, problem: Problem, demonstration: str, response_len: int, rng: random.Random
    ) -> tuple[int, ...]:
        feedback = CORRECT if rng.random() < 0.5 else INCORRECT  # a coin: it says nothing about the solution
        ids = self.renderer.teacher(problem, demonstration, feedback, response_len, self.limits).ids
        if ids is None:
            raise UserError(
                f"a privileged prompt of the puzzle's corpus does not fit ({len(demonstration.split())} tokens of "
                f"demonstration, {response_len} of response): raise privileged.max_solution_tokens and "
                "privileged.max_teacher_tokens"
            )
        return tuple(ids.tolist())

    def loss_weights(self, trace: Trace) -> list[float]:
        """One weight a word: verdicts count more, decisions that were given count nothing."""
        options = self.options
        weights = [
            options.yes_weight if word == YES_WORD else options.no_weight if word in NO_WORDS else 1.0
            for word in trace.words
        ]
        for test in range(trace.given_tests):
            weights[test * WORDS_PER_TEST : test * WORDS_PER_TEST + 2] = [0.0, 0.0]
        return weights

    def _give_up(self, step: int, rng: random.Random) -> float:
        moderate = rng.random() < self.options.moderate_share
        if step <= self.options.drill_steps:
            return 0.0
        return self.options.give_up_moderate if moderate else self.options.give_up

    def _demonstration(self, puzzle: Puzzle, step: int, rng: random.Random) -> str:
        if rng.random() < self.options.reference_share:
            return puzzle.reference
        while True:
            trace = unprivileged_trace(puzzle, self._give_up(step, rng), rng)
            if trace.correct:
                return " ".join(trace.words[:-1])
