"""What the lines of the training loop do: a recipe's parts put together, one method a line of `train.train`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from asd_megatron.antisd import Gate, condition
from asd_megatron.config import Recipe, recipe_hash
from asd_megatron.data.prompts import TeacherLimits
from asd_megatron.data.tokenizer import undecodable
from asd_megatron.distributed.objects import first_message
from asd_megatron.observe.dumps import dump_path, write_dump
from asd_megatron.observe.metrics import GateReading, Increments, step_metrics
from asd_megatron.records import Example, Group, TokenTable
from asd_megatron.reward.base import tests_of
from asd_megatron.reward.factory import make_verifier
from asd_megatron.rollout.collector import Collector
from asd_megatron.rollout.engine import RolloutError
from asd_megatron.run.build import (
    embedded_engine,
    evaluation_collector,
    make_method,
    make_renderer,
    puzzle_metrics,
    rollout_engine,
    rollout_plan,
    training_params,
)
from asd_megatron.run.evaluation import HeldOut, Weights
from asd_megatron.run.report import announce_training
from asd_megatron.run.session import Session
from asd_megatron.run.sources import ProblemSource, held_out_problems, training_problems
from asd_megatron.trainer import passes, token_method
from asd_megatron.trainer.align import gather_table
from asd_megatron.trainer.columns import Scores, TokenInputs, score_columns, table_columns
from asd_megatron.trainer.examples import ExampleBuilder
from asd_megatron.trainer.guard import Guard, NotFinite, check_rollouts, check_scores
from asd_megatron.trainer.local_batch import ComputedTokens, LocalBatch
from asd_megatron.trainer.pass_plan import plan_passes
from asd_megatron.trainer.updater import UpdateStats, update


class Batch:
    """A step's examples as this rank holds them, with the columns that need no model."""

    def __init__(self, step: int, local: LocalBatch, inputs: TokenInputs) -> None:
        self.step, self.local, self.inputs = step, local, inputs


