"""Held-out evaluation, for both stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from asd_megatron.config import AnyRecipe
from asd_megatron.models.port import ModelPort
from asd_megatron.records import SamplingParams
from asd_megatron.reward.base import Verifier
from asd_megatron.rollout.collector import Collector
from asd_megatron.rollout.embedded.engine import EmbeddedEngine
from asd_megatron.rollout.engine import RolloutEngine
from asd_megatron.session import Session
from asd_megatron.sources import ProblemSource, is_puzzle


class Weights:
    """The live weights as a `WeightSource`; who updates them sets `version`."""

    def __init__(self, port: ModelPort, version: int = 0) -> None:
        self.port, self.version = port, version

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.port.export())


def stop_ids(session: Session) -> tuple[int, ...]:
    given = session.recipe.sampling.stop_token_ids
    return tuple(session.end_ids if given is None else given)


def embedded_engine(session: Session, max_batch_size: int) -> EmbeddedEngine:
    return EmbeddedEngine(
        session.port, session.groups, session.tokenizer, seed=session.recipe.run.seed, max_batch_size=max_batch_size
    )


def evaluation_params(session: Session) -> SamplingParams:
    e, s = session.recipe.evaluation, session.recipe.sampling
    return SamplingParams(
        temperature=e.temperature,
        top_p=e.top_p,
        top_k=e.top_k,
        max_new_tokens=s.max_response_tokens,
        stop_token_ids=stop_ids(session),
        stop=tuple(s.stop),
        n=e.samples,
    )


def evaluation_collector(
    session: Session,
    engine: RolloutEngine,
    weights: Weights,
    problems: ProblemSource,
    renderer: Any,
    verifier: Verifier | None,
) -> Collector:
    """A collector for evaluations alone."""
    return Collector(
        engine,
        weights,
        verifier,
        problems,
        renderer,
        session.groups,
        params=evaluation_params(session),
        problems_per_step=1,
        seed=session.recipe.run.seed,
    )


class HeldOut:
    """Answers the problems of `data.test` and keeps two results: before the first step (`first`) and the `last`."""

    def __init__(self, session: Session, collector: Collector, problems: ProblemSource) -> None:
        recipe: AnyRecipe = session.recipe
        self.session, self.collector, self.problems = session, collector, problems
        self.params = evaluation_params(session)
        self.puzzle = puzzle_metrics(recipe.data.test, session.tokenizer)
        self.first: dict[str, float] | None = None
        self.last: dict[str, float] | None = None

    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics `evaluation/*` of the weights after `step` steps on global rank 0, {} elsewhere. Collective."""
        with self.session.clock.phase("evaluate"), self.session.generating():
            found = self.collector.evaluate(
                self.problems, self.params, step=step, problems=self.session.recipe.evaluation.problems
            )
            self.collector.take_timings()
        if found is None:
            return {}
        metrics = {
            "evaluation/accuracy": found.accuracy,
            "evaluation/length_mean": found.length_mean,
            "evaluation/truncated": found.truncated,
        }
        if self.puzzle is not None:
            rollouts = [r for g in found.groups for r in g.rollouts]
            metrics |= self.puzzle.of_evaluation(rollouts, [x for g in found.groups for x in g.rewards])
        self.first = metrics if step == 0 else self.first
        self.last = metrics
        self.session.progress.note(
            f"held-out accuracy after {step} steps: {found.accuracy:.3f}, response length {found.length_mean:.1f}"
        )
        return metrics

    def state(self) -> list[dict[str, float] | None]:
        """For a checkpoint; only global rank 0 has numbers."""
        return [self.first, self.last]

    def restore(self, state: Sequence[dict[str, float] | None]) -> None:
        self.first, self.last = state

    def evaluate_before_start(self) -> None:
        """The line of step 0, when the recipe asks for it and the run is a fresh one."""
        if self.session.recipe.evaluation.at_start and self.session.resumed is None:
            found = self.evaluate(0)
            self.session.clock.take()
            if self.session.writer is not None:
                self.session.writer.write(0, found)

    def evaluate_if_due(self, step: int) -> dict[str, float]:
        settings = self.session.recipe.evaluation
        return self.evaluate(step) if self.session.is_due(step, settings.every, at_end=settings.at_end) else {}


def puzzle_metrics(name: str | None, tokenizer: Any) -> Any:
    """The built-in puzzle's own metrics for its own problem sets; None for any other."""
    if not is_puzzle(name):
        return None
    from asd_megatron.puzzle.metrics import PuzzleMetrics

    return PuzzleMetrics(tokenizer)
