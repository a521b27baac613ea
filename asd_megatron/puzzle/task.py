"""The search puzzle: which of the listed x solves m x + b = T (mod 17)?

A puzzle is shown as `Problem: 3 5 12 ... *2 add4 Target +10 Solve`: the candidates x, the multiplier m, the addend b,
the target T. A trace tests candidates and announces an answer. Testing x takes five words: a deliberation word, x,
`=(m x mod 17)`, `+(m x + b mod 17)`, a verdict. `Let 7 =14 +1 no Wait 3 =6 +10 yes So 3` tests 7, then 3, and answers
3; `So 5` at once is a guess. An answer without a test composes two tables mentally, which a small model does badly:
search pays, and costs tokens.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from asd_megatron.errors import UserError, plural
from asd_megatron.records import Problem

MODULUS = 17
MULTIPLIERS = (2, 3, 5)
ADDENDS = (1, 4, 9, 13)
CANDIDATES = 10  # how many x a puzzle lists, out of 1..16

FIRST_WORD = "Let"
LATER_WORDS = ("Wait", "Maybe", "Hmm")
DELIBERATION_WORDS = (FIRST_WORD, *LATER_WORDS)
NO_WORDS = ("no", "nope", "nah")
YES_WORD = "yes"
ANSWER_WORD = "So"
END_TOKEN = "<|end|>"  # noqa: S105 (a token of a text)

SPLITS = ("train", "test")
TEST_PUZZLES = 500  # the default held-out set
TEST_ONE_IN = 20  # fraction of all puzzles that the content hash puts on the test side
PUZZLES = {"train": 912_555, "test": 48_405}  # distinct puzzles by split, of C(16, 10) * 3 * 4 * 10 = 960,960


@dataclass(frozen=True)
class Puzzle:
    """One puzzle: the candidates in the order shown, m, b and the one candidate that solves it."""

    candidates: tuple[int, ...]
    multiplier: int
    addend: int
    solution: int

    def product(self, x: int) -> int:
        return self.multiplier * x % MODULUS

    def value(self, x: int) -> int:
        return (self.product(x) + self.addend) % MODULUS

    @property
    def target(self) -> int:
        return self.value(self.solution)

    def arithmetic(self, x: int) -> list[str]:
        """The two words that compute m x and m x + b."""
        return [f"={self.product(x)}", f"+{self.value(x)}"]

    @property
    def question(self) -> str:
        listed = " ".join(map(str, self.candidates))
        return f"Problem: {listed} *{self.multiplier} add{self.addend} Target +{self.target} Solve"

    @property
    def reference(self) -> str:
        """The shortest verified trace: test the solution, announce it."""
        x = self.solution
        return " ".join([FIRST_WORD, str(x), *self.arithmetic(x), YES_WORD, ANSWER_WORD, str(x)])

    @property
    def split(self) -> str:
        """`train` or `test`, by a hash of the content; the order of the candidates does not matter."""
        content = f"{sorted(self.candidates)} {self.multiplier} {self.addend} {self.solution}"
        digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
        return "test" if int.from_bytes(digest, "big") % TEST_ONE_IN == 0 else "train"

    def to_problem(self) -> Problem:
        """The puzzle as an ordinary problem with one user turn. `prompt_id` is a hash of the question."""
        return Problem(
            prompt_id="puzzle-" + hashlib.blake2b(self.question.encode(), digest_size=8).hexdigest(),
            answer=str(self.solution),
            messages=({"role": "user", "content": self.question},),
            solution=self.reference,
        )


def keyed_rng(*key: int | str) -> random.Random:
    """A generator that is a pure function of the key, the same in every process."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "big"))  # noqa: S311 (reproducible, no secret)


