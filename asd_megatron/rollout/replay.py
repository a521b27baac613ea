"""A rollout engine that serves recorded rollouts: training without sampling."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from asd_megatron.data.tokenizer import decode
from asd_megatron.distributed.layout import ProcessGroups
from asd_megatron.distributed.objects import on_rank_zero
from asd_megatron.errors import UserError
from asd_megatron.observe.dumps import dump_path, read_dump
from asd_megatron.records import Group, Prompt, Rollout, SamplingParams
from asd_megatron.rollout.engine import WeightSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ReplayEngine:
    """`RolloutEngine` over the dumps of an earlier run (`run.dump_rollouts: true`).

    `submit(prompts, params, step)` is answered with the groups recorded in step_XXXXXX.parquet for that step: response
    ids, log-probs, masks and weight versions as recorded. Refuses (UserError from `collect`, on every rank) when a
    prompt, its token ids, the number of samples or the temperature differ from the recording. Evaluation rollouts are
    not recorded, so an evaluation is refused too.

    folder: a run folder, or its folder `rollouts`. tokenizer: for `Rollout.text`, which dumps do not contain and
    verifiers read; None leaves it empty.
    """

    def __init__(
        self, folder: str | os.PathLike[str], process_groups: ProcessGroups, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        self._folder = _dumps_folder(Path(folder))
        self._process_groups = process_groups
        self._tokenizer = tokenizer
        self._version = 0
        self._queue: list[tuple[tuple[Prompt, ...], SamplingParams, int]] = []

    @property
    def weight_version(self) -> int:
        return self._version

    @property
    def pending(self) -> int:
        return sum(len(prompts) for prompts, _, _ in self._queue)

    def submit(self, prompts: Sequence[Prompt], params: SamplingParams, step: int) -> None:
        if prompts:
            self._queue.append((tuple(prompts), params, step))

    def collect(self, timeout: float) -> list[Group]:
        if not self._queue:
            return []
        prompts, params, step = self._queue.pop(0)
        found: list[Group] = []

        def look_up() -> None:
            found.extend(self._recorded(prompts, params, step))

        try:
            on_rank_zero(look_up, self._process_groups.host)
        except UserError:
            self.abort()
            raise
        return found

    def abort(self) -> None:
        self._queue.clear()

    def suspend(self) -> None:
        """There is no generation to stop."""

    def release(self) -> None:
        """Holds no accelerator memory."""

    def resume(self) -> None:
        """Holds no accelerator memory."""

    def load_weights(self, weights: WeightSource) -> None:
        """Record the version; recorded rollouts keep their own."""
        self._version = weights.version

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.abort()

    def _recorded(self, prompts: Sequence[Prompt], params: SamplingParams, step: int) -> list[Group]:
        if step < 1:
            raise UserError(
                "the replay engine has no evaluation rollouts; set evaluation.every, at_start and at_end off"
            )
        path = self._folder / dump_path("", step).name
        dump = read_dump(path)
        if dump.info.temperature != params.temperature:
            raise UserError(
                f"{path} was sampled at temperature {dump.info.temperature}, the recipe asks for {params.temperature}; "
                "set sampling.temperature to the recorded one"
            )
        recorded: dict[str, list[Rollout]] = {}
        for example in dump.examples:
            recorded.setdefault(example.rollout.prompt_id, []).append(example.rollout)
        wanted = {prompt.problem.prompt_id for prompt in prompts}
        if wanted != set(recorded):
            missing, extra = sorted(wanted - set(recorded)), sorted(set(recorded) - wanted)
            raise UserError(
                f"{path} does not hold the problems of step {step}: {len(missing)} are missing from it "
                f"({_some(missing)}), {len(extra)} are not asked for ({_some(extra)}); replay with the data file, "
                "run.seed and sampling.problems_per_step of the recorded run"
            )
        return [self._group(path, prompt, recorded[prompt.problem.prompt_id], params) for prompt in prompts]

    def _group(self, path: Path, prompt: Prompt, rollouts: list[Rollout], params: SamplingParams) -> Group:
        name = prompt.problem.prompt_id
        rollouts = sorted(rollouts, key=lambda r: r.sample)
        if [r.sample for r in rollouts] != list(range(params.n)):
            raise UserError(
                f"{path} holds {len(rollouts)} rollouts of problem {name}, the recipe asks for {params.n}; set "
                "sampling.rollouts_per_problem to the recorded number"
            )
        if any(not np.array_equal(r.prompt_ids, prompt.ids) for r in rollouts):
            raise UserError(
                f"{path}: the recorded prompt of problem {name} has other token ids than this recipe's; use the "
                "tokenizer and the prompt settings (data.*) of the recorded run"
            )
        if self._tokenizer is not None:
            rollouts = [dataclasses.replace(r, text=decode(self._tokenizer, r.response_ids)) for r in rollouts]
        return Group(prompt.problem, tuple(rollouts))


def _dumps_folder(given: Path) -> Path:
    """The folder of step_XXXXXX.parquet: `given`, or its folder `rollouts` if it is a run folder."""
    inner = given / dump_path("", 0).parent
    if inner.is_dir():
        return inner
    if given.is_dir() and any(given.glob("step_*.parquet")):
        return given
    raise UserError(
        f"rollout.replay_folder {given} holds no rollout dumps: name a run folder, or its folder `{inner.name}`, of a"
        " run with `run.dump_rollouts: true`"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "none"
