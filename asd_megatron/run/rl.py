"""The RL training run, with one method for each line of the loop in `train.train`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from asd_megatron.config import Recipe, recipe_hash
from asd_megatron.data.problems import ProblemSource
from asd_megatron.data.tokenizer import undecodable
from asd_megatron.errors import NotFinite
from asd_megatron.observe.dumps import dump_path, write_dump
from asd_megatron.observe.metrics import GateReading, Increments, PerplexityReading, step_metrics
from asd_megatron.observe.warnings import MethodWarnings
from asd_megatron.observe.writer import read_metrics
from asd_megatron.records import Example, Group, TokenTable
from asd_megatron.reward.factory import make_verifier
from asd_megatron.rollout.collector import Collector
from asd_megatron.rollout.engine import RolloutError
from asd_megatron.run.build import (
    embedded_engine,
    example_builder,
    make_collector,
    make_plan,
    make_renderer,
    make_strength,
    never_acts,
    problem_sets,
    rollout_engine,
)
from asd_megatron.run.evaluation import HeldOut, Weights
from asd_megatron.run.folder import writing
from asd_megatron.run.mismatch import MismatchWarning, uncorrected
from asd_megatron.run.report import announce_training
from asd_megatron.run.scoring import Batch, ScoringPasses
from asd_megatron.run.session import Session
from asd_megatron.run.sources import own_metrics
from asd_megatron.trainer import token_method
from asd_megatron.trainer.align import gather_table
from asd_megatron.trainer.columns import Scores, table_columns
from asd_megatron.trainer.expert_routing import StudentRouting, returned_fraction
from asd_megatron.trainer.guard import Guard, check_rollouts
from asd_megatron.trainer.local_batch import ComputedTokens, LocalBatch
from asd_megatron.trainer.teacher_states import TeacherStates
from asd_megatron.trainer.updater import UpdateStats, update


class TrainingRun:
    """A training run from its recipe; every rank has one. Methods are collective unless they only read."""

    def __init__(self, recipe: Recipe, session: Session) -> None:
        self.recipe, self.session = recipe, session
        self.process_groups, self.port, self.clock = session.process_groups, session.port, session.clock
        self.plan = make_plan(recipe)
        self.strength = make_strength(recipe, self.process_groups, self.port.score_formats)
        self.condition = self.strength.method.condition
        self.scoring = ScoringPasses(session, self.plan, recipe.sampling.temperature)
        self.guard, self.increments = Guard(), Increments()
        self.warnings = MethodWarnings(group_advantage=recipe.algorithm.weighs_group_advantage)
        self.mismatch = MismatchWarning(recipe)
        self.weights = Weights(self.port, session.first_step - 1)
        self.renderer = make_renderer(recipe, session.tokenizer, session.end_ids)
        train_set, test_set = problem_sets(recipe, self.renderer)
        self.own_metrics = own_metrics(train_set, session.tokenizer)
        self.verifier = session.only_root(lambda: make_verifier(**recipe.reward.model_dump()))
        if self.verifier is not None:
            session.closing.callback(self.verifier.close)
        self.engine, self._start_engine = rollout_engine(recipe, session, self.renderer, train_set)
        session.closing.callback(self.engine.close)
        self.collector = make_collector(session, self.engine, self.weights, train_set, self.renderer, self.verifier)
        self.held_out = None
        if recipe.evaluates and test_set is not None:
            self.held_out = HeldOut(session, self._evaluator(test_set), test_set)
        self.builder = example_builder(
            recipe,
            self.renderer,
            privileged=self.plan.teacher_scoring,
            feedback_kind=self.verifier.feedback_kind if self.verifier else "binary",
            max_positions=self.port.max_positions,
        )
        self._probed: dict[str, float] = {}  # of the present step
        self._changed_levels = [] if session.resumed is None else self._restore(session.resumed)

    # ---------------------------------------------------------------- the loop's lines

    def start(self) -> None:
        """Prepare the run folder, print the start-up report, start the engine, evaluate before the first step."""
        self.session.begin()
        self.session.on_root(self._watch_earlier_steps)
        self.session.on_root(lambda: announce_training(self.recipe, self.session, self.strength, self.plan))
        for line in self._changed_levels:
            self.session.say(line)
        done = self.session.first_step - 1
        for reason in (never_acts(self.recipe, done=done, warm_up=self.strength.warm_up), uncorrected(self.recipe)):
            if reason is not None:
                self.session.say(f"warning: {reason}")
        with self.session.generating():  # colocated servers size their memory by what is free
            self._start_engine()
            self.collector.release()  # before the trainer takes its own again
        if self.held_out is not None:
            self.held_out.evaluate_before_start()
        self.clock.take()

    def steps(self) -> Iterator[int]:
        return self.session.telemetry.steps(self.session.steps())

    def collect(self, step: int) -> list[Group]:
        """The step's rewarded groups on global rank 0, [] elsewhere. An engine that is unavailable raises RolloutError,
        after the state has been saved."""
        try:
            with self.clock.span("rollout"), self.session.generating():
                groups = self.collector.next(step)
        except RolloutError as error:
            raise self._stopped(step - 1, error) from error
        self.clock.times |= asdict(self.collector.take_timings())
        return groups

    def build_batch(self, groups: Sequence[Group], step: int) -> Batch:
        """Advantages and privileged prompts of complete groups on rank 0; every rank then takes its part of them."""
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
        states = None
        method = self.strength.method
        if method.exact is not None:
            on_host = algorithm.teacher_states == "host"
            states = TeacherStates(self.port, self.process_groups, local.table.tokens, on_host=on_host)
        routing = None
        if self.session.balance is not None:
            routing = StudentRouting(self.port, self.process_groups, local, self.recipe.rollout.routing_replay)
        return Batch(step, local, token_method.token_inputs(local, method), states, routing)

    def score_teacher(self, batch: Batch) -> Scores | None:
        return self.scoring.teacher(batch)

    def score_student(self, batch: Batch) -> Scores | None:
        return self.scoring.student(batch)

    def score_reference(self, batch: Batch) -> Scores | None:
        return self.scoring.reference(batch)

    def gate_step(self, batch: Batch, teacher: Scores | None, student: Scores | None) -> float | Tensor:
        """This step's lambda, from the gate updated with this step's median entropy; with
        `algorithm.lambda_source: teacher_perplexity` each token's [N]. When it is due, FP8 is probed first."""
        self._probed = {}
        due = self.session.is_due(batch.step, self.recipe.precision.fp8_probe_every)
        if due or self.strength.needs_probe:
            found = self.scoring.probe(batch, self.strength.method)
            self._probed = found.metrics
            if self.strength.needs_probe:
                for line in self.strength.rescale(found):
                    self.session.say(line)
        return self.strength.step(batch.local, batch.inputs, teacher, student)

    def update(
        self,
        batch: Batch,
        teacher: Scores | None,
        student: Scores | None,
        lam: float | Tensor,
        reference: Scores | None = None,
    ) -> UpdateStats:
        old = self.scoring.old(batch)
        with self.clock.phase("update"):
            stats = update(
                self.port,
                self.process_groups,
                self.session.optimizer,
                batch.local,
                batch.inputs,
                teacher=teacher,
                student=student,
                method=self.strength.method,
                plan=self.plan,
                lam=lam,
                temperature=self.recipe.sampling.temperature,
                epochs=self.recipe.algorithm.epochs,
                states=batch.states,
                reference=reference,
                old=old,
                copies=self.session.copies,
                routing=batch.routing,
                balance=self.session.balance,
            )
            if batch.states is not None:
                batch.states.drop()
            if student is None:
                self.scoring.check("update", batch, stats.columns.student, "student")
            self.strength.learn(batch.inputs, stats.columns)
        self.weights.version = batch.step
        for loss, grad_norm in zip(stats.losses, stats.grad_norms, strict=True):
            self.guard.check_update(loss, grad_norm, batch.step)
        return stats

    def observe(
        self,
        step: int,
        batch: Batch,
        teacher: Scores | None,
        stats: UpdateStats,
        reference: Scores | None = None,
    ) -> None:
        """Metrics, dump and progress of the step; the evaluation when it is due."""
        columns = table_columns(batch.inputs, teacher, stats.columns, reference)
        if not self.plan.teacher_scoring and self.condition.u_source == "teacher":
            columns = {k: v for k, v in columns.items() if k not in ("pmi", "term")}
        table = gather_table(batch.local.table, columns, batch.local.indices, self.process_groups)
        if self.recipe.run.dump_rollouts:
            self.session.on_root(lambda: self._dump(step, batch, table))
        computed = batch.local.computed.over(self.process_groups.dp, self.port.device)
        evaluation, failure = self._evaluation(step)
        times = self.clock.take()
        heads = int(self.plan.head != "fused")  # the other two compute the logits once more
        measured = self.session.telemetry.of_step(times, batch.local.packs, recomputed_heads=heads)
        others = evaluation | measured
        self.session.on_root(lambda: self._report(step, batch, table, stats, computed, times, others))
        if isinstance(failure, RolloutError):
            raise self._stopped(step, failure) from failure
        if failure is not None:
            raise failure

    def _evaluation(self, step: int) -> tuple[dict[str, float], RolloutError | NotFinite | None]:
        """Held-out metrics when they are due. An evaluation that failed returns its error, so that the step, which is
        complete, is reported before the run ends."""
        try:
            return {} if self.held_out is None else self.held_out.evaluate_if_due(step), None
        except (RolloutError, NotFinite) as error:
            return {}, error

    def _stopped(self, step: int, error: RolloutError) -> RolloutError:
        """The error of a run that ends after `step` because its engine is unavailable; saves the state. Collective."""
        if step < self.session.first_step:  # nothing has been learned since the start
            return error
        return RolloutError(f"{error}. {self.session.save_before_stop(step, self._state(step), self.guard)}")

    def _report(
        self,
        step: int,
        batch: Batch,
        table: TokenTable | None,
        stats: UpdateStats,
        computed: ComputedTokens,
        times: dict[str, float],
        others: Mapping[str, float],
    ) -> None:
        """The step's line in metrics.jsonl and TensorBoard. Global rank 0 alone, which has the table. `others`: metrics
        of the evaluation and the hardware."""
        assert table is not None
        metrics = step_metrics(
            batch.local.all_examples,
            table,
            learning_rate=self.session.optimizer.last_learning_rate,
            grad_norm=stats.grad_norm,
            policy_loss=stats.loss,
            times=times,
            computed=(computed.total, computed.real, computed.sequences),
            reading=self.strength.reading if self.condition.sign else None,
            outlier_limit=self.strength.outlier_limit,
            skipped_updates=stats.applied.count(False),
            success_threshold=self.recipe.privileged.success_threshold,
            step=step,
        )
        if self.own_metrics is not None:
            metrics |= self.own_metrics.of_step(batch.local.all_examples, table)
        if self.guard.consecutive and self.session.checkpoint_due(step):
            metrics["checkpoint/skipped"] = 1.0
        metrics |= self.session.write_load(step, stats.load)
        if self.recipe.rollout.routing_replay == "engine":
            metrics["experts/replayed"] = returned_fraction(batch.local.all_examples)
        metrics |= {**self._probed, **others, **self._counters(), **self.engine.metrics()}
        found, texts = self.warnings.of_step(step, metrics)
        metrics |= found
        self.session.name_attention(step)
        self.session.write_metrics(step, metrics)
        self.session.progress.update(step, metrics)
        for text in (*texts, self.mismatch.of_step(metrics)):
            if text is not None:
                self.session.say(f"warning: {text}")

    def _watch_earlier_steps(self) -> None:
        """Warnings count from the run's first step, also after it was resumed."""
        for row in read_metrics(self.session.folder):
            numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
            self.warnings.of_step(row["step"], numbers)
            self.mismatch.of_step(numbers)

    def checkpoint_if_due(self, step: int) -> None:
        self.session.checkpoint_if_due(step, self._state(step), self.guard)

    def finish(self) -> None:
        """RUN/summary.json and RUN/curves.png."""
        self.session.finish(self.summary(), sample=self.held_out.sample if self.held_out else None)

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
            **self.strength.summary(),
            "warnings": self.warnings.summary(),
            "recipe_hash": recipe_hash(self.recipe),
        }

    # ---------------------------------------------------------------- parts

    def _evaluator(self, problems: ProblemSource) -> Collector:
        """The run's own collector, except that a replay has no held-out responses: the training model makes them."""
        if self.recipe.rollout.engine != "replay":
            return self.collector
        engine = embedded_engine(self.session, self.recipe.rollout.max_batch_size)
        return make_collector(self.session, engine, self.weights, problems, self.renderer, self.verifier)

    def _dump(self, step: int, batch: Batch, table: TokenTable | None) -> None:
        assert table is not None
        path, reading = dump_path(self.session.folder, step), self.strength.reading
        H, h_warm = (reading.entropy, reading.h_warm) if isinstance(reading, GateReading) else (None, None)
        lambdas = reading.lambdas.tolist() if isinstance(reading, PerplexityReading) else None
        with writing(path):
            write_dump(
                path,
                batch.local.all_examples,
                table,
                step=step,
                lam=reading.lam,
                H=H,
                h_warm=h_warm,
                lambdas=lambdas,
                temperature=self.recipe.sampling.temperature,
                recipe_hash=recipe_hash(self.recipe),
            )

    def _examples(self, groups: Sequence[Group], step: int) -> list[Example]:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        check_rollouts(rollouts, step)
        responses = [rollout.response_ids for rollout in rollouts]
        self.renderer.counters["undecodable_tokens"] += undecodable(self.session.tokenizer, responses)
        return self.builder.build(groups, step)

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
            **self.strength.state_dict(),
            "guard": self.guard.state_dict(),
            "seed": self.recipe.run.seed,
            "evaluations": None if self.held_out is None else self.held_out.state(),
        }

    def _restore(self, state: dict[str, Any]) -> list[str]:
        """Continue with the state of a checkpoint; returns lines for the console."""
        changed = self.strength.load_state_dict(state, of=state["condition"])
        self.guard.load_state_dict(state["guard"])
        if self.held_out is not None and state["evaluations"] is not None:
            self.held_out.restore(state["evaluations"])
        return changed