def draw_puzzle(rng: random.Random, split: str) -> Puzzle:
    """A puzzle of the split, uniform over candidates, m, b and solution."""
    if split not in SPLITS:
        raise UserError(f"the puzzle has no split {split!r}; use one of {', '.join(SPLITS)}")
    while True:
        candidates = tuple(rng.sample(range(1, MODULUS), CANDIDATES))
        puzzle = Puzzle(candidates, rng.choice(MULTIPLIERS), rng.choice(ADDENDS), rng.choice(candidates))
        if puzzle.split == split:
            return puzzle


class PuzzleStream:
    """Puzzles of one split as problems, with the interface of `data.problems.ProblemSet`.

    Without a size the stream is endless; with one it is a fixed list, the same for every `seed` of a run's own.
    """

    def __init__(self, split: str, size: int | None, seed: int) -> None:
        if split not in SPLITS:
            raise UserError(f"the puzzle has no split {split!r}; use puzzle:train or puzzle:test")
        if size is not None and not 1 <= size <= PUZZLES[split]:
            raise UserError(f"puzzle:{split} holds 1 to {PUZZLES[split]} problems, not {size}")
        self.split, self.seed = split, seed
        self._fixed = None if size is None else tuple(self._distinct(size, "list", seed))

    @classmethod
    def of(cls, split: str, n: int | None = None, seed: int = 0) -> Self:
        """`train`: an endless stream (or `n` fixed puzzles); `test`: `n` fixed held-out puzzles, 500 by default."""
        return cls(split, TEST_PUZZLES if n is None and split == "test" else n, seed)

    def _distinct(self, n: int, *key: int | str) -> list[Problem]:
        rng, found = keyed_rng("puzzle", self.split, *key), dict[str, Problem]()
        while len(found) < n:
            problem = draw_puzzle(rng, self.split).to_problem()
            found.setdefault(problem.prompt_id, problem)
        return list(found.values())

    def __len__(self) -> int:
        """The problems of the fixed list; for an endless stream the number of distinct puzzles of the split."""
        return PUZZLES[self.split] if self._fixed is None else len(self._fixed)

    def __iter__(self) -> Iterator[Problem]:
        if self._fixed is None:
            raise TypeError("an endless puzzle stream cannot be iterated; use batch(step, n, seed) or take(n)")
        return iter(self._fixed)

    def take(self, n: int | None = None) -> list[Problem]:
        """The first `n` problems of the fixed list (None: all); an endless stream gives `n` (None: 500)."""
        if self._fixed is None:
            return self._distinct(TEST_PUZZLES if n is None else n, "list", self.seed)
        return list(self._fixed[:n])

    def batch(self, step: int, n: int, seed: int) -> list[Problem]:
        """The `n` distinct problems of training step `step` (from 1): a function of (step, n, seed), so a resumed run
        needs no other state. A fixed list is walked through in order, round and round."""
        if self._fixed is None:
            return self._distinct(n, "step", seed, step)
        total = len(self._fixed)
        if n > total:
            raise UserError(
                f"the puzzle list has {plural(total, 'problem')}, fewer than the {n} of one step: make it longer"
            )
        return [self._fixed[((step - 1) * n + i) % total] for i in range(n)]


def score_response(problem: Problem, text: str, finished: bool = True) -> float:
    """1.0 if the response ends with `So x` and x is the solution, else 0.0.

    `finished` is False for a truncated response, which never counts: it has not announced anything yet.
    """
    words = text.split()
    if words and words[-1] == END_TOKEN:
        words = words[:-1]
    return float(finished and words[-2:] == [ANSWER_WORD, problem.answer])


def trial_words(puzzle: Puzzle, x: int, deliberation: str, rng: random.Random) -> list[str]:
    """The five words of one test of a candidate."""
    verdict = YES_WORD if x == puzzle.solution else rng.choice(NO_WORDS)
    return [deliberation, str(x), *puzzle.arithmetic(x), verdict]


def answer_words(x: int) -> tuple[str, str]:
    """The two words that announce an answer."""
    return ANSWER_WORD, str(x)
