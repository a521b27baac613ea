"""How a recipe differs from the one that a run folder was trained with, and which differences are allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from asd_megatron.config import AnyRecipe
from asd_megatron.config.base import section_schema
from asd_megatron.config.checkpoint import ALL
from asd_megatron.files import to_json

# These say how this start is done and what the folder is called, not what the run is: never compared.
START_KEYS = {"checkpoint.resume", "checkpoint.accept_changes", "run.overwrite", "run.name", "run.folder"}

# A resumed run may change these; every other key decides what is trained or measured, so that one record cannot hold
# both values unless the user says so. A key that is added to the schema belongs to the second kind until it is listed.
FREE_SECTIONS = {
    "batching",  # results do not depend on micro-batches and shared prefixes
    "checkpoint",
    "logging",
    "parallelism",  # nor on placement
    "precision",  # recorded as every change is; levels that lambda follows are rescaled (`run.strength`)
}
# These decide the learning rate of later steps. They are tuned during a run; metrics.jsonl has each step's rate.
SCHEDULE_KEYS = {
    "run.steps",  # a run may be made longer; the learning-rate schedule then spans the new length
    "optimizer.learning_rate",
    "optimizer.min_learning_rate",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "algorithm.updates_per_batch",
    "algorithm.epochs",
}
FREE_KEYS = SCHEDULE_KEYS | {
    "run.dump_rollouts",
    "run.profile_steps",
    "run.time_limit",
    "run.replica_check_every",
    "run.stop_when_dead",
    "run.lost_rank_timeout",
    "run.timeout",
    "model.layers",
    "model.recompute",
    "model.recompute_layers",
    "model.attention_backend",
    "optimizer.moments",  # master weights are stored complete, moments as float32
    "optimizer.offload",
    "optimizer.grad_spike",
    "optimizer.grad_spike_factor",
    "algorithm.log_pmi",
    "algorithm.teacher_states",
    "evaluation.every",
    "evaluation.at_start",
    "evaluation.at_end",
    "reward.timeout_seconds",
    "reward.workers",
    "reward.memory_gb",
    "reward.allow_unsafe_sandbox",
}
# Of `rollout`, what decides which rollouts are trained on; its other keys say where and how servers run.
FIXED_ROLLOUT_KEYS = {
    "rollout.engine",
    "rollout.replay_folder",
    "rollout.overlap",
    "rollout.oversampling",
    "rollout.partial_rollouts",
    "rollout.max_staleness",
    "rollout.routing_replay",
}
FIXED_CHECKPOINT_KEYS = {"checkpoint.continual_from"}  # what the run has begun from


@dataclass(frozen=True)
class Change:
    """A recipe key with its recorded and its present value."""

    key: str
    old: Any
    new: Any

    @property
    def free(self) -> bool:
        """Whether a resumed run may change the key without `checkpoint.accept_changes`."""
        section = self.key.partition(".")[0]
        if section == "rollout":
            return self.key not in FIXED_ROLLOUT_KEYS
        if self.key in FIXED_CHECKPOINT_KEYS:
            return False
        return section in FREE_SECTIONS or self.key in FREE_KEYS

    def __str__(self) -> str:
        return f"{self.key}: {to_json(self.old)} -> {to_json(self.new)}"


def changes(recorded: Mapping[str, Any], recipe: AnyRecipe) -> list[Change]:
    """The keys whose values differ between the recorded recipe (section -> key -> value) and the present one.

    A key or section that the schema has gained since counts with its defaults, one that it has lost is skipped.
    """
    found = []
    for section, values in recipe.model_dump(mode="json").items():
        before, fields = recorded.get(section, {}), section_schema(type(recipe), section).model_fields
        for key, field in fields.items():
            new = None if values is None else values[key]
            old = None  # an optional section that was not there
            if isinstance(before, Mapping):
                default = None if field.is_required() else field.get_default(call_default_factory=True)
                default = default.model_dump(mode="json") if isinstance(default, BaseModel) else default
                old = before.get(key, list(default) if isinstance(default, tuple) else default)
            if old != new and f"{section}.{key}" not in START_KEYS:
                found.append(Change(f"{section}.{key}", old, new))
    return found


def not_accepted(found: Iterable[Change], accepted: Iterable[str]) -> list[Change]:
    """The changes that would falsify the run's record and that the user has not accepted."""
    accepted = set(accepted)
    return [] if ALL in accepted else [change for change in found if not change.free and change.key not in accepted]
