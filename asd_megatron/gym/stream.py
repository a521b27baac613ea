"""Problems of one reasoning-gym task: an endless stream to train on, a fixed list that is held out.

The held-out problems are the first distinct items of seed 0. A training step draws from a seed of its own out of a
disjoint range and skips every held-out question. Both depend on the task, its parameters and `test_problems` alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from asd_megatron.data.jsonl import freeze
from asd_megatron.errors import UserError
from asd_megatron.gym.tasks import PREFIX, answer_text, digest, make_dataset, make_item
from asd_megatron.records import Problem

TEST_SEED = 0  # item i of seed s is item i - 1 of seed s + 1, so the ranges of seeds must be far apart
TRAIN_SEEDS = range(1 << 20, 1 << 31)  # NumPy takes seeds below 2^32
DRAWS = 10  # items drawn, at most, for each one wanted
LOOKED_AT = 100  # training problems whose prompt lengths are checked before the first step


@dataclass(frozen=True)
class Task:
    """A task with parameters that `check_task` accepts, and how many of its items are held out."""

    name: str
    parameters: Mapping[str, Any]
    test_problems: int = 500

    @cached_property
    def held_out(self) -> tuple[Problem, ...]:
        """The held-out problems. Raises UserError when there are fewer distinct ones."""
        return _held_out(self.name, self._parameters_text, self.test_problems)

    @cached_property
    def _parameters_text(self) -> str:
        return json.dumps(self.parameters, default=str)  # YAML has dates, JSON has not

    def draw(self, seed: int, n: int, without: Collection[str] = ()) -> Drawn:
        """The first `n` distinct problems of a seed, fewer if DRAWS * n items hold no more; none of the questions
        `without`."""
        size = n * DRAWS
        dataset = make_dataset(self.name, self.parameters, seed=seed, size=size)
        found: dict[str, Problem] = {}
        failure = ""
        for index in range(size):
            try:
                item = make_item(dataset, index)
            except Exception as e:  # some generators fail on some items, always on the same ones
                failure = f", and failed on others ({type(e).__name__}: {e})"
                continue
            question = item["question"]
            if question not in found and question not in without:
                found[question] = self._problem(item, seed, size, index)
            if len(found) == n:
                break
        return Drawn(tuple(found.values()), f"{size:,} draws gave {len(found)} distinct problems{failure}")

    def _problem(self, item: Mapping[str, Any], seed: int, size: int, index: int) -> Problem:
        name = digest(item)
        parameters = json.loads(self._parameters_text)
        origin = {"task": self.name, "parameters": parameters, "seed": seed, "size": size, "index": index}
        return Problem(
            prompt_id=f"{self.name}-{name}",
            answer=answer_text(item),
            prompt=item["question"],
            extra=freeze({**origin, "digest": name}),
        )


@dataclass(frozen=True)
class Drawn:
    """Distinct problems, and what to say when they are too few."""

    problems: tuple[Problem, ...]
    summary: str


@lru_cache(maxsize=4)
def _held_out(name: str, parameters: str, n: int) -> tuple[Problem, ...]:
    """Cached, because both the training stream and the held-out list need it."""
    drawn = Task(name, json.loads(parameters), n).draw(TEST_SEED, n)
    if len(drawn.problems) < n:
        raise UserError(
            f"{PREFIX}{name}: {drawn.summary}, fewer than data.test_problems {n}: set that to"
            f" {max(len(drawn.problems) // 2, 1)} or less, so that others are left to train on, or give parameters"
            " (data.reasoning_gym) that allow more problems"
        )
    return drawn.problems


@dataclass(frozen=True)
class TrainingStream:
    """The endless stream of a task's problems, with the interface of `data.problems.ProblemSet`."""

    task: Task

    @cached_property
    def _held_out(self) -> frozenset[str]:
        return frozenset(problem.question for problem in self.task.held_out)

    def batch(self, step: int, n: int, seed: int) -> list[Problem]:
        """The `n` distinct problems of training step `step` (from 1), a function of (step, n, seed). Raises UserError
        when the task has too few beside those held out."""
        drawn = self._draw(n, "step", seed, step)
        if len(drawn.problems) < n:
            raise UserError(
                f"{PREFIX}{self.task.name}: {drawn.summary} that are not held out, fewer than the {n} of step {step}:"
                " lower sampling.problems_per_step or data.test_problems, or give parameters (data.reasoning_gym) that"
                " allow more problems"
            )
        return list(drawn.problems)

    def take(self, n: int | None = None) -> list[Problem]:
        """`n` problems of the stream (None: 100), or as many distinct ones as there are."""
        return list(self._draw(LOOKED_AT if n is None else n, "look").problems)

    def _draw(self, n: int, *key: int | str) -> Drawn:
        hashed = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
        seed = TRAIN_SEEDS[int.from_bytes(hashed, "big") % len(TRAIN_SEEDS)]
        return self.task.draw(seed, n, self._held_out)


def item_of(problem: Problem) -> dict[str, Any]:
    """The reasoning-gym item (`question`, `answer`, `metadata`) that a problem was made from: for your own rewards."""
    origin = problem.extra
    dataset = make_dataset(origin["task"], origin["parameters"], seed=origin["seed"], size=origin["size"])
    return make_item(dataset, origin["index"])
