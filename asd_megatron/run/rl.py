"""The RL training run, with one method for each line of the loop in `train.train`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from asd_megatron.config import Recipe, recipe_hash
from asd_megatron.data.problems import ProblemSet
from asd_megatron.data.tokenizer import undecodable
from asd_megatron.errors import NotFinite
from asd_megatron.observe.metrics import Increments
from asd_megatron.records import Example, Group
from asd_megatron.reward.factory import make_verifier
from asd_megatron.rollout.collector import Collector
from asd_megatron.rollout.engine import RolloutError
from asd_megatron.run.bad_batches import BadBatches
from asd_megatron.run.build import (
    checked_problems,
    embedded_engine,
    example_builder,
    make_collector,
    make_renderer,
    redraw_rule,
    rollout_bank,
    rollout_engine,
)
from asd_megatron.run.evaluation import HeldOut, Weights
from asd_megatron.run.evaluation_sets import named_sets, test_set
from asd_megatron.run.method import make_plan, make_strength, never_acts
from asd_megatron.run.mismatch import uncorrected
from asd_megatron.run.report import announce_training
from asd_megatron.run.reports import StepOutcome, StepReports
from asd_megatron.run.scoring import Batch, ScoringPasses
from asd_megatron.run.session import Session
from asd_megatron.run.sources import described, own_metrics
from asd_megatron.run.stopping import StopRequested
from asd_megatron.trainer import token_method
from asd_megatron.trainer.align import gather_table
from asd_megatron.trainer.columns import Scores, table_columns
from asd_megatron.trainer.expert_routing import StudentRouting
from asd_megatron.trainer.guard import Guard, check_rollouts
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
        self.bad_batches = BadBatches(recipe, session)
        self.scoring = ScoringPasses(recipe, session, self.plan, self.bad_batches)
        self.guard, self.increments = Guard(), Increments()
        self.weights = Weights(self.port, session.first_step - 1)
        self.renderer = make_renderer(recipe, session.tokenizer, session.end_ids)
        test, sets = test_set(session), named_sets(session)
        held_out = [*([test] if test else []), *sets]
        train_set = checked_problems(recipe, self.renderer, held_out)
        self._sets = {"problems": described(recipe.data.train_name, train_set)} | {
            "held-out problems" if found is test else f"set {found.name}": described(found.data, found.source)
            for found in held_out
        }
        own = own_metrics(train_set, session.tokenizer)
        self.reports = StepReports(recipe, session, own, has_term=self.condition.sign != 0)
        self.verifier = session.only_root(lambda: make_verifier(**recipe.reward.model_dump()))
        if self.verifier is not None:
            session.closing.callback(self.verifier.close)
        self.builder = example_builder(
            recipe,
            self.renderer,
            privileged=self.plan.teacher_scoring,
            feedback_kind=self.verifier.feedback_kind if self.verifier else "binary",
            max_positions=self.port.max_positions,
        )
        session.closing.callback(self.builder.close)
        bank = rollout_bank(recipe, session)
        self.engine, self._start_engine = rollout_engine(recipe, session, self.renderer, train_set, bank)
        session.closing.callback(self.engine.close)
        self.collector = make_collector(
            session,
            self.engine,
            self.weights,
            train_set,
            self.renderer,
            self.verifier,
            self.builder.prepare,
            bank,
            redraw_rule(recipe, self.builder),
        )
        self.held_out = None
        if recipe.evaluates:
            self.held_out = HeldOut(session, self._evaluator(), test, sets)
        self._probed: dict[str, float] = {}  # of the present step
        self._part_means: dict[str, float] = {}  # likewise, on global rank 0
        self._changed_levels = [] if session.resumed is None else self._restore(session.resumed)

    # ---------------------------------------------------------------- the loop's lines

    def start(self) -> None:
        """Prepare the run folder, print the start-up report, start the engine, evaluate before the first step."""
        self.session.begin()
        self.session.closing.callback(self.reports.close)
        self.session.on_root(self.reports.watch_earlier_steps)
        self.session.on_root(lambda: announce_training(self.recipe, self.session, self.strength, self.plan, self._sets))
        for line in self._changed_levels:
            self.session.say(line)
        done = self.session.first_step - 1
        for reason in (never_acts(self.recipe, done=done, warm_up=self.strength.warm_up), uncorrected(self.recipe)):
            if reason is not None:
                self.session.say(f"warning: {reason}")
        self.start_engine()
        if self.held_out is not None:
            self.held_out.evaluate_before_start()
        self.clock.take()

    def start_engine(self) -> None:
        """Start the engine where colocated servers, which size their memory by what is free, find the trainer's free;
        they give theirs back before the trainer takes its own again."""
        with self.session.generating():
            self._start_engine()
            self.collector.release()

    def steps(self) -> Iterator[int]:
        return self.session.training_steps()

    def collect(self, step: int) -> list[Group]:
        """The step's rewarded groups on global rank 0, [] elsewhere. An engine that is unavailable raises RolloutError,
        after the state has been saved; so does a request to stop."""
        try:
            if self.verifier is not None:  # what an evaluation has scored
                self.verifier.take_part_means()
            with self.clock.span("rollout"), self.session.generating():
                groups = self.collector.next(step)
        except (RolloutError, StopRequested) as error:
            raise self._stopped(step - 1, error) from error
        self.clock.times |= asdict(self.collector.take_timings())
        means = {} if self.verifier is None else self.verifier.take_part_means()
        self._part_means = {f"reward/part/{name}": mean for name, mean in means.items()}
        return groups

    def build_batch(self, groups: Sequence[Group], step: int) -> Batch:
        """Advantages and privileged prompts of complete groups on rank 0; every rank then takes its part of them."""
        self.bad_batches.begin_step()
        examples = self.session.only_root(lambda: self._examples(groups, step)) or []
        algorithm = self.recipe.algorithm
        local = self.scoring.divide(examples, algorithm.updates_per_batch)
        states = None
        method = self.strength.method
        if method.exact is not None:
            on_host = algorithm.teacher_states == "host"
            states = TeacherStates(self.port, self.process_groups, local.table.tokens, on_host=on_host)
        routing = None
        if self.session.balance is not None:
            routing = StudentRouting(self.port, self.process_groups, local, self.recipe.rollout.routing_replay)
        return Batch(step, examples, local, token_method.token_inputs(local, method), states, routing)

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
        lam = self.strength.step(batch.local, batch.inputs, teacher, student)
        self.bad_batches.reading = self.strength.reading
        return lam

    def update(
        self,
        batch: Batch,
        teacher: Scores | None,
        student: Scores | None,
        lam: float | Tensor,
        reference: Scores | None = None,
    ) -> UpdateStats:
        self.session.integrity.before_update(batch.step)
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
            columns = table_columns(batch.inputs, teacher, stats.columns, reference)
            if student is None:
                self.scoring.check("update", batch, stats.columns.student, "student", columns)
            self.strength.learn(batch.inputs, stats.columns)
        self.weights.version = batch.step
        if not all(stats.applied):
            first = stats.applied.index(False)
            reason = f"update skipped: loss {stats.losses[first]:g}, gradient norm {stats.grad_norms[first]:g}"
            self.bad_batches.keep(batch.step, batch.examples, batch.local, columns, reason)
        for loss, grad_norm, applied in zip(stats.losses, stats.grad_norms, stats.applied, strict=True):
            self.guard.check_update(loss, grad_norm, batch.step, applied=applied)
        return stats

    def observe(
        self,
        step: int,
        batch: Batch,
        teacher: Scores | None,
        stats: UpdateStats,
        reference: Scores | None = None,
    ) -> None:
        """Metrics, dump and progress of the step, in the background; the evaluation when it is due."""
        columns = table_columns(batch.inputs, teacher, stats.columns, reference)
        if not self.plan.teacher_scoring and self.condition.u_source == "teacher":
            columns = {k: v for k, v in columns.items() if k not in ("pmi", "term")}
        table = gather_table(batch.local.table, columns, batch.local.indices, self.process_groups)
        computed = batch.local.computed.over(self.process_groups.dp, self.port.device)
        evaluation, failure = self._evaluation(step)
        spikes = self.session.integrity.spike_metrics(step, self.session.say)
        times = self.clock.take()
        heads = int(self.plan.head != "fused")  # the other two compute the logits once more
        measured = self.session.telemetry.of_step(times, batch.local.packs, recomputed_heads=heads)

        def report() -> None:
            assert table is not None  # on global rank 0
            others = {**self._probed, **spikes, **evaluation, **measured, **self._counters(), **self.engine.metrics()}
            if self.guard.consecutive and self.session.checkpoint_due(step):
                others["checkpoint/skipped"] = 1.0
            self.reports.submit(
                StepOutcome(
                    step,
                    batch.examples,
                    table,
                    loss=stats.loss,
                    grad_norm=stats.grad_norm,
                    skipped_updates=stats.applied.count(False),
                    load=stats.load,
                    computed=computed,
                    times=times,
                    learning_rate=self.session.optimizer.last_learning_rate,
                    reading=self.strength.reading,
                    outlier_limit=self.strength.outlier_limit,
                    others=others,
                )
            )

        self.session.on_root(report)
        if isinstance(failure, RolloutError | StopRequested):
            raise self._stopped(step, failure) from failure
        if failure is not None:
            raise failure

    def _evaluation(self, step: int) -> tuple[dict[str, float], RolloutError | NotFinite | StopRequested | None]:
        """Held-out metrics when they are due. An evaluation that failed, or that a request to stop has cut short,
        returns its error, so that the step, which is complete, is reported before the run ends."""
        try:
            return {} if self.held_out is None else self.held_out.evaluate_if_due(step), None
        except (RolloutError, NotFinite, StopRequested) as error:
            return {}, error

    def _stopped(self, step: int, error: RolloutError | StopRequested) -> RolloutError | StopRequested:
        """The error of a run that ends after `step` because its engine is unavailable, or the request to stop there;
        the state is saved. Collective."""
        if step < self.session.first_step:  # nothing has been learned since the start
            return error
        self.session.on_root(self.reports.finish)
        if isinstance(error, StopRequested):
            return self.session.stopped(error, step, self._state(step), self.guard)
        reason = self.session.save_before_stop(step, self._state(step), self.guard)
        kept = "is saved: start the same command again to resume" if reason is None else f"is not saved: {reason}"
        return RolloutError(f"{error}. The state after step {step} {kept}")

    def checkpoint_if_due(self, step: int) -> None:
        """The checkpoint and the export that are due after `step`, once its metrics are written."""
        if self.session.saves_after(step):
            self.session.on_root(self.reports.finish)
        self.session.checkpoint_if_due(step, self._state(step), self.guard)

    def stop_if_requested(self, step: int) -> None:
        """End the run after `step`, its state saved, when a signal, RUN/stop or the time limit asks for it: raises
        StopRequested on every rank."""
        cause = self.session.stopping.after_step(step)
        if cause is not None:
            stopped = self._stopped(step, StopRequested(cause))
            self.collector.suspend()
            raise stopped

    def finish(self) -> None:
        """RUN/summary.json and RUN/curves.png."""
        self.session.on_root(self.reports.finish)
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
            "warnings": self.reports.warnings.summary(),
            "recipe_hash": recipe_hash(self.recipe),
        }

    # ---------------------------------------------------------------- parts

    def _evaluator(self) -> Collector:
        """The run's own collector, except that a replay has no held-out responses: the training model makes them."""
        if self.recipe.rollout.engine != "replay":
            return self.collector
        engine = embedded_engine(self.session, self.recipe.rollout.max_batch_size)
        return make_collector(self.session, engine, self.weights, ProblemSet.none(), self.renderer, self.verifier)

    def _examples(self, groups: Sequence[Group], step: int) -> list[Example]:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        try:
            check_rollouts(rollouts, step)
        except NotFinite as error:
            self.bad_batches.keep_groups(step, groups, str(error))
            raise
        responses = [rollout.response_ids for rollout in rollouts]
        self.builder.counters["undecodable_tokens"] += undecodable(self.session.tokenizer, responses)
        return self.builder.build(groups, step)

    def _counters(self) -> dict[str, float]:
        assert self.verifier is not None  # global rank 0 has one
        increments = self.increments.of(
            examples=self.builder.counters, rollouts=asdict(self.collector.counts), rewards=self.verifier.counters
        )
        return increments | self._part_means

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
            "rollouts": self.collector.state(),
        }

    def _restore(self, state: dict[str, Any]) -> list[str]:
        """Continue with the state of a checkpoint; returns lines for the console."""
        changed = self.strength.load_state_dict(state, of=state["condition"])
        self.guard.load_state_dict(state["guard"])
        if self.held_out is not None and state["evaluations"] is not None:
            self.held_out.restore(state["evaluations"])
        if "rollouts" in state:  # absent in checkpoints of earlier versions
            self.collector.restore(state["rollouts"])
        return changed
