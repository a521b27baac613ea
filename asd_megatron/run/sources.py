"""Model folders, problem sets and supervised examples by the names that a recipe gives them: built-in sets or files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from asd_megatron.config import AnyRecipe
from asd_megatron.config.checks import CORPUS
from asd_megatron.config.data import DataSection, TrainSet
from asd_megatron.config.evaluation import EvaluationSetSection
from asd_megatron.data.mixture import Mixture
from asd_megatron.data.problems import Filters, ProblemSet, ProblemSource, load_problems
from asd_megatron.data.prompts import PromptRenderer, TeacherLimits
from asd_megatron.data.sft import LossOn, SftExample, load_sft
from asd_megatron.errors import UserError
from asd_megatron.gym.stream import Task, TrainingStream
from asd_megatron.gym.tasks import task_of
from asd_megatron.records import Example, Problem, Rollout, TokenTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PUZZLE = "puzzle:"
WARM_START = "puzzle:warm_start"


class SourceMetrics(Protocol):
    """Metrics that a problem set's own module computes from its responses, by metric name."""

    def of_step(self, examples: Sequence[Example], table: TokenTable) -> dict[str, float]: ...

    def of_evaluation(self, rollouts: Sequence[Rollout], rewards: Sequence[float]) -> dict[str, float]: ...


@runtime_checkable
class MeasuredSource(Protocol):
    """A problem set that brings metrics of its own."""

    def metrics(self, tokenizer: PreTrainedTokenizerBase) -> SourceMetrics: ...


def own_metrics(problems: ProblemSource, tokenizer: PreTrainedTokenizerBase) -> SourceMetrics | None:
    """The problem set's own metrics; None for a set that brings none."""
    return problems.metrics(tokenizer) if isinstance(problems, MeasuredSource) else None


@runtime_checkable
class FileSource(Protocol):
    """A problem set that was read from files."""

    def describe(self) -> str: ...

    def keep(self, fits: Callable[[Problem], bool], reason: str) -> ProblemSource: ...


def described(name: str, problems: ProblemSource) -> str:
    """The problem set `name` for a report: of files with schema, size and what was left out."""
    return problems.describe() if isinstance(problems, FileSource) else name


class SupervisedSource(Protocol):
    """Supervised examples by step, also a pure function of (step, n, seed)."""

    def batch(self, step: int, n: int, seed: int) -> list[SftExample]: ...


def model_folder(path: str) -> Path:
    """The folder of `model.path`; `puzzle:warm_start` is the puzzle model that comes with the package."""
    if path == WARM_START:
        return Path(__file__).parents[1] / "puzzle" / "warm_start"
    return Path(path)


def training_problems(data: DataSection) -> ProblemSource:
    """The problem set of `data.train`: `puzzle:train`, a task `reasoning_gym:NAME`, a file, or several."""
    if not isinstance(data.train, str):
        weights = [given.weight for given in data.train]
        return Mixture.of([_file(given, data) for given in data.train], weights)
    task = _task(data, data.train)
    if task is not None:
        return TrainingStream(task)
    return _puzzle(data.train) or _file(data.train_sets[0], data)


def _file(given: TrainSet, data: DataSection) -> ProblemSet:
    f = data.filter
    filters = Filters(
        duplicates=f.duplicates,
        max_prompt_chars=f.max_prompt_chars,
        max_answer_chars=f.max_answer_chars,
        pass_rate=f.pass_rate_field,
        min_pass_rate=f.min_pass_rate,
        max_pass_rate=f.max_pass_rate,
    )
    return load_problems(given.path, schema=given.schema, fields=given.fields, filters=filters, shuffle=data.shuffle)


def held_out_problems(data: DataSection) -> ProblemSource | None:
    """The problem set of `data.test`, by the same names; None if there is none."""
    if data.test is None:
        return None
    task = _task(data, data.test)
    if task is not None:
        return ProblemSet(data.test, task.held_out, shuffle=False)
    return _puzzle(data.test) or load_problems(data.test, schema=data.test_schema, fields=data.test_fields)


def held_out(recipe: AnyRecipe) -> list[tuple[str, ProblemSource]]:
    """(name, problems) of `data.test` and of each of `evaluation.sets`."""
    test = held_out_problems(recipe.data)
    named = [(f"evaluation.sets.{name}", set_problems(recipe.data, s)) for name, s in recipe.evaluation.sets.items()]
    return [*([] if test is None else [(str(recipe.data.test), test)]), *named]


def set_problems(data: DataSection, given: EvaluationSetSection) -> ProblemSource:
    """The problems of one of `evaluation.sets`, read as `data.test` would be."""
    as_test = {"test": given.data, "test_schema": given.schema, "test_fields": given.fields}
    source = held_out_problems(data.model_copy(update=as_test))
    assert source is not None
    return source


def _task(data: DataSection, name: str) -> Task | None:
    task = task_of(name)
    return None if task is None else Task(task, data.reasoning_gym, data.test_problems)


def _puzzle(name: str) -> ProblemSource | None:
    """The built-in puzzles `name`; None for another name."""
    if not name.startswith(PUZZLE):
        return None
    from asd_megatron.puzzle.metrics import puzzle_source

    return puzzle_source(name.removeprefix(PUZZLE))


@dataclass(frozen=True)
class SupervisedFile:
    """The examples of a file, in a new order each epoch."""

    examples: Sequence[SftExample]
    shuffle: bool

    def batch(self, step: int, n: int, seed: int) -> list[SftExample]:
        """The `n` examples of step `step` (from 1). Seeds beyond 64 bits count modulo 2^64; recipes have none."""
        total, first = len(self.examples), (step - 1) * n
        orders = {epoch: self._order(seed, epoch) for epoch in range(first // total, (first + n - 1) // total + 1)}
        return [self.examples[orders[place // total][place % total]] for place in range(first, first + n)]

    def _order(self, seed: int, epoch: int) -> Sequence[int]:
        """The indices of the examples in the order of an epoch (from 0)."""
        import numpy as np

        total = len(self.examples)
        if not self.shuffle:
            return range(total)
        key = np.array([seed % 2**64, epoch], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key)).permutation(total).tolist()


def supervised_source(
    name: str,
    renderer: PromptRenderer,
    tokenizer: PreTrainedTokenizerBase,
    *,
    steps: int,
    end_ids: Sequence[int],
    max_tokens: int,
    shuffle: bool = True,
    loss_on: LossOn = "all",
) -> SupervisedSource:
    """The supervised examples `name`: `puzzle:corpus` (the puzzle's warm start, its two stages divided over `steps` as
    2 : 1) or a file of given responses, which end with one of `end_ids`. loss_on: which of the assistant's turns are
    learned.

    Raises UserError for a model without an end token, a name that is no corpus, and what `load_sft` refuses.
    """
    if not end_ids:
        raise UserError(
            "the model has no end token: set eos_token_id in its generation_config.json or config.json, or eos_token in"
            " its tokenizer_config.json"
        )
    if name == CORPUS:
        from asd_megatron.puzzle.corpus import Corpus, CorpusOptions

        drill = steps * 2 // 3
        options = CorpusOptions(drill_steps=drill, habit_steps=steps - drill)
        return Corpus(renderer, tokenizer, TeacherLimits(), options)
    if name.startswith(PUZZLE):
        raise UserError(f"data.train {name!r} is not a supervised corpus: use {CORPUS}, or a file of given responses")
    examples = load_sft(name, renderer, end_token_ids=end_ids, max_tokens=max_tokens, loss_on=loss_on)
    return SupervisedFile(examples, shuffle)
