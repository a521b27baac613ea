"""The two recipe schemas, how a recipe is written as YAML and named by a hash. `loading` reads and checks one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from asd_megatron.config.algorithm import AlgorithmSection
from asd_megatron.config.base import Section
from asd_megatron.config.batching import BatchingSection
from asd_megatron.config.checkpoint import CheckpointSection
from asd_megatron.config.data import DataSection
from asd_megatron.config.evaluation import EvaluationSection
from asd_megatron.config.gate import GateSection
from asd_megatron.config.logging import LoggingSection
from asd_megatron.config.model import ModelSection
from asd_megatron.config.optimizer import OptimizerSection
from asd_megatron.config.parallelism import ParallelismSection
from asd_megatron.config.perplexity import PerplexitySection
from asd_megatron.config.precision import PrecisionSection
from asd_megatron.config.privileged import PrivilegedSection
from asd_megatron.config.reward import RewardSection
from asd_megatron.config.rollout import RolloutSection
from asd_megatron.config.run import RunSection, TrainRunSection
from asd_megatron.config.sampling import GenerationSection, SamplingSection
from asd_megatron.config.sft import SftSection
from asd_megatron.config.teacher import TeacherSection
from asd_megatron.config.yaml_text import to_yaml

Kind = Literal["train", "sft"]
WARMUP_STEPS = 5  # the paper's W, and the released code's


class Recipe(Section):
    """The recipe of a `train` run."""

    run: TrainRunSection = TrainRunSection()
    model: ModelSection
    precision: PrecisionSection = PrecisionSection()
    parallelism: ParallelismSection = ParallelismSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    gate: GateSection = GateSection()
    perplexity: PerplexitySection = PerplexitySection()
    privileged: PrivilegedSection = PrivilegedSection()
    teacher: TeacherSection = TeacherSection()
    sampling: SamplingSection = SamplingSection()
    rollout: RolloutSection = RolloutSection()
    evaluation: EvaluationSection = EvaluationSection()
    data: DataSection
    reward: RewardSection = RewardSection()
    optimizer: OptimizerSection = OptimizerSection()
    batching: BatchingSection = BatchingSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()

    @model_validator(mode="before")
    @classmethod
    def _correct_quantized_rollouts(cls, values: Any) -> Any:
        """Quantised servers sample from another distribution than the trainer's: unless the recipe says what to do
        about it, importance weights are truncated."""
        if not isinstance(values, Mapping) or _given(values, "rollout", "quantization") in (None, "none"):
            return values
        algorithm = values.get("algorithm", {})
        if not isinstance(algorithm, Mapping) or "importance_correction" in algorithm:
            return values
        return {**values, "algorithm": {**algorithm, "importance_correction": "truncated"}}

    @property
    def gate_warmup_steps(self) -> int:
        """`gate.warmup_steps`, or its default: 5 for gated conditions without a given `h_warm`, else 0."""
        if self.gate.warmup_steps is not None:
            return self.gate.warmup_steps
        return WARMUP_STEPS if self.algorithm.gated and self.gate.h_warm is None else 0

    @property
    def lambda_warmup_steps(self) -> int:
        """The first steps with lambda 0: those of the gate, or `perplexity.warmup_steps` or its default: 5 without a
        given `target`, else 0."""
        if self.algorithm.lambda_source == "gate":
            return self.gate_warmup_steps
        if self.perplexity.warmup_steps is not None:
            return self.perplexity.warmup_steps
        return WARMUP_STEPS if self.perplexity.target is None else 0

    @property
    def evaluates(self) -> bool:
        """Whether the run measures held-out problems at all."""
        return self.has_evaluation_sets and self.evaluation.is_ever_due

    @property
    def has_evaluation_sets(self) -> bool:
        """Whether there are problems to measure on: `data.test` or `evaluation.sets`."""
        return self.data.test is not None or bool(self.evaluation.sets)

    @property
    def samples_embedded(self) -> bool:
        """Whether the embedded engine is needed: for rollouts, or for the evaluation of a replay."""
        return self.rollout.engine == "embedded" or self.rollout.engine == "replay" and self.evaluates


class SftRecipe(Section):
    """The recipe of a supervised (`sft`) run. `reward`, `evaluation` and `sampling` matter only with `data.test`
    and `evaluation.sets`."""

    run: RunSection = RunSection()
    model: ModelSection
    precision: PrecisionSection = PrecisionSection()
    parallelism: ParallelismSection = ParallelismSection()
    sft: SftSection = SftSection()
    data: DataSection
    evaluation: EvaluationSection = EvaluationSection()
    sampling: GenerationSection = GenerationSection()
    reward: RewardSection | None = Field(None, description="How answers to `data.test` are scored; needed with it.")
    optimizer: OptimizerSection = OptimizerSection()
    batching: BatchingSection = BatchingSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()

    @property
    def evaluates(self) -> bool:
        """Whether the run measures held-out problems at all."""
        return self.has_evaluation_sets and self.evaluation.is_ever_due

    @property
    def has_evaluation_sets(self) -> bool:
        """Whether there are problems to measure on, and rewards: `data.test` or `evaluation.sets`."""
        return self.reward is not None and self.data.test is not None or bool(self.evaluation.sets)

    @property
    def samples_embedded(self) -> bool:
        """Whether the embedded engine is needed: for the evaluation."""
        return self.evaluates


AnyRecipe = Recipe | SftRecipe
SCHEMAS: dict[Kind, type[Recipe] | type[SftRecipe]] = {"train": Recipe, "sft": SftRecipe}


def _given(values: Mapping[str, Any], section: str, key: str) -> Any:
    """The value of a key before validation; None if it is not given."""
    keys = values.get(section)
    return keys.get(key) if isinstance(keys, Mapping) else getattr(keys, key, None)


def dump_recipe(recipe: AnyRecipe) -> str:
    """The recipe as YAML with every key; reading it back gives an equal recipe."""
    return to_yaml(recipe.model_dump(mode="json"))


def recipe_hash(recipe: AnyRecipe) -> str:
    """SHA-256 (64 hex digits) over every key and value: equal recipes have equal hashes, however they were written."""
    return values_hash(recipe.model_dump(mode="json"))


def values_hash(values: Mapping[str, Any]) -> str:
    """`recipe_hash` of a recipe's sections as they were recorded, also by a version with other keys."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()
