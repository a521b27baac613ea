"""What both stages share: ranks, model, optimizer, tokenizer, run folder, checkpoints. Opened from a recipe, closed at
the end.

    with open_session(recipe) as session:
        train(TrainingRun(recipe, session))
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from asd_megatron.checkpoint import training
from asd_megatron.checkpoint.huggingface import FolderReader, read_config, write_folder
from asd_megatron.config import AnyRecipe, Recipe, check_devices, check_model, check_world, dump_recipe
from asd_megatron.data.tokenizer import check_vocabulary, end_token_ids, load_tokenizer
from asd_megatron.distributed import device
from asd_megatron.distributed import layout as layouts
from asd_megatron.distributed.layout import Layout, ProcessGroups
from asd_megatron.distributed.objects import on_rank_zero
from asd_megatron.errors import UserError
from asd_megatron.files import atomic_write
from asd_megatron.models.port import ModelPort
from asd_megatron.observe.progress import Progress
from asd_megatron.observe.writer import RunWriter
from asd_megatron.run.sources import model_folder
from asd_megatron.trainer.batch import PackLayout
from asd_megatron.trainer.optimizer import Optimizer

T = TypeVar("T")
log = logging.getLogger("asd_megatron")


class Clock:
    """Seconds of each phase of the step in hand."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """The step's phases and its `total`; starts the next step."""
        now = time.perf_counter()
        times, self.times = {**self.times, "total": now - self._started}, {}
        self._started = now
        return times


@contextmanager
def open_session(recipe: AnyRecipe) -> Iterator[Session]:
    """Join the other ranks and open the recipe's session. On leaving, whatever was opened is closed, last first, and
    the ranks part; another session may follow in the same process."""
    with ExitStack() as closing:
        yield Session(recipe, closing)


