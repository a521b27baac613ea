"""The sets of problems that a recipe evaluates on: `data.test` and those of `evaluation.sets`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from asd_megatron.config import AnyRecipe, Recipe
from asd_megatron.config.evaluation import EvaluationSection, EvaluationSetSection
from asd_megatron.config.evaluation_checks import TEST
from asd_megatron.data.problems import ProblemSource
from asd_megatron.evaluation.outcomes import FAILURES, Outcomes, samples_of
from asd_megatron.records import Problem, Prompt, SamplingParams
from asd_megatron.reward.base import Verifier
from asd_megatron.reward.factory import make_verifier
from asd_megatron.rollout.collector import StudentPrompts
from asd_megatron.rollout.draw import Evaluation
from asd_megatron.run.model_session import ModelSession
from asd_megatron.run.sampling import evaluation_params
from asd_megatron.run.sources import held_out_problems, set_problems


@dataclass(frozen=True)
class EvaluationSet:
    """A set with its settings. `data`: its name or file. `reward`: what `make_verifier` takes; None: the run's own
    verifier scores it."""

    name: str
    data: str
    source: ProblemSource
    limit: int | None
    params: SamplingParams
    reward: dict[str, Any] | None

    @cached_property
    def problems(self) -> list[Problem]:
        return self.source.take(self.limit)

    def prompts(self, renderer: StudentPrompts) -> list[Prompt]:
        return [renderer.student(problem) for problem in self.problems]


def test_set(session: ModelSession) -> EvaluationSet | None:
    """The set `data.test`; None if there is none."""
    recipe = session.recipe
    source = held_out_problems(recipe.data)
    if source is None:
        return None
    params = evaluation_params(session)
    return EvaluationSet(TEST, str(recipe.data.test), source, recipe.evaluation.problems, params, None)


def named_sets(session: ModelSession) -> list[EvaluationSet]:
    """Those of `evaluation.sets`. Raises UserError for files that cannot be read."""
    return [_named(session, name, given) for name, given in session.recipe.evaluation.sets.items()]


def _named(session: ModelSession, name: str, given: EvaluationSetSection) -> EvaluationSet:
    recipe = session.recipe
    source = set_problems(recipe.data, given)
    settings = effective(recipe.evaluation, given)
    params = evaluation_params(session, settings, given.max_new_tokens)
    return EvaluationSet(name, given.data, source, settings.problems, params, _reward(recipe, given.reward))


def effective(section: EvaluationSection, given: EvaluationSetSection) -> EvaluationSection:
    """The section with the values that the set has of its own."""
    keys = ("samples", "temperature", "top_p", "top_k", "problems")
    return section.model_copy(update={key: value for key in keys if (value := getattr(given, key)) is not None})


def _reward(recipe: AnyRecipe, name: str | None) -> dict[str, Any] | None:
    """The settings of a set's own verifier: the section `reward` with another name, and no sum of several."""
    if name is None:
        return None
    settings = {} if recipe.reward is None else recipe.reward.model_dump()
    return {key: value for key, value in settings.items() if key != "parts"} | {"name": name}


class Verifiers:
    """The verifiers of sets, on global rank 0; one for all sets with the same settings, closed with `closing` (None:
    with the session)."""

    def __init__(self, session: ModelSession, closing: ExitStack | None = None) -> None:
        self._session, self._closing = session, closing or session.closing
        self._made: dict[str, Verifier] = {}

    def of(self, reward: dict[str, Any] | None) -> Verifier | None:
        """None: the collector's own, and on other ranks. Raises RewardError. Collective."""
        return None if reward is None else self._session.only_root(lambda: self._make(reward))

    def _make(self, reward: dict[str, Any]) -> Verifier:
        key = repr(sorted(reward.items()))
        if key not in self._made:
            self._made[key] = make_verifier(**reward)
            self._closing.callback(self._made[key].close)
        return self._made[key]


def failures(verifier: Verifier | None) -> dict[str, int]:
    """How many answers the verifier has scored 0 unjudged so far, by kind."""
    return {} if verifier is None else {kind: verifier.counters.get(kind, 0) for kind in FAILURES}


def since(before: dict[str, int], verifier: Verifier | None) -> dict[str, int]:
    """What has been added to `failures` since `before`."""
    return {kind: count - before.get(kind, 0) for kind, count in failures(verifier).items()}


def success_threshold(recipe: AnyRecipe) -> float:
    """The reward from which a response counts as passed; a supervised recipe has no key for it."""
    return recipe.privileged.success_threshold if isinstance(recipe, Recipe) else 1.0


def set_metrics(found: Evaluation, failed: dict[str, int], threshold: float) -> dict[str, float]:
    """The metrics of a training step that follow `evaluation/<set>/`."""
    return Outcomes.of([samples_of(group) for group in found.groups], failed).metrics(threshold)