class TrainingRun:
    """A training run from its recipe; every rank has one. Methods are collective unless they only read."""

    def __init__(self, recipe: Recipe, session: Session) -> None:
        self.recipe, self.session = recipe, session
        self.condition = condition(recipe.algorithm.name)
        self.process_groups, self.port, self.clock = session.process_groups, session.port, session.clock
        algorithm = recipe.algorithm
        self.method = make_method(recipe)
        self.plan = plan_passes(
            self.condition,
            algorithm.updates_per_batch,
            algorithm.term_normalization,
            epochs=algorithm.epochs,
            log_pmi=algorithm.log_pmi,
            importance_level=algorithm.importance_level,
        )
        self.gate = Gate.for_condition(
            self.condition,
            lambda_max=algorithm.lambda_max,
            warmup_steps=recipe.gate.warmup_steps,
            tau_down=recipe.gate.tau_down,
            tau_up=recipe.gate.tau_up,
            h_warm=recipe.gate.h_warm,
        )
        self.reading = GateReading(False, 0.0)
        self.guard, self.increments = Guard(), Increments()
        self.weights = Weights(self.port, session.first_step - 1)
        self.renderer = make_renderer(recipe, session.tokenizer, session.end_ids)
        train_set, test_set = training_problems(recipe.data), held_out_problems(recipe.data)
        for problems in (train_set, test_set):
            if problems is not None:
                self.renderer.check(problems.take(None))
        asked = math.ceil(recipe.sampling.problems_per_step * recipe.rollout.oversampling)
        train_set.batch(1, asked, recipe.run.seed)  # refuses a set that is too small
        self.verifier = session.only_root(lambda: make_verifier(**recipe.reward.model_dump()))
        if self.verifier is not None:
            session.closing.callback(self.verifier.close)
        self.engine, self._start_engine = rollout_engine(recipe, session, self.renderer, train_set)
        session.closing.callback(self.engine.close)
        self.collector = Collector(
            self.engine,
            self.weights,
            self.verifier,
            train_set,
            self.renderer,
            self.process_groups,
            params=training_params(recipe, session),
            problems_per_step=recipe.sampling.problems_per_step,
            seed=recipe.run.seed,
            plan=rollout_plan(recipe),
            timeout=recipe.rollout.collect_timeout,
        )
        self.held_out = None
        if recipe.evaluates and test_set is not None:
            self.held_out = HeldOut(session, self._evaluator(test_set), test_set)
        p = recipe.privileged
        self.builder = ExampleBuilder(
            self.renderer,
            TeacherLimits(
                p.max_solution_tokens,
                p.min_solution_tokens,
                p.max_teacher_tokens or self.port.max_positions,
                p.strip_thinking,
            ),
            seed=recipe.run.seed,
            privileged=self.plan.teacher_scoring,
            success_threshold=p.success_threshold,
            exclude_self=p.exclude_self,
            demonstrations_per_group=recipe.demonstrations_per_group,
            when_no_solution=p.when_no_solution,
            feedback_kind=self.verifier.feedback_kind if self.verifier else "binary",
            tests_of=tests_of,
        )
        self.puzzle = puzzle_metrics(recipe.data.train, session.tokenizer)
        if session.resumed is not None:
            self._restore(session.resumed)

    # ---------------------------------------------------------------- the loop's lines

    def start(self) -> None:
        """The run folder, the start-up report, the evaluation before the first step."""
        self.session.begin()
        announce_training(self.recipe, self.session, self.condition, self.gate, self.plan)
        self._start_engine()
        if self.held_out is not None:
            self.held_out.evaluate_before_start()
        self.clock.take()

    def steps(self) -> range:
        return self.session.steps()

    def collect(self, step: int) -> list[Group]:
        """The step's rewarded groups on global rank 0, [] elsewhere."""
        try:
            with self.session.generating():
                groups = self.collector.next(step)
        except RolloutError as error:
            raise self._stopped(step - 1, error) from error
        self.clock.times |= asdict(self.collector.take_timings())
        return groups

    def build_batch(self, groups: Sequence[Group], step: int) -> Batch:
        """Advantages and privileged prompts of whole groups on rank 0, then every rank takes its share."""
        examples = self.session.on_root(lambda: self._examples(groups, step))
        algorithm = self.recipe.algorithm
        local = LocalBatch.build(
            examples,
            ranks=self.process_groups.dp.size(),
            rank=self.process_groups.dp.rank(),
            updates=algorithm.updates_per_batch,
            layout=self.session.pack_layout,
            tokens_per_microbatch=self.recipe.batching.tokens_per_microbatch,
            mask_truncated=algorithm.mask_truncated,
        )
        return Batch(step, local, token_method.token_inputs(local, self.method))

    def score_teacher(self, batch: Batch) -> Scores | None:
        with self.clock.phase("teacher"):
            temperature = self.recipe.sampling.temperature
            scores = passes.score_teacher(
                self.port, self.process_groups, batch.local, self.plan, temperature=temperature
            )
            self._check_scores("teacher scoring", batch, scores, "teacher")
        return scores

    def score_student(self, batch: Batch) -> Scores | None:
        with self.clock.phase("student"):
            temperature = self.recipe.sampling.temperature
            scores = passes.score_student(
                self.port, self.process_groups, batch.local, self.plan, temperature=temperature
            )
            self._check_scores("student scoring", batch, scores, "student")
        return scores

    def gate_step(self, batch: Batch, teacher: Scores | None, student: Scores | None) -> float:
        """This step's lambda, by the gate's state after this step's entropy."""
        entropy = passes.gate_entropy(self.process_groups, batch.inputs, self.method, teacher, student)
        lam = self.gate.update(entropy)
        thresholds = self.gate.thresholds
        self.reading = GateReading(
            open=lam > 0,
            lam=lam,
            entropy=entropy,
            h_warm=self.gate.h_warm,
            close_below=thresholds[0] if thresholds else None,
            warming_up=self.gate.warming_up,
        )
        return lam

    def update(self, batch: Batch, teacher: Scores | None, student: Scores | None, lam: float) -> UpdateStats:
        with self.clock.phase("update"):
            stats = update(
                self.port,
                self.process_groups,
                self.session.optimizer,
                batch.local,
                batch.inputs,
                teacher=teacher,
                student=student,
                method=self.method,
                plan=self.plan,
                lam=lam,
                temperature=self.recipe.sampling.temperature,
                epochs=self.recipe.algorithm.epochs,
            )
            if student is None:
                self._check_scores("update", batch, stats.columns.student, "student")
        self.weights.version = batch.step
        for loss, grad_norm in zip(stats.losses, stats.grad_norms, strict=True):
            self.guard.check_update(loss, grad_norm, batch.step)
        return stats

    def observe(self, step: int, batch: Batch, teacher: Scores | None, stats: UpdateStats) -> None:
        """Metrics, dump and progress of the step; the evaluation when it is due."""
        columns = table_columns(batch.inputs, teacher, stats.columns)
        if not self.plan.teacher_scoring and self.condition.u_source == "teacher":
            columns = {k: v for k, v in columns.items() if k not in ("pmi", "term")}
        table = gather_table(batch.local.table, columns, batch.local.indices, self.process_groups)
        if table is not None and self.recipe.run.dump_rollouts:
            self._dump(step, batch, table)
        computed = batch.local.computed.over(self.process_groups.dp, self.port.device)
        evaluation, failure = self._evaluation(step)
        times = self.clock.take()
        self._report(step, batch, table, stats, computed, times, evaluation)
        if failure is not None:
            raise self._stopped(step, failure) from failure

    def _evaluation(self, step: int) -> tuple[dict[str, float], RolloutError | None]:
        """Held-out metrics when they are due; why there are none, when the engine failed: the step itself is done."""
        try:
            return {} if self.held_out is None else self.held_out.evaluate_if_due(step), None
        except RolloutError as error:
            return {}, error

    def _stopped(self, step: int, error: RolloutError) -> RolloutError:
        """The error of a run that ends after `step` because there are no rollouts; saves the state. Collective."""
        if step < self.session.first_step:  # nothing has been learned since the start
            return error
        self.session.save(step, self._state(step))
        return RolloutError(f"{error}. The state after step {step} is saved: start the same command again to go on")

    def _report(
        self,
        step: int,
        batch: Batch,
        table: TokenTable | None,
        stats: UpdateStats,
        computed: ComputedTokens,
        times: dict[str, float],
        evaluation: dict[str, float],
    ) -> None:
        """The step's line in metrics.jsonl and TensorBoard, from global rank 0."""
        if table is None or self.session.writer is None:
            return
        metrics = step_metrics(
            batch.local.all_examples,
            table,
            learning_rate=self.session.optimizer.last_learning_rate,
            grad_norm=stats.grad_norm,
            policy_loss=stats.loss,
            times=times,
            computed=(computed.total, computed.real, computed.sequences),
            gate=self.reading if self.condition.sign else None,
            skipped_updates=stats.applied.count(False),
            success_threshold=self.recipe.privileged.success_threshold,
            step=step,
        )
        if self.puzzle is not None:
            metrics |= self.puzzle.of_step(batch.local.all_examples, table)
        metrics |= evaluation | self._counters() | self.engine.metrics()
        self.session.writer.write(step, metrics)
        self.session.progress.update(step, metrics)

    def checkpoint_if_due(self, step: int) -> None:
        self.session.checkpoint_if_due(step, self._state(step))

    def finish(self) -> None:
        """RUN/summary.json and RUN/curves.png."""
        if self.session.is_root:
            from asd_megatron.observe.plots import plot_run, write_summary

            write_summary(self.session.folder, self.summary())
            plot_run(self.session.folder)

    def summary(self) -> dict[str, Any]:
        first, last = (self.held_out.first or {}, self.held_out.last or {}) if self.held_out else ({}, {})
        return {
            "name": self.recipe.run.name,
            "condition": self.condition.name,
            "steps": self.recipe.run.steps,
            "accuracy_before": first.get("evaluation/accuracy"),
            "accuracy_after": last.get("evaluation/accuracy"),
            "evaluation_before": first,
            "evaluation_after": last,
            "gate": {"open": self.gate.is_open, "h_warm": self.gate.h_warm},
            "recipe_hash": recipe_hash(self.recipe),
        }

    # ---------------------------------------------------------------- parts

    def _evaluator(self, problems: ProblemSource) -> Collector:
        """The run's own collector, except that a replay has no held-out responses: the training model makes them."""
        if self.recipe.rollout.engine != "replay":
            return self.collector
        engine = embedded_engine(self.session, self.recipe.rollout.max_batch_size)
        timeout = self.recipe.rollout.collect_timeout
        return evaluation_collector(
            self.session, engine, self.weights, problems, self.renderer, self.verifier, timeout=timeout
        )

    def _dump(self, step: int, batch: Batch, table: TokenTable) -> None:
        write_dump(
            dump_path(self.session.folder, step),
            batch.local.all_examples,
            table,
            step=step,
            lam=self.reading.lam,
            H=self.reading.entropy,
            h_warm=self.reading.h_warm,
            temperature=self.recipe.sampling.temperature,
            recipe_hash=recipe_hash(self.recipe),
        )

    def _examples(self, groups: Sequence[Group], step: int) -> list[Example]:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        check_rollouts(rollouts, step)
        responses = [rollout.response_ids for rollout in rollouts]
        self.renderer.counters["undecodable_tokens"] += undecodable(self.session.tokenizer, responses)
        return self.builder.build(groups, step)

    def _check_scores(self, phase: str, batch: Batch, scores: Scores | None, of: str) -> None:
        """Raises NotFinite on every rank when any of them scored something that is not finite. Collective.

        `of`: whose scores they are, `student` or `teacher`."""
        if scores is None:
            return
        table = TokenTable(batch.local.table.offsets, score_columns(scores, of))
        found: str | None = None
        try:
            check_scores(phase, batch.local.examples, table, table.columns, batch.step)
        except NotFinite as e:
            found = str(e)
        message = first_message(found, self.process_groups.world)
        if message is not None:
            raise NotFinite(message)

    def _counters(self) -> dict[str, float]:
        assert self.verifier is not None  # global rank 0 has one
        return self.increments.of(
            prompts=self.renderer.counters, rollouts=asdict(self.collector.counts), rewards=self.verifier.counters
        )

    # ---------------------------------------------------------------- run state

    def _state(self, step: int) -> dict[str, Any]:
        """What a checkpoint needs beside weights and optimizer. Data order and sampling noise are functions of (seed,
        step)."""
        return {
            "step": step,
            "weight_version": step,
            "condition": self.condition.name,
            "gate": self.gate.state_dict(),
            "guard": self.guard.state_dict(),
            "seed": self.recipe.run.seed,
            "evaluations": None if self.held_out is None else self.held_out.state(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        if self.condition.gated and state["condition"] == "grpo":
            self.gate.recalibrate()  # continual AntiSD (section 4.4): H_warm over new warm-up steps
        else:
            self.gate.load_state_dict(state["gate"])
        self.guard.load_state_dict(state["guard"])
        if self.held_out is not None and state["evaluations"] is not None:
            self.held_out.restore(state["evaluations"])