class Session:
    """One program on every rank, from `open_session`. Attributes are the same everywhere unless stated; `writer` exists
    on global rank 0 only, after `begin`.

    Opening reads and checks and leaves nothing behind: a recipe that is refused, mended and started again finds the run
    folder as it was. `begin` makes the folder. `closing` takes what has to be closed at the end.

    `first_step` is the first step still to be made (1, or the one after the checkpoint that the run resumed from),
    `resumed` the run state of that checkpoint, None for a fresh run.
    """

    def __init__(self, recipe: AnyRecipe, closing: ExitStack) -> None:
        self.recipe, self.closing = recipe, closing
        device.prepare()
        world = int(os.environ.get("WORLD_SIZE", "1"))
        data = check_world(recipe, world)
        check_devices(recipe)
        self.layout = _layout(recipe, data)
        closing.push(layouts.leave)
        self.process_groups: ProcessGroups = layouts.init(self.layout)
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        log.setLevel(recipe.logging.level.upper() if self.is_root else "ERROR")

        self.source = model_folder(recipe.model.path)
        self.hf_config: dict[str, Any] = read_config(self.source)
        check_model(recipe, self.hf_config)
        self.tokenizer = load_tokenizer(self.source)
        check_vocabulary(self.tokenizer, int(self.hf_config["vocab_size"]))
        self.end_ids = end_token_ids(self.source, self.tokenizer)

        self.folder = recipe.run.path
        self.checkpoints = self.folder / "checkpoints"
        self._resume = resume = self.on_root(self._resume_folder)
        self.goes_on = resume is not None and Path(resume).resolve().parent == self.checkpoints.resolve()
        self.on_root(self._check_folder)

        self.port = ModelPort.build(
            self.hf_config,
            self.process_groups,
            self.layout,
            dtype=_dtype(recipe.model.dtype),
            layers=recipe.model.layers,
            recompute=recipe.model.recompute,
        )
        with FolderReader(self.source) as tensors:
            self.port.load(tensors)
        self.port.wrap_ddp(
            distributed_optimizer=recipe.parallelism.distributed_optimizer,
            overlap_grad_reduce=recipe.parallelism.overlap_grad_reduce,
        )
        self.optimizer = Optimizer(
            self.port,
            **recipe.optimizer.model_dump(),
            total_steps=recipe.run.steps * updates_per_step(recipe),
            distributed=recipe.parallelism.distributed_optimizer,
        )
        self.pack_layout = PackLayout.of(
            self.layout,
            self.process_groups,
            self.port.device,
            pad_id=self.tokenizer.pad_token_id or 0,
            share_prefixes=self._shares_prefixes(),
        )
        self.resumed: dict[str, Any] | None = None
        if resume is not None:
            self.resumed = training.load(Path(resume), self.port, self.optimizer.megatron, self.optimizer.scheduler)
            self._check_resumed(resume, self.resumed)
        self.first_step = 1 if self.resumed is None else int(self.resumed["step"]) + 1
        self.clock = Clock()
        self.writer: RunWriter | None = None
        self.progress = Progress(recipe.run.steps, enabled=False)

    def begin(self) -> None:
        """Make the run folder, or go on in it, and open its metrics. Collective."""
        self.on_root(self._prepare_folder)
        self.progress = Progress(
            self.recipe.run.steps,
            done=self.first_step - 1,
            enabled=self.is_root and self.recipe.logging.progress,
        )
        self.closing.callback(self.progress.close)
        if self.is_root:
            done = None if self.resumed is None else self.first_step - 1
            self.writer = RunWriter(self.folder, tensorboard=self.recipe.logging.tensorboard, resume_step=done)
            self.closing.callback(self.writer.close)
            self.writer.text("recipe", dump_recipe(self.recipe))

    def _shares_prefixes(self) -> bool:
        asked = self.recipe.batching.share_prefixes
        if asked and not self.port.shares_prefixes:
            raise UserError(
                "batching.share_prefixes true: only our own attention knows shared prefixes, and model.layers auto"
                " chose Transformer Engine's; set model.layers local, or leave batching.share_prefixes out"
            )
        return self.port.shares_prefixes if asked is None else asked

    # ---------------------------------------------------------------- ranks

    @property
    def stage(self) -> str:
        """Which program this is: `train` or `sft`."""
        return "train" if isinstance(self.recipe, Recipe) else "sft"

    @property
    def is_root(self) -> bool:
        return self.process_groups.world.rank() == 0

    def on_root(self, action: Callable[[], T]) -> T:
        """Run `action` on global rank 0 and give its result to every rank; its UserError is raised on every rank.
        Collective."""
        return on_rank_zero(action, self.process_groups.host)

    def only_root(self, action: Callable[[], T]) -> T | None:
        """Run `action` on global rank 0 alone, None elsewhere (the result stays there); its UserError is raised on
        every rank."""
        kept: list[T] = []
        self.on_root(lambda: kept.append(action()))
        return kept[0] if kept else None

    # ---------------------------------------------------------------- run folder

    def _resume_folder(self) -> str | None:
        asked = self.recipe.checkpoint.resume
        if asked == "never":
            return None
        if asked == "auto":
            found = training.latest(self.checkpoints)
            return None if found is None else str(found)
        if not Path(asked).is_dir():
            raise UserError(f"checkpoint.resume: {asked} is not a folder; give a checkpoint's folder, auto or never")
        return asked

    def _check_resumed(self, path: str, state: Mapping[str, Any]) -> None:
        step, steps = int(state["step"]), self.recipe.run.steps
        if state["stage"] != self.stage:
            raise UserError(
                f"checkpoint.resume: {path} was made by `asd-megatron {state['stage']}`: to go on from there, give the "
                "Hugging Face folder that it exported (RUN/hf/step_NNNNNN) as model.path"
            )
        if step > steps or step == steps and not self.goes_on:
            raise UserError(
                f"checkpoint.resume: {path} is the state after step {step} and run.steps is {steps}, so there is no "
                f"step left: set run.steps above {step}, or checkpoint.resume never and another run.name"
            )

    def _check_folder(self) -> None:
        """Refuse a run folder that holds something else, before any work is done."""
        folder = self.folder
        if self.goes_on or not (folder.is_dir() and any(folder.iterdir())):
            return
        if not self.recipe.run.overwrite:
            raise UserError(
                f"the run folder {folder} is not empty: choose another run.name or run.folder, or set "
                "run.overwrite true"
            )
        if not (folder / "recipe.yaml").is_file():
            raise UserError(f"run.overwrite: {folder} holds no recipe.yaml, so it is no run folder; it is left alone")
        for key, path in _inputs(self.recipe).items():
            if Path(path).resolve().is_relative_to(folder.resolve()):
                raise UserError(f"run.overwrite would remove {folder} with {key} {path} in it: choose another run.name")

    def _prepare_folder(self) -> None:
        self._check_folder()
        if self.folder.is_dir() and not self.goes_on:
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.goes_on and self._resume is not None:  # it may be an older one: from now on this is the run's newest
            training.name_latest(self.checkpoints, Path(self._resume).resolve().name)
        atomic_write(self.folder / "recipe.yaml", dump_recipe(self.recipe))

    # ---------------------------------------------------------------- steps

    @contextmanager
    def generating(self) -> Iterator[None]:
        """While rollouts are made on the trainer's own devices, the optimizer's state may wait in host memory."""
        if not (isinstance(self.recipe, Recipe) and self.recipe.rollout.offload_optimizer):
            yield
            return
        self.optimizer.offload()
        try:
            yield
        finally:
            self.optimizer.reload()

    def steps(self) -> range:
        """The steps still to be made."""
        return range(self.first_step, self.recipe.run.steps + 1)

    def is_due(self, step: int, every: int, *, at_end: bool = False) -> bool:
        return bool(every) and step % every == 0 or at_end and step == self.recipe.run.steps

    def save(self, step: int, run_state: Mapping[str, Any]) -> None:
        """A training checkpoint; the newest `checkpoint.keep` stay. Collective."""
        with self.clock.phase("checkpoint"):
            training.save(
                self.checkpoints,
                step,
                self.port,
                self.optimizer.megatron,
                self.optimizer.scheduler,
                {**run_state, "step": step, "stage": self.stage},
                keep=self.recipe.checkpoint.keep,
            )

    def export(self, step: int) -> Path:
        """RUN/hf/step_NNNNNN, a complete Hugging Face folder. Collective."""
        with self.clock.phase("checkpoint"):
            return write_folder(self.port, self.source, self._hf(step))

    def checkpoint_if_due(self, step: int, run_state: Mapping[str, Any]) -> None:
        settings = self.recipe.checkpoint
        if self.is_due(step, settings.every, at_end=settings.every > 0):
            self.save(step, run_state)
        if self.is_due(step, settings.export_every, at_end=settings.export_at_end):
            self.export(step)

    def export_if_missing(self) -> None:
        """The export after the last step, when a run was stopped between that step's checkpoint and it. Collective."""
        last = self.recipe.run.steps
        if self.first_step > last and self.recipe.checkpoint.export_at_end and not self.on_root(self._hf(last).is_dir):
            self.export(last)

    def _hf(self, step: int) -> Path:
        return self.folder / "hf" / f"step_{step:06d}"


def _inputs(recipe: AnyRecipe) -> dict[str, str]:
    """What the recipe reads, by key: files and folders (built-in names are none, and are never inside a run folder)."""
    found: dict[str, str | None] = {
        "model.path": recipe.model.path,
        "data.train": recipe.data.train,
        "data.test": recipe.data.test,
        "checkpoint.resume": recipe.checkpoint.resume,
    }
    if isinstance(recipe, Recipe):
        found["rollout.replay_folder"] = recipe.rollout.replay_folder
    return {key: path for key, path in found.items() if path is not None}


def updates_per_step(recipe: AnyRecipe) -> int:
    algorithm = getattr(recipe, "algorithm", None)
    return 1 if algorithm is None else algorithm.updates_per_batch * algorithm.epochs


def _layout(recipe: AnyRecipe, data: int) -> Layout:
    p = recipe.parallelism
    return Layout(
        tensor=p.tensor,
        pipeline=p.pipeline,
        virtual_pipeline=p.virtual_pipeline,
        context=p.context,
        data=data,
        sequence_parallel=p.sequence_parallel,
    )


def _dtype(name: str) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if torch.cuda.is_available() else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
