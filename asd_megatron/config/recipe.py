"""The two recipe schemas, how a recipe is written as YAML and named by a hash. `loading` reads and checks one."""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import Field

from asd_megatron.config.algorithm import Algorithm
from asd_megatron.config.base import Section
from asd_megatron.config.batching import Batching
from asd_megatron.config.checkpoint import Checkpoint
from asd_megatron.config.data import Data
from asd_megatron.config.evaluation import Evaluation
from asd_megatron.config.gate import Gate
from asd_megatron.config.logging import Logging
from asd_megatron.config.model import Model
from asd_megatron.config.optimizer import Optimizer
from asd_megatron.config.parallelism import Parallelism
from asd_megatron.config.privileged import Privileged
from asd_megatron.config.reward import Reward
from asd_megatron.config.rollout import Rollout
from asd_megatron.config.run import Run, RunBase
from asd_megatron.config.sampling import Generation, Sampling
from asd_megatron.config.sft import Sft
from asd_megatron.config.teacher import Teacher
from asd_megatron.config.yaml_text import to_yaml

Kind = Literal["train", "sft"]
WARMUP_STEPS = 5  # the paper's W


LONG_RESPONSES = 4096
"""Tokens of a response from which on a group shares its demonstration, unless the recipe says otherwise."""


class Recipe(Section):
    """The recipe of a `train` run."""

    run: Run = Run()
    model: Model
    parallelism: Parallelism = Parallelism()
    algorithm: Algorithm = Algorithm()
    gate: Gate = Gate()
    privileged: Privileged = Privileged()
    teacher: Teacher = Teacher()
    sampling: Sampling = Sampling()
    rollout: Rollout = Rollout()
    evaluation: Evaluation = Evaluation()
    data: Data
    reward: Reward = Reward()
    optimizer: Optimizer = Optimizer()
    batching: Batching = Batching()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()

    @property
    def gate_warmup_steps(self) -> int:
        """`gate.warmup_steps`, or its default: 5 for gated conditions without a given `h_warm`, else 0."""
        if self.gate.warmup_steps is not None:
            return self.gate.warmup_steps
        return WARMUP_STEPS if self.algorithm.gated and self.gate.h_warm is None else 0

    @property
    def demonstrations_per_group(self) -> int | None:
        """`privileged.demonstrations_per_group` with its default worked out; None: all."""
        given, long = self.privileged.demonstrations_per_group, self.sampling.max_response_tokens >= LONG_RESPONSES
        return 1 if given is None and long else given

    @property
    def evaluates(self) -> bool:
        """Whether the run measures held-out problems at all."""
        return _evaluates(self.data, self.evaluation)

    @property
    def samples_embedded(self) -> bool:
        """Whether the embedded engine is needed: for rollouts, or for the evaluation of a replay."""
        return self.rollout.engine == "embedded" or self.rollout.engine == "replay" and self.evaluates


class SftRecipe(Section):
    """The recipe of a supervised (`sft`) run. `reward`, `evaluation` and `sampling` matter only with `data.test`."""

    run: RunBase = RunBase()
    model: Model
    parallelism: Parallelism = Parallelism()
    sft: Sft = Sft()
    data: Data
    evaluation: Evaluation = Evaluation()
    sampling: Generation = Generation()
    reward: Reward | None = Field(None, description="How answers to `data.test` are scored; needed with it.")
    optimizer: Optimizer = Optimizer()
    batching: Batching = Batching()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()

    @property
    def evaluates(self) -> bool:
        """Whether the run measures held-out problems at all."""
        return self.reward is not None and _evaluates(self.data, self.evaluation)

    @property
    def samples_embedded(self) -> bool:
        """Whether the embedded engine is needed: for the evaluation."""
        return self.evaluates


AnyRecipe = Recipe | SftRecipe
SCHEMAS: dict[Kind, type[Recipe] | type[SftRecipe]] = {"train": Recipe, "sft": SftRecipe}


def _evaluates(data: Data, evaluation: Evaluation) -> bool:
    return data.test is not None and bool(evaluation.every or evaluation.at_start or evaluation.at_end)


def dump_recipe(recipe: AnyRecipe) -> str:
    """The recipe as YAML with every key; reading it back gives an equal recipe."""
    return to_yaml(recipe.model_dump(mode="json"))


def recipe_hash(recipe: AnyRecipe) -> str:
    """SHA-256 (64 hex digits) over every key and value: equal recipes have equal hashes, however they were written."""
    canonical = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
