"""The session of a training program of either stage: ranks, model, optimizer, tokenizer, run folder and checkpoints.

run_session(recipe, lambda session: train(TrainingRun(recipe, session)))
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from asd_megatron.checkpoint import training
from asd_megatron.checkpoint.huggingface import write_folder
from asd_megatron.checkpoint.run_state import RunStateFile
from asd_megatron.cli.guard import report_at_once
from asd_megatron.config import AnyRecipe, Recipe, dump_recipe
from asd_megatron.distributed import activity, machine, rank_log
from asd_megatron.distributed.objects import first_message
from asd_megatron.distributed.stop_signals import StopSignals
from asd_megatron.errors import NotFinite, UserError
from asd_megatron.files import write_json
from asd_megatron.models import te
from asd_megatron.observe.closing import Sample, closing_table
from asd_megatron.observe.plots import plot_run
from asd_megatron.observe.progress import Progress, print_line
from asd_megatron.observe.transfer import TransferProgress
from asd_megatron.observe.writer import read_metrics
from asd_megatron.run import folder as folders
from asd_megatron.run.clock import Clock
from asd_megatron.run.continual import load_origin
from asd_megatron.run.copies import check_missing, weight_copies
from asd_megatron.run.folder import Start, writing
from asd_megatron.run.history import changes_of, record
from asd_megatron.run.integrity import Integrity
from asd_megatron.run.interruption import Interruption, own_command
from asd_megatron.run.model import build_optimizer, updates_per_step
from asd_megatron.run.model_session import ModelSession
from asd_megatron.run.planning import memory_notes
from asd_megatron.run.preview import beginning_lines, finished_text
from asd_megatron.run.resuming import load_start
from asd_megatron.run.saving import Saver
from asd_megatron.run.sources import model_folder
from asd_megatron.run.step_files import StepFiles
from asd_megatron.run.stopping import StopRequested, conclude
from asd_megatron.run.telemetry import Telemetry
from asd_megatron.trainer.guard import Guard, first_not_finite

T = TypeVar("T")


class RunFinished(Exception):
    """Not an error: the run folder holds the complete run of this recipe, so there is nothing to do."""


def run_session(recipe: AnyRecipe, program: Callable[[Session], None]) -> int:
    """Run `program` in the recipe's session and return the exit status, 0: also of a run that stops on request
    (`stopping`), and of one that is complete already, which is not run again. A signal that ends the process at once,
    before the first step or as the second one, says what was kept."""
    activity.restart()
    try:
        with (
            StopSignals(begun=lambda: activity.phase() != "start", told=Interruption(recipe)) as signals,
            open_session(recipe, signals) as session,
        ):
            try:
                program(session)
            except StopRequested as request:
                session.stop(request)
    except RunFinished as finished:
        if os.environ.get("RANK", "0") == "0":
            print_line(str(finished), sys.stderr)
    return 0


@contextmanager
def open_session(recipe: AnyRecipe, signals: StopSignals | None = None) -> Iterator[Session]:
    """Join the other ranks and open the recipe's session, which stops at one of `signals`. On leaving, whatever was
    opened is closed, last first, and the ranks part; another session may follow in the same process. Raises RunFinished
    when there is nothing to do."""
    with ExitStack() as closing:
        with report_at_once(RunFinished):  # a rank that is lost meanwhile is watched until `closing` ends
            session = Session(recipe, closing, signals)
        yield session


class Session(ModelSession):
    """The session of one rank, from `open_session`. Attributes are the same on every rank unless stated; `files`
    writes on global rank 0 only, after `begin`.

    Opening locks the run folder and checks it; a refusal leaves the folder as it was. `begin` prepares it for this run.
    `closing` takes what has to be closed at the end.

    `copies` are the copies of weights that the method scores with, None without any.

    `first_step` is the first step still to be made (1, or the one after the checkpoint that the run resumed from),
    `resumed` the run state of that checkpoint, None for a fresh run.
    """

    def __init__(self, recipe: AnyRecipe, closing: ExitStack, signals: StopSignals | None = None) -> None:
        super().__init__(recipe, closing, signals, save_seconds=lambda: self._saver.seconds)
        self.read_source(model_folder(recipe.model.path))
        self.start: Start = self.on_root(lambda: folders.claim(recipe, self.stage, closing))
        if self.start.kind == "finished":
            raise RunFinished(finished_text(recipe, self.start.changes))
        self._notes = self.on_root(lambda: memory_notes(recipe, self.layout, self.hf_config, machine.gpu_memory()))
        self.open_model(training=True)
        self.copies = weight_copies(recipe, self.port)  # of model.path's weights, before a checkpoint is loaded
        self.optimizer = build_optimizer(recipe, self.port)
        self.balance = self.port.load_balance(recipe.model.auxiliary_loss)
        self.open_packs()
        self.start, self.resumed = load_start(recipe, self.start, self._load, self.process_groups.host)
        if self.start.origin is not None:
            load_origin(self.start.origin, self.port, self.optimizer, self.copies, self.balance)
        self.first_step = 1 if self.resumed is None else int(self.resumed["step"]) + 1
        self.files = StepFiles(self.folder, self.say)
        self._overdue = False  # a due checkpoint could not be written: it is written after the next applied update
        newest = self.first_step - 1 if self.start.kind == "resume" else 0
        parts = (self.port, self.optimizer, self.copies, self.balance)
        self._saver = Saver(recipe, self.stage, *parts, newest=newest, say=self.say, before=self.files.write_waiting)
        closing.callback(lambda: self._saver.close(self.say))
        self.clock = Clock()  # anew: opening the session is no part of the first step's time
        self.integrity = Integrity(recipe, self.port, self.optimizer, self._saver, self.clock)
        self.telemetry = Telemetry(recipe, self.port, self.layout, self.process_groups, self.clock)

    def begin(self) -> None:
        """Prepare the run folder, open the metrics and print what differs from the run that is resumed. Collective."""
        done = self.first_step - 1
        self.on_root(lambda: self.telemetry.serve(self.closing))
        self.on_root(lambda: folders.prepare(self.recipe, self.start, self.stage, done))
        rank_log.begin(f"start ({self.start.kind}) after step {done}: {own_command()}")
        self.on_root(self._open_files)
        notes, rate = self._notes, self.optimizer.learning_rate
        lines = self.on_root(lambda: beginning_lines(self.recipe, self.start, done, notes, rate))
        for line in lines + self.telemetry.watch(self.closing):
            self.say(line)
        self.progress = Progress(
            self.recipe.run.steps, done=done, enabled=self.is_root and self.recipe.logging.progress
        )
        self.closing.callback(self.progress.close)
        # Model and libraries stay: without them in the garbage collector, an answer of 32K tokens is read four times as
        # fast.
        gc.freeze()
        self.closing.callback(gc.unfreeze)
        self._export_if_missing(done)

    # ---------------------------------------------------------------- opening

    def _load(self, checkpoint: str) -> dict[str, Any]:
        """Load weights and optimizer from a training checkpoint and set the schedule to its step; returns its run
        state. Collective."""
        path = Path(checkpoint)
        state = training.load(path, self.port, self.optimizer.megatron, self.optimizer.scheduler, self.copies)
        if self.copies is not None:
            note = self.on_root(lambda: check_missing(self.recipe, path, RunStateFile.read(path).copies))
            self._notes += [note] if note else []
        step = int(state["step"])
        if state["stage"] != self.stage:
            raise UserError(
                f"checkpoint.resume: {checkpoint} was made by `asd-megatron {state['stage']}`: to train on from there,"
                " give the Hugging Face folder that it exported (RUN/hf/step_NNNNNN) as model.path"
            )
        folders.check_step_left(self.recipe, self.start, step)
        self.optimizer.seek(step * updates_per_step(self.recipe))
        self.optimizer.restore(state)
        if self.balance is not None:
            self.balance.fractions.copy_(torch.tensor(state["expert_load"]))
        return state

    def _open_files(self) -> None:
        self.files.open(
            self.closing,
            dump_recipe(self.recipe),
            tensorboard=self.recipe.logging.tensorboard,
            experts=self.balance is not None,
            done=None if self.resumed is None else self.first_step - 1,
        )

    @property
    def stage(self) -> str:
        """The program of the recipe: `train` or `sft`."""
        return "train" if isinstance(self.recipe, Recipe) else "sft"

    # ---------------------------------------------------------------- steps

    @contextmanager
    def generating(self) -> Iterator[None]:
        """As `ModelSession.generating`. With `rollout.offload_optimizer` the optimizer's state is in host memory
        inside, and gradients have none. Collective."""
        rollout = self.recipe.rollout if isinstance(self.recipe, Recipe) else None
        offload = rollout is not None and rollout.offload_optimizer
        if offload:
            self.optimizer.offload()
        try:
            with super().generating():
                yield
        finally:
            if offload:
                self.optimizer.reload()

    def steps(self) -> range:
        """The steps still to be made."""
        return range(self.first_step, self.recipe.run.steps + 1)

    def training_steps(self) -> Iterator[int]:
        """The steps still to be made, one by one, timed and profiled."""
        self.stopping.begin()
        return self.telemetry.steps(self.steps())

    def is_due(self, step: int, every: int, *, at_end: bool = False) -> bool:
        return bool(every) and step % every == 0 or at_end and step == self.recipe.run.steps

    def name_attention(self, step: int) -> None:
        """After the first step, on global rank 0's console: which of its attentions Transformer Engine chose; nothing
        where its attention is not in use."""
        if step == self.first_step and self.port.te_attention and self.is_root:
            self.say(f"attention of Transformer Engine's layers: {te.attention_in_use() or 'unknown'}")

    def write_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step's line of metrics, from global rank 0 (`step_files`), also for `logging.prometheus_port`."""
        if self.is_root:
            failed = self._saver.take_failures()
            metrics = {**metrics, **({"checkpoint/failed": float(failed)} if failed else {})}
            self.files.write(step, metrics)
            self.telemetry.publish(step, metrics)

    # ---------------------------------------------------------------- checkpoints and exports

    @property
    def saved_step(self) -> int:
        """The step from which the run would resume now."""
        return self._saver.newest or self.first_step - 1

    def checkpoint_due(self, step: int) -> bool:
        """Whether a training checkpoint is to be written after `step`."""
        every = self.recipe.checkpoint.every
        return self._overdue or self._saver.failure is not None or self.is_due(step, every, at_end=every > 0)

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint or an export is due after `step`."""
        settings = self.recipe.checkpoint
        return self.checkpoint_due(step) or self.is_due(step, settings.export_every, at_end=settings.export_at_end)

    def checkpoint_if_due(self, step: int, run_state: Mapping[str, Any], guard: Guard) -> None:
        """The training checkpoint and the export that are due after `step`. Collective.

        No checkpoint is written while updates are being skipped: it would replace the last good one. It is written
        after the next update that is applied. An export replaces nothing: finite weights are exported. Raises NotFinite
        when something is due and the weights are not finite, ReplicasDiffer when ranks' copies of them differ. What the
        disk has no room for is tried again (`saving`).
        """
        settings = self.recipe.checkpoint
        due, export = self.checkpoint_due(step), self.is_due(step, settings.export_every, at_end=settings.export_at_end)
        self._saver.settle(wait=False)
        if not (due or export):
            return
        broken = self.not_finite()
        if broken is not None:
            self._saver.settle()
            raise NotFinite(
                f"step {step}, checkpoint: {broken}. Nothing of this state is saved; {self._saver.newest_text()}"
            )
        self.integrity.check(f"step {step}, checkpoint")
        if due:
            self._overdue = guard.consecutive > 0
            if self._overdue:
                self.say(f"no checkpoint after step {step}: {guard}; {self._saver.newest_text()}")
            else:
                self.save(step, run_state)
        if export:
            self._export(step)

    def save_before_stop(self, step: int, run_state: Mapping[str, Any], guard: Guard) -> str | None:
        """Save the state after `step` of a run that stops there for a reason that is not in its weights, unless it is
        saved already or not worth saving: returns why not. Collective."""
        reason = str(guard) if guard.consecutive else self.not_finite()
        reason = reason or self.integrity.differing()
        self._saver.settle()
        if reason is None and self._saver.newest != step:
            self.save(step, run_state)
            self._saver.settle()
            reason = self._saver.failure
        return None if reason is None else f"{reason}; {self._saver.newest_text()}"

    def not_finite(self) -> str | None:
        """Which weight or optimizer state is not finite, on every rank; None if all are finite. Collective."""
        name, state = first_not_finite(self.port.named_weights()), self._saver.not_finite()
        where = None if state is None else f"the optimizer's state or a copy of weights is not finite ({state})"
        where = where if name is None else f"the weights are not finite ({name})"
        return first_message(where, self.process_groups.host)

    def save(self, step: int, run_state: Mapping[str, Any]) -> None:
        """A training checkpoint. Collective."""
        with self.clock.phase("checkpoint"):
            self._saver.save(step, run_state)

    def export(self, step: int) -> Path:
        """RUN/hf/step_NNNNNN, a complete Hugging Face folder. Collective."""
        with self.clock.phase("checkpoint"):
            return write_folder(
                self.port,
                self.source,
                folders.export_folder(self.folder, step),
                max_shard_bytes=self.recipe.checkpoint.shard_bytes,
                progress=TransferProgress("exporting the model", self.say) if self.recipe.logging.progress else None,
            )

    def _export(self, step: int) -> None:
        """An export that is due. Where the operating system refuses, a run that continues says so. Collective."""
        try:
            self.export(step)
        except UserError as error:  # the same on every rank
            if step == self.recipe.run.steps:
                raise UserError(f"{error}, then start the same command again") from error
            self.say(f"warning: {error}. The run continues without this export")

    def _export_if_missing(self, step: int) -> None:
        """Write the export that was due at the step from which the run resumes, if a kill prevented it. Collective."""
        settings, checkpoint = self.recipe.checkpoint, Path(self.start.checkpoint or "")
        due = self.is_due(step, settings.export_every, at_end=settings.export_at_end)
        if self.start.kind != "resume" or not due:
            return
        if not self.on_root(lambda: folders.is_exported(self.folder, step, checkpoint)):
            self.export(step)

    # ---------------------------------------------------------------- the end

    def stopped(self, request: StopRequested, step: int, run_state: Mapping[str, Any], guard: Guard) -> StopRequested:
        """The same request, once the state after `step`, the last complete one, is saved, unless it is not worth
        saving. Collective."""
        reason = self.save_before_stop(step, run_state, guard)
        outcome = f"state not saved ({reason})" if reason is not None else None
        return StopRequested(request.cause, step, outcome)

    def stop(self, request: StopRequested) -> None:
        """Record and say that the run has stopped on request, and what continues it. Collective."""
        newest = folders.checkpoint_folder(self.folder, self._saver.newest) if self._saver.newest else None
        self.on_root(lambda: self.say(conclude(self.recipe, request, self.first_step - 1, newest)))

    def finish(self, summary: Mapping[str, Any], sample: Sample | None = None) -> None:
        """End a run after its last step: write RUN/summary.json and, with `logging.curves`, RUN/curves.png, and print
        the closing report with a held-out `sample`. Collective."""
        self._saver.finish()

        def write() -> None:
            self.files.write_waiting()
            if not self.steps() and (self.folder / folders.SUMMARY_FILE).is_file():
                return  # a complete run whose export was missing
            with writing(self.folder):
                changes = changes_of(self.folder)
                record(self.folder, "end", self.recipe.run.steps)
                content = {**summary, "completed": True, "changed_settings": changes}
                write_json(self.folder / folders.SUMMARY_FILE, content)
                if self.recipe.logging.curves:
                    plot_run(self.folder)
            self.progress.close()
            exported = folders.export_folder(self.folder, self.recipe.run.steps)
            model = exported if exported.is_dir() else None
            rows, curves = read_metrics(self.folder), self.recipe.logging.curves
            table = closing_table(rows, run_folder=self.folder, model_folder=model, curves=curves, sample=sample)
            print(f"\n{table}", flush=True)

        self.on_root(write)
