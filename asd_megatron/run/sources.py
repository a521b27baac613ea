"""What the recipe's names stand for: model folders, problem sets and supervised examples, built-in or files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from asd_megatron.config.data import Data
from asd_megatron.data.problems import ProblemSet, load_problems
from asd_megatron.data.prompts import TeacherLimits
from asd_megatron.data.sft import SftExample, load_sft
from asd_megatron.errors import UserError
from asd_megatron.gym.stream import Task, TrainingStream
from asd_megatron.gym.tasks import task_of
from asd_megatron.records import Example, Problem, Rollout, TokenTable

PUZZLE = "puzzle:"
WARM_START = "puzzle:warm_start"


class ProblemSource(Protocol):
    """A problem set: a step's problems are a pure function of (step, n, seed), so that resuming needs no other
    state."""

    def batch(self, step: int, n: int, seed: int) -> list[Problem]: ...

    def take(self, n: int | None = None) -> list[Problem]: ...


class SourceMetrics(Protocol):
    """What only a problem set's own module can measure of its responses, by metric name."""

    def of_step(self, examples: Sequence[Example], table: TokenTable) -> dict[str, float]: ...

    def of_evaluation(self, rollouts: Sequence[Rollout], rewards: Sequence[float]) -> dict[str, float]: ...


@runtime_checkable
class MeasuredSource(Protocol):
    """A problem set that brings metrics of its own."""

    def metrics(self, tokenizer: Any) -> SourceMetrics: ...


def own_metrics(problems: ProblemSource, tokenizer: Any) -> SourceMetrics | None:
    """The problem set's own metrics; None for a set that brings none."""
    return problems.metrics(tokenizer) if isinstance(problems, MeasuredSource) else None


class SupervisedSource(Protocol):
    """Supervised examples by step, also a pure function of (step, n, seed)."""

    def batch(self, step: int, n: int, seed: int) -> list[SftExample]: ...


def model_folder(path: str) -> Path:
    """The folder of `model.path`; `puzzle:warm_start` is the puzzle model that comes with the package."""
    if path == WARM_START:
        return Path(__file__).parents[1] / "puzzle" / "warm_start"
    return Path(path)


def training_problems(data: Data) -> ProblemSource:
    """The problem set of `data.train`: `puzzle:train`, a task `reasoning_gym:NAME`, or a JSONL file."""
    task = _task(data, data.train)
    return _named(data.train, data.shuffle) if task is None else TrainingStream(task)


def held_out_problems(data: Data) -> ProblemSource | None:
    """The problem set of `data.test`, by the same names; None if there is none."""
    if data.test is None:
        return None
    task = _task(data, data.test)
    return _named(data.test) if task is None else ProblemSet(data.test, task.held_out, shuffle=False)


def _task(data: Data, name: str) -> Task | None:
    task = task_of(name)
    return None if task is None else Task(task, data.reasoning_gym, data.test_problems)


def _named(name: str, shuffle: bool = True) -> ProblemSource:
    if name.startswith(PUZZLE):
        from asd_megatron.puzzle.metrics import puzzle_source

        return puzzle_source(name.removeprefix(PUZZLE))
    return load_problems(name, shuffle=shuffle)


@dataclass(frozen=True)
class SupervisedFile:
    """The examples of a file, in a new order each epoch."""

    examples: Sequence[SftExample]
    shuffle: bool

    def batch(self, step: int, n: int, seed: int) -> list[SftExample]:
        """The `n` examples of step `step` (from 1). Seeds beyond 64 bits count modulo 2^64; recipes have none."""
        import numpy as np

        total = len(self.examples)
        first = (step - 1) * n
        out = []
        order: Any = None
        epoch = -1
        for position in range(first, first + n):
            if position // total != epoch:
                epoch = position // total
                key = np.array([seed % 2**64, epoch], dtype=np.uint64)
                order = np.random.Generator(np.random.Philox(key=key)).permutation(total)
            index = int(order[position % total]) if self.shuffle else position % total
            out.append(self.examples[index])
        return out


def supervised_source(
    name: str, renderer: Any, tokenizer: Any, *, steps: int, end_token_id: int, max_tokens: int, shuffle: bool = True
) -> SupervisedSource:
    """`puzzle:corpus` (the puzzle's warm start, its two stages divided over `steps` as 2 : 1) or a JSONL file of given
    responses."""
    if name == "puzzle:corpus":
        from asd_megatron.puzzle.corpus import Corpus, CorpusOptions

        drill = steps * 2 // 3
        options = CorpusOptions(drill_steps=drill, habit_steps=steps - drill)
        return Corpus(renderer, tokenizer, TeacherLimits(), options)
    if name.startswith(PUZZLE):
        raise UserError(f"data.train {name!r} is not a supervised corpus: use puzzle:corpus, or a JSONL file")
    return SupervisedFile(load_sft(name, renderer, end_token_id=end_token_id, max_tokens=max_tokens), shuffle)
