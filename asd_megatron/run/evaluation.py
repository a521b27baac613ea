"""Held-out evaluation of both stages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext

from torch import Tensor

from asd_megatron.errors import plural
from asd_megatron.models.export import Step
from asd_megatron.models.port import ModelPort
from asd_megatron.observe.closing import Sample
from asd_megatron.observe.names import graded
from asd_megatron.records import Prompt
from asd_megatron.reward.base import Verifier
from asd_megatron.rollout.collector import Collector
from asd_megatron.rollout.draw import Evaluation
from asd_megatron.run.evaluation_sets import (
    EvaluationSet,
    Verifiers,
    failures,
    set_metrics,
    since,
    success_threshold,
)
from asd_megatron.run.session import Session
from asd_megatron.run.sources import own_metrics


class Weights:
    """The live weights as a `WeightSource`; the code that updates them sets `version`."""

    def __init__(self, port: ModelPort, version: int = 0) -> None:
        self.port, self.version = port, version

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.port.export())

    def steps(self, bucket_bytes: int) -> Iterator[Step]:
        return self.port.export_steps(bucket_bytes=bucket_bytes)


def _sample(found: Evaluation) -> Sample | None:
    """The first problem and its first response."""
    if not found.groups:
        return None
    group = found.groups[0]
    return Sample(group.problem.question, group.rollouts[0].text, group.rewards[0])


def evaluation_line(step: int, metrics: Mapping[str, float]) -> str:
    """The console's line. A mean reward is called accuracy only where it is the fraction of right answers."""
    mean, passed = metrics["evaluation/accuracy"], metrics["evaluation/pass_rate"]
    what = f"accuracy after {plural(step, 'step')}: {mean:.3f}"
    if graded([metrics]):
        what = f"mean reward after {plural(step, 'step')}: {mean:.3f}, pass rate {passed:.3f}"
    return f"held-out {what}, response length {metrics['evaluation/length_mean']:.1f}"


def set_line(name: str, step: int, metrics: Mapping[str, float]) -> str:
    """The console's line about a set of `evaluation.sets`, from its metrics without their prefix."""
    average = next(metric for metric in metrics if metric.startswith("avg@"))
    k = average.removeprefix("avg@")
    error = metrics[f"{average}_se"]
    text = f"{average} {metrics[average]:.3f}" + (f" ± {error:.3f}" if math.isfinite(error) else "")
    if k != "1":
        text += f", pass@{k} {metrics[f'pass@{k}']:.3f}"
    return f"held-out {name} after {plural(step, 'step')}: {text}, response length {metrics['length_mean']:.1f}"


class HeldOut:
    """The evaluation on `data.test` (`test`) and on `evaluation.sets`. Keeps two results: the one before the first step
    (`first`) and the `last`."""

    def __init__(
        self, session: Session, collector: Collector, test: EvaluationSet | None, sets: Sequence[EvaluationSet]
    ) -> None:
        self.session, self.collector, self.test = session, collector, test
        self.own_metrics = None if test is None else own_metrics(test.source, session.tokenizer)
        verifiers = Verifiers(session)
        self.sets = [(found, verifiers.of(found.reward)) for found in sets]
        self.threshold = success_threshold(session.recipe)
        self._prompts: dict[str, list[Prompt]] = {}
        self.first: dict[str, float] | None = None
        self.last: dict[str, float] | None = None
        self.sample: Sample | None = None  # of the last evaluation, on global rank 0

    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics `evaluation/*` of the weights after `step` steps on global rank 0, {} elsewhere. Collective."""
        metrics: dict[str, float] = {}
        with self.session.clock.phase("evaluate"), self.session.generating():
            if self.test is not None:
                metrics |= self._test(self.test, step)
            for place, (found, verifier) in enumerate(self.sets):
                metrics |= self._set(found, verifier, step, sample=self.test is None and place == 0)
            self.collector.take_timings()
        if not self.session.is_root:
            return {}
        self.first = metrics if step == 0 else self.first
        self.last = metrics
        return metrics

    def _test(self, test: EvaluationSet, step: int) -> dict[str, float]:
        found = self.collector.evaluate(test.source, test.params, step=step, problems=test.limit)
        if found is None:
            return {}
        metrics = {
            "evaluation/accuracy": found.accuracy,
            "evaluation/pass_rate": found.pass_rate(self.threshold),
            "evaluation/length_mean": found.length_mean,
            "evaluation/truncated": found.truncated,
        }
        if self.own_metrics is not None:
            rollouts = [r for g in found.groups for r in g.rollouts]
            metrics |= self.own_metrics.of_evaluation(rollouts, [x for g in found.groups for x in g.rewards])
        self.sample = _sample(found)
        self.session.progress.note(evaluation_line(step, metrics))
        return metrics

    def _set(self, given: EvaluationSet, verifier: Verifier | None, step: int, *, sample: bool) -> dict[str, float]:
        if given.name not in self._prompts:
            self._prompts[given.name] = self.collector.render(given.problems)
        scoring = verifier or self.collector.verifier
        before = failures(scoring)
        found = self.collector.answer(self._prompts[given.name], given.params, step=step, verifier=verifier)
        if found is None:
            return {}
        if sample:
            self.sample = _sample(found)
        metrics = set_metrics(found, since(before, scoring), self.threshold)
        self.session.progress.note(set_line(given.name, step, metrics))
        return {f"evaluation/{given.name}/{name}": value for name, value in metrics.items()}

    def state(self) -> list[dict[str, float] | None]:
        """For a checkpoint; only global rank 0 has numbers."""
        return [self.first, self.last]

    def restore(self, state: Sequence[dict[str, float] | None]) -> None:
        self.first, self.last = state

    def evaluate_before_start(self) -> None:
        """The metrics of step 0, when the recipe asks for them and the run starts from `model.path`. Collective."""
        if self.session.recipe.evaluation.at_start and self.session.resumed is None:
            found = self.evaluate(0)
            self.session.clock.take()
            self.session.on_root(lambda: self.session.write_metrics(0, found))

    def evaluate_if_due(self, step: int) -> dict[str, float]:
        """`evaluate` when the recipe asks for it after `step`, else {}. Collective."""
        settings = self.session.recipe.evaluation
        if not self.session.is_due(step, settings.every, at_end=settings.at_end):
            return {}
        with self.session.stopping.finishing() if step == self.session.recipe.run.steps else nullcontext():
            return self.evaluate(step)
