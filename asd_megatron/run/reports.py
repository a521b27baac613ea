"""The reports of a run's steps on global rank 0: metrics, rollout dump, warnings, progress.

A background thread makes them while the next step generates, one at a time and in the order of the steps: `submit`
waits for the report before it. `finish` comes before whatever needs the metrics of all earlier steps in the run folder:
a checkpoint, an export, the end of the run. An error of a report is raised at the next call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from asd_megatron.config import Recipe, recipe_hash
from asd_megatron.files import system_reason
from asd_megatron.models.routing import LoadReport
from asd_megatron.observe.dumps import dump_path, write_dump
from asd_megatron.observe.metrics import GateReading, PerplexityReading, step_metrics
from asd_megatron.observe.warnings import MethodWarnings
from asd_megatron.observe.writer import read_metrics
from asd_megatron.records import Example, TokenTable
from asd_megatron.run.mismatch import MismatchWarning
from asd_megatron.run.session import Session
from asd_megatron.run.sources import SourceMetrics
from asd_megatron.trainer.expert_routing import returned_fraction
from asd_megatron.trainer.local_batch import ComputedTokens


@dataclass(frozen=True)
class StepOutcome:
    """What a step leaves to report. `examples`, `table`: of the global batch. `reading`: how lambda was set; None: the
    condition has no per-token term. `others`: metrics that are known already."""

    step: int
    examples: Sequence[Example]
    table: TokenTable
    loss: float
    grad_norm: float
    skipped_updates: int
    load: LoadReport | None  # of a model with experts
    computed: ComputedTokens
    times: Mapping[str, float]
    learning_rate: float
    reading: GateReading | PerplexityReading
    outlier_limit: float | None
    others: Mapping[str, float]


class StepReports:
    """Reports steps in the background. Global rank 0 alone uses it, between `session.begin` and the end of the run.

    own_metrics: of the problem source. has_term: whether the condition has a per-token term.
    """

    def __init__(self, recipe: Recipe, session: Session, own_metrics: SourceMetrics | None, *, has_term: bool) -> None:
        self.recipe, self.session, self.own_metrics, self.has_term = recipe, session, own_metrics, has_term
        self.warnings = MethodWarnings(recipe.algorithm.weighs_group_advantage, recipe.run.stop_when_dead)
        self.mismatch = MismatchWarning(recipe)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="reports")
        self._latest: Future[None] | None = None
        self._dropping = False  # the step before could not be dumped

    def watch_earlier_steps(self) -> None:
        """Warnings count from the run's first step, also after it was resumed."""
        for row in read_metrics(self.session.folder):
            numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
            self.warnings.of_step(row["step"], numbers)
            self.mismatch.of_step(numbers)

    def submit(self, outcome: StepOutcome) -> None:
        """Report a step. Waits for the report before it, and raises its error."""
        self.finish()
        self._latest = self._worker.submit(self._report, outcome)

    def finish(self) -> None:
        """Wait until all steps are reported. Raises the error of the latest report, once."""
        latest, self._latest = self._latest, None
        if latest is not None:
            latest.result()

    def close(self) -> None:
        """End the thread, after the report that it is at. An error that nobody has asked for is lost: the run is ending
        for another one."""
        self._worker.shutdown()

    def _report(self, outcome: StepOutcome) -> None:
        """The step's dump, and its line in metrics.jsonl and TensorBoard."""
        dropped = self._dump(outcome) if self.recipe.run.dump_rollouts else None
        step = outcome.step
        metrics = step_metrics(
            outcome.examples,
            outcome.table,
            learning_rate=outcome.learning_rate,
            grad_norm=outcome.grad_norm,
            policy_loss=outcome.loss,
            times=outcome.times,
            computed=(outcome.computed.total, outcome.computed.real, outcome.computed.sequences),
            reading=outcome.reading if self.has_term else None,
            outlier_limit=outcome.outlier_limit,
            skipped_updates=outcome.skipped_updates,
            success_threshold=self.recipe.privileged.success_threshold,
            step=step,
        )
        if self.own_metrics is not None:
            metrics |= self.own_metrics.of_step(outcome.examples, outcome.table)
        metrics |= self.session.files.write_load(step, outcome.load)
        if self.recipe.rollout.routing_replay == "engine":
            metrics["experts/replayed"] = returned_fraction(outcome.examples)
        metrics |= outcome.others
        if dropped is not None:
            metrics["files/dumps_dropped"] = 1.0
        found, texts = self.warnings.of_step(step, metrics)
        metrics |= found
        self.session.name_attention(step)
        self.session.write_metrics(step, metrics)
        self.session.progress.update(step, metrics)
        told, self._dropping = self._dropping, dropped is not None
        for text in (*texts, self.mismatch.of_step(metrics), None if told else dropped):
            if text is not None:
                self.session.say(f"warning: {text}")
        dead = self.warnings.must_stop(step, found)
        if dead is not None:
            raise dead

    def _dump(self, outcome: StepOutcome) -> str | None:
        """Write the step's dump; returns why it is dropped, where the operating system refuses: training does not need
        it."""
        path = dump_path(self.session.folder, outcome.step)
        try:
            self.session.folder.stat()  # a run folder that somebody has removed is not made again
            dump_batch(path, self.recipe, outcome.step, outcome.examples, outcome.table, outcome.reading)
        except OSError as error:
            return f"{path} cannot be written ({system_reason(error)}): the rollouts of such steps are not dumped"
        return None


def dump_batch(
    path: Path,
    recipe: Recipe,
    step: int,
    examples: Sequence[Example],
    table: TokenTable,
    reading: GateReading | PerplexityReading,
    reason: str | None = None,
) -> None:
    """Write the dump of a step's global batch."""
    H, h_warm = (reading.entropy, reading.h_warm) if isinstance(reading, GateReading) else (None, None)
    write_dump(
        path,
        examples,
        table,
        step=step,
        lam=reading.lam,
        H=H,
        h_warm=h_warm,
        lambdas=reading.lambdas.tolist() if isinstance(reading, PerplexityReading) else None,
        temperature=recipe.sampling.temperature,
        recipe_hash=recipe_hash(recipe),
        reason=reason,
    )
