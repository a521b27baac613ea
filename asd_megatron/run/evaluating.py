"""Evaluating one model on its sets, on all ranks: what is missing is sampled, scored and kept by global rank 0."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from asd_megatron import locks
from asd_megatron.checkpoint.distcp import DistributedCheckpoint
from asd_megatron.checkpoint.stored_model import StoredModel
from asd_megatron.config import Recipe
from asd_megatron.data.problems import ProblemSet
from asd_megatron.data.prompts import PromptRenderer
from asd_megatron.data.reading import content_hash
from asd_megatron.data.tokenizer import decode
from asd_megatron.distributed.stop_signals import StopSignals
from asd_megatron.evaluation.journal import Journal, check_identity
from asd_megatron.evaluation.outcomes import Sample, samples_of
from asd_megatron.evaluation.progress import SetProgress
from asd_megatron.evaluation.results import Results, SetResult, write_results
from asd_megatron.evaluation.samples import SetSamples, read_samples, samples_path, write_samples
from asd_megatron.models.loading import FullTensor
from asd_megatron.records import Group, Prompt
from asd_megatron.reward.base import Verifier
from asd_megatron.rollout.collector import Collector
from asd_megatron.rollout.engine import RolloutEngine
from asd_megatron.run.build import embedded_engine, make_collector, make_renderer, rollout_engine
from asd_megatron.run.evaluation import Weights
from asd_megatron.run.evaluation_sets import EvaluationSet, Verifiers, failures, named_sets, since, success_threshold
from asd_megatron.run.folder import LOCK_FILE, writing
from asd_megatron.run.identity import identity, weights_digest
from asd_megatron.run.model import dtype_of, load_weights
from asd_megatron.run.model_session import ModelSession
from asd_megatron.run.sources import model_folder
from asd_megatron.run.subjects import Subject

ROWS = 256
"""Responses that the embedded engine samples at once in a recipe without the section `rollout`."""


@dataclass
class _Engine:
    """An engine with the model that it samples from. `key`: what two models have in common that can share it."""

    key: str
    engine: RolloutEngine
    collector: Collector
    weights: Weights
    closing: ExitStack


class EvaluationSession(ModelSession):
    """The session of `asd-megatron evaluate` on one rank: one subject after the other. A model that has the
    configuration of the one before takes its place, so that servers are started once."""

    def __init__(self, subject: Subject, closing: ExitStack, signals: StopSignals | None = None) -> None:
        super().__init__(subject.recipe, closing, signals)
        self._engine: _Engine | None = None
        closing.callback(self._close)

    def take(self, subject: Subject) -> None:
        """Read the configuration and the tokenizer of the next subject; no weights yet."""
        self.recipe, self.folder = subject.recipe, subject.out
        self.read_source(subject.weights if subject.kind == "folder" else model_folder(subject.recipe.model.path))

    def collector(self, subject: Subject, renderer: PromptRenderer, first: EvaluationSet) -> Collector:
        """The collector on an engine with the subject's weights. first: its problems give the probe with which servers
        are verified. Collective."""
        tensors = self._tensors(subject)
        key = self._key()
        if self._engine is not None and self._engine.key == key:
            load_weights(self.recipe, self.port, self.source, tensors)
            self._engine.weights.version += 1
            return self._engine.collector
        self._close()
        self.open_model(tensors, training=False)
        self.open_packs()
        self._engine = self._open(key, renderer, first)
        return self._engine.collector

    def _tensors(self, subject: Subject) -> Mapping[str, FullTensor] | None:
        if subject.kind == "folder":
            return None
        return StoredModel(DistributedCheckpoint(subject.weights), self.hf_config)

    def _key(self) -> str:
        recipe = self.recipe.model_dump(mode="json")
        sections = {name: recipe.get(name) for name in ("precision", "rollout", "batching", "parallelism")}
        model = {key: value for key, value in recipe["model"].items() if key != "path"}
        tokenizer = self.source / "tokenizer.json"
        text = tokenizer.read_text(encoding="utf-8") if tokenizer.is_file() else str(self.source)
        return json.dumps([self.hf_config, sections, model, recipe["run"]["seed"], text], sort_keys=True)

    def _open(self, key: str, renderer: PromptRenderer, first: EvaluationSet) -> _Engine:
        weights, closing = Weights(self.port), ExitStack()
        engine: RolloutEngine
        if isinstance(self.recipe, Recipe):
            engine, start = rollout_engine(self.recipe, self, renderer, first.source, None)
        else:
            engine, start = embedded_engine(self, ROWS), lambda: None
        closing.callback(engine.close)
        collector = make_collector(self, engine, weights, ProblemSet.none(), renderer, None)
        with self.generating():
            start()
            collector.release()
        return _Engine(key, engine, collector, weights, closing)

    def _close(self) -> None:
        if self._engine is not None:
            engine, self._engine = self._engine, None
            engine.closing.close()
            del self.port

    @property
    def rows(self) -> int | None:
        """Responses that the embedded engine samples at once; None for servers."""
        if not isinstance(self.recipe, Recipe):
            return ROWS
        return self.recipe.rollout.max_batch_size if self.recipe.rollout.engine == "embedded" else None


@dataclass
class _Task:
    """A set with its prompts and, on global rank 0, what there is of its samples."""

    given: EvaluationSet
    prompts: list[Prompt]
    identity: dict[str, Any]
    complete: SetSamples | None = None
    journal: Journal | None = None


def evaluate_subject(session: EvaluationSession, subject: Subject, *, overwrite: bool = False) -> Results | None:
    """The results of a subject on global rank 0, None elsewhere; its files are written. Continues with what earlier
    starts have left, unless `overwrite`. Collective."""
    session.take(subject)
    with held(session, subject.out):
        renderer = make_renderer(session.recipe, session.tokenizer, session.end_ids)
        tasks = _tasks(session, subject, renderer, overwrite=overwrite)
        missing = session.on_root(lambda: [task.complete is None for task in tasks])
        try:
            if any(missing):
                _answer(session, subject, renderer, [t for t, m in zip(tasks, missing, strict=True) if m])
        finally:
            for task in tasks:
                if task.journal is not None:
                    task.journal.close()
        return session.only_root(lambda: _results(session, subject, tasks))


@contextmanager
def held(session: EvaluationSession, folder: Path) -> Iterator[None]:
    """Inside, no other evaluation writes into the folder. Raises UserError when one does. Collective."""
    with ExitStack() as closing:

        def lock() -> None:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                closing.enter_context(locks.locked(folder / LOCK_FILE, lambda holder: _in_use(folder, holder)))
                closing.callback((folder / LOCK_FILE).unlink, missing_ok=True)

        session.on_root(lock)
        yield


def _in_use(folder: Path, holder: str) -> str:
    return f"another evaluation writes into {folder} ({holder}): wait for it, end it, or give another --out folder"


def _tasks(session: EvaluationSession, subject: Subject, renderer: PromptRenderer, *, overwrite: bool) -> list[_Task]:
    digest = session.on_root(lambda: weights_digest(subject.weights))
    dtype = str(dtype_of(session.recipe.model.dtype)).removeprefix("torch.")
    tasks = []
    for given in named_sets(session):
        renderer.check(given.problems)
        prompts = given.prompts(renderer)
        made = identity(session.recipe, given, prompts, weights=digest, dtype=dtype, step=subject.step)
        tasks.append(_Task(given, prompts, made))

    def look() -> None:
        for task in tasks:
            _look_up(task, subject.out, overwrite=overwrite)

    session.on_root(look)
    return tasks


def _look_up(task: _Task, folder: Path, *, overwrite: bool) -> None:
    """Find what earlier starts have left of the set."""
    name = task.given.name
    path, journal = samples_path(folder, name), folder / f"journal-{name}.jsonl"
    if overwrite:
        path.unlink(missing_ok=True)
        journal.unlink(missing_ok=True)
    if path.is_file():
        found = read_samples(path)
        check_identity(path, found.identity, task.identity)
        task.complete = found
    else:
        task.journal = Journal(journal, task.identity)


# ---------------------------------------------------------------- answering


def _answer(session: EvaluationSession, subject: Subject, renderer: PromptRenderer, tasks: Sequence[_Task]) -> None:
    """Sample and score what is missing of the sets. Collective."""
    collector = session.collector(subject, renderer, tasks[0].given)
    session.stopping.while_waiting()
    with ExitStack() as closing:
        verifiers = Verifiers(session, closing)
        for task in tasks:
            reward = task.given.reward
            if reward is None:
                assert session.recipe.reward is not None  # the recipe's checks
                reward = session.recipe.reward.model_dump()
            with session.clock.phase("evaluate"), session.generating():
                _answer_set(session, collector, task, verifiers.of(reward), subject.step)


def _answer_set(
    session: EvaluationSession, collector: Collector, task: _Task, verifier: Verifier | None, step: int
) -> None:
    journal = task.journal
    done = set(session.on_root(lambda: sorted(journal.done) if journal is not None else []))
    progress = SetProgress(
        task.given.name,
        len(task.prompts),
        done=len(done),
        enabled=session.is_root and session.recipe.logging.progress,
    )
    session.closing.callback(progress.close)
    for batch in batches(task.prompts, task.given.params.n, session.rows, session.process_groups.dp.size(), done):
        session.stopping.while_waiting()
        recorder = _Recorder(task, batch, done, verifier, progress, at_once=session.rows is None)
        prompts = [task.prompts[place] for place in batch]
        collector.answer(prompts, task.given.params, step=step, verifier=verifier, on_group=recorder.take)
        session.on_root(recorder.write)
        collector.take_timings()
    progress.close()


def batches(
    prompts: Sequence[Prompt], samples: int, rows: int | None, replicas: int, done: set[int]
) -> Iterator[list[int]]:
    """The places of the prompts that are submitted together, but for batches that are done.

    rows: responses that each of `replicas` copies of the model samples at once. The batches are those of the complete
    set, whatever is done of it, shortest prompts first: an interrupted evaluation continues with the same batches, so
    that its samples are the same bits. Servers (rows None) get all that is missing, the order of the set, at once.
    """
    if rows is None:
        missing = [place for place in range(len(prompts)) if place not in done]
        if missing:
            yield missing
        return
    order = sorted(range(len(prompts)), key=lambda place: (len(prompts[place].ids), place))
    size = max(1, rows // samples) * replicas
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        if not done.issuperset(batch):
            yield batch


class _Recorder:
    """Takes the rewarded groups of a batch to the journal, on global rank 0: at once, or together when the batch is
    complete."""

    def __init__(
        self,
        task: _Task,
        batch: Sequence[int],
        done: set[int],
        verifier: Verifier | None,
        progress: SetProgress,
        *,
        at_once: bool,
    ) -> None:
        self._task, self._batch, self._done, self._verifier = task, batch, done, verifier
        self._progress, self._at_once = progress, at_once
        self._before = failures(verifier)
        self._new: list[tuple[int, str, Sequence[Sample]]] = []

    def take(self, index: int, group: Group) -> None:
        place = self._batch[index]
        if place in self._done:
            return
        samples = samples_of(group)
        self._new.append((place, group.problem.prompt_id, samples))
        if self._at_once:
            self.write()

    def write(self) -> None:
        if self._task.journal is not None and self._new:
            self._task.journal.add(self._new, since(self._before, self._verifier))
            self._before = failures(self._verifier)
            rewards = [s.reward for _, _, samples in self._new for s in samples]
            tokens = sum(s.tokens for _, _, samples in self._new for s in samples)
            self._progress.add(len(self._new), sum(rewards) * len(self._new) / len(rewards), tokens)
            self._new = []


# ---------------------------------------------------------------- results


def _results(session: EvaluationSession, subject: Subject, tasks: Sequence[_Task]) -> Results:
    """Write the files of a subject whose sets are complete. Global rank 0."""
    threshold = success_threshold(session.recipe)
    sets = []
    for task in tasks:
        if task.complete is None:
            task.complete = _complete(session, subject, task)
        keys = tuple(f"{problem.prompt_id}/{content_hash(problem)}" for problem in task.given.problems)
        sets.append(replace(SetResult.of(task.given.name, task.complete, threshold), problems=keys))
    found = Results(subject.label, str(subject.weights), subject.step, sets)
    with writing(subject.out):
        write_results(subject.out, found)
    return found


def _complete(session: EvaluationSession, subject: Subject, task: _Task) -> SetSamples:
    journal = task.journal
    assert journal is not None
    places = range(len(task.prompts))
    names = tuple(prompt.problem.prompt_id for prompt in task.prompts)
    found = SetSamples(names, tuple(journal.done[place] for place in places), dict(journal.failures), task.identity)
    texts = [decode(session.tokenizer, prompt.ids, skip_special_tokens=False) for prompt in task.prompts]
    write_samples(samples_path(subject.out, task.given.name), found, task.given.problems, texts)
    journal.remove()
    return found
