"""The supervised stage: `torchrun --nproc-per-node N -m asd_megatron.sft RECIPE [FILES] [--section.key value ...]`.

Weighted cross-entropy on given responses, through the same model, head, packs, schedules and checkpoints as the RL
stage.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from asd_megatron.cli.guard import as_rank, leave, report_at_once
from asd_megatron.config import SftRecipe, load_recipe
from asd_megatron.data.problems import ProblemSet
from asd_megatron.errors import UserError
from asd_megatron.observe.metrics import supervised_metrics
from asd_megatron.observe.warnings import MethodWarnings
from asd_megatron.observe.writer import read_metrics
from asd_megatron.reward.factory import make_verifier
from asd_megatron.run.build import embedded_engine, make_collector, make_renderer
from asd_megatron.run.evaluation import HeldOut, Weights
from asd_megatron.run.evaluation_sets import named_sets, test_set
from asd_megatron.run.report import announce, evaluation_text
from asd_megatron.run.session import Session, run_session
from asd_megatron.run.sources import supervised_source
from asd_megatron.run.stopping import StopRequested
from asd_megatron.trainer.guard import Guard
from asd_megatron.trainer.sft import supervised_update


class SupervisedRun:
    """A supervised run from its recipe; every rank has one."""

    def __init__(self, recipe: SftRecipe, session: Session) -> None:
        self.recipe, self.session = recipe, session
        self.renderer = make_renderer(recipe, session.tokenizer, session.end_ids)
        self.examples = supervised_source(
            recipe.data.train_name,
            self.renderer,
            session.tokenizer,
            steps=recipe.run.steps,
            end_ids=session.end_ids,
            max_tokens=session.port.max_positions,
            shuffle=recipe.data.shuffle,
            loss_on=recipe.sft.loss_on,
        )
        self.guard, self.warnings = Guard(), MethodWarnings(stop_when_dead=recipe.run.stop_when_dead)
        self.weights = Weights(session.port, session.first_step - 1)
        self.held_out = self._held_out()
        if session.resumed is not None:
            self.guard.load_state_dict(session.resumed["guard"])
            if session.resumed["evaluations"] is not None and self.held_out is not None:
                self.held_out.restore(session.resumed["evaluations"])

    def _held_out(self) -> HeldOut | None:
        """The evaluation on `data.test` and `evaluation.sets`, on the embedded engine; None without one."""
        session, reward = self.session, self.recipe.reward
        if not self.recipe.evaluates:
            return None
        verifier = None
        if reward is not None:
            verifier = session.only_root(lambda: make_verifier(**reward.model_dump()))
        if verifier is not None:
            session.closing.callback(verifier.close)
        engine = embedded_engine(session, max_batch_size=256)
        collector = make_collector(session, engine, self.weights, ProblemSet.none(), self.renderer, verifier)
        return HeldOut(session, collector, test_set(session), named_sets(session))

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step, and the evaluation when it is due; returns the metrics of the step. Collective."""
        recipe, session = self.recipe, self.session
        examples = self.examples.batch(step, recipe.sft.sequences_per_step, recipe.run.seed)
        session.integrity.before_update(step)
        with session.clock.phase("update"):
            stats = supervised_update(
                session.port,
                session.process_groups,
                session.optimizer,
                examples,
                layout=session.pack_layout,
                tokens_per_microbatch=recipe.batching.tokens_per_microbatch,
                balance=session.balance,
            )
        self.weights.version = step
        self.guard.check_update(stats.loss, stats.grad_norm, step, applied=stats.applied)
        evaluation = {} if self.held_out is None else self.held_out.evaluate_if_due(step)
        times = session.clock.take()
        measured = session.telemetry.of_step(times, stats.packs)
        metrics = supervised_metrics(
            loss=stats.loss,
            tokens=stats.tokens,
            learning_rate=session.optimizer.last_learning_rate,
            grad_norm=stats.grad_norm,
            times=times,
            skipped_updates=int(not stats.applied),
        )
        metrics |= session.integrity.spike_metrics(step, session.say)
        metrics |= session.files.write_load(step, stats.load)
        if self.guard.consecutive and session.checkpoint_due(step):
            metrics["checkpoint/skipped"] = 1.0
        return {**metrics, **measured, **evaluation}

    def state(self, step: int) -> dict[str, Any]:
        """The run state of a checkpoint, beside weights and optimizer. Data order is a function of (seed, step)."""
        evaluations = None if self.held_out is None else self.held_out.state()
        state = {"step": step, "seed": self.recipe.run.seed, "evaluations": evaluations}
        return {**state, "guard": self.guard.state_dict()}


def train(run: SupervisedRun) -> None:
    """The supervised training loop. Collective over all ranks."""
    session = run.session
    session.begin()
    session.on_root(lambda: _announce(run))
    if run.held_out is not None:
        run.held_out.evaluate_before_start()
    session.clock.take()
    for step in session.training_steps():
        metrics = run.step(step)
        session.on_root(lambda: _report(run, step, metrics))  # noqa: B023 (called at once)
        session.checkpoint_if_due(step, run.state(step), run.guard)
        cause = session.stopping.after_step(step)
        if cause is not None:
            raise session.stopped(StopRequested(cause), step, run.state(step), run.guard)
    first, last = (run.held_out.first, run.held_out.last) if run.held_out else (None, None)
    session.finish(
        {
            "name": run.recipe.run.name,
            "stage": "sft",
            "steps": run.recipe.run.steps,
            "loss": session.on_root(lambda: read_metrics(session.folder)[-1].get("sft/loss")),
            "evaluation_before": first,
            "evaluation_after": last,
        },
        sample=run.held_out.sample if run.held_out else None,
    )


def _announce(run: SupervisedRun) -> None:
    recipe = run.recipe
    announce(
        run.session,
        {
            "examples": f"{recipe.data.train_name}, {recipe.sft.sequences_per_step} a step",
            "micro-batches": f"at most {recipe.batching.tokens_per_microbatch:,} tokens",
            "steps": f"{recipe.run.steps}, learning rate {recipe.optimizer.learning_rate:g}",
            "evaluation": evaluation_text(recipe),
        },
        ("one forward and backward: cross-entropy on the given responses (3 forwards' worth)",),
    )


def _report(run: SupervisedRun, step: int, metrics: Mapping[str, float]) -> None:
    session = run.session
    found, texts = run.warnings.of_step(step, metrics)
    session.name_attention(step)
    session.write_metrics(step, {**metrics, **found})
    session.progress.update(step, metrics)
    for text in texts:
        session.say(f"warning: {text}")
    dead = run.warnings.must_stop(step, found)
    if dead is not None:
        raise dead


def main(argv: Sequence[str] | None = None) -> int:
    """Run a supervised recipe on the ranks that torchrun started (one without it); returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)

    def program() -> int:
        if not arguments or arguments[0].startswith("-"):
            raise UserError(
                "give a recipe first: python -m asd_megatron.sft RECIPE [MORE.yaml ...] [--section.key value ...]"
            )
        recipe = load_recipe(arguments[0], arguments[1:], kind="sft")

        def run(session: Session) -> None:
            with report_at_once():
                train(SupervisedRun(recipe, session))

        return run_session(recipe, run)

    return as_rank(program)


if __name__ == "__main__":
    leave(main())
