"""Recipes: the two schemas, how one is read, saved and named by a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from pydantic import Field, ValidationError

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
from asd_megatron.config.overrides import apply_overrides
from asd_megatron.config.parallelism import Parallelism
from asd_megatron.config.privileged import Privileged
from asd_megatron.config.refusals import explain
from asd_megatron.config.reward import Reward
from asd_megatron.config.rollout import Rollout
from asd_megatron.config.run import Run, RunBase
from asd_megatron.config.sampling import Generation, Sampling
from asd_megatron.config.sft import Sft
from asd_megatron.config.yaml_text import read_yaml, to_yaml
from asd_megatron.errors import UserError

Kind = Literal["train", "sft"]
WARMUP_STEPS = 5  # the paper's W


LONG_RESPONSES = 4096
"""Tokens of a response from which on a group shares its demonstration, unless the recipe says otherwise."""


class Recipe(Section):
    """Everything a `train` run is."""

    run: Run = Run()
    model: Model
    parallelism: Parallelism = Parallelism()
    algorithm: Algorithm = Algorithm()
    gate: Gate = Gate()
    privileged: Privileged = Privileged()
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
    """Everything a supervised (`sft`) run is. `reward`, `evaluation` and `sampling` matter only with `data.test`."""

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


@overload
def make_recipe(
    values: Mapping[str, Any], overrides: Sequence[str] = (), kind: Literal["train"] = "train", source: str = "recipe"
) -> Recipe: ...
@overload
def make_recipe(
    values: Mapping[str, Any], overrides: Sequence[str] = (), *, kind: Literal["sft"], source: str = "recipe"
) -> SftRecipe: ...
@overload
def make_recipe(
    values: Mapping[str, Any], overrides: Sequence[str] = (), kind: Kind = "train", source: str = "recipe"
) -> AnyRecipe: ...
def make_recipe(
    values: Mapping[str, Any], overrides: Sequence[str] = (), kind: Kind = "train", source: str = "recipe"
) -> AnyRecipe:
    """A checked recipe from nested values (section -> key -> value) and `--section.key value` overrides.

    Raises UserError, naming `source`, for unknown keys and wrong types, and for combinations that cannot work on any
    machine; `check_world`, `check_devices` and `check_model` look at the ranks, the machine and the model.
    """
    from asd_megatron.config.checks import check_recipe  # it names our types

    schema = SCHEMAS[kind]
    merged = apply_overrides(dict(values), overrides, schema)
    merged = {name: {} if section is None and name != "reward" else section for name, section in merged.items()}
    try:
        recipe = schema.model_validate(merged)
    except ValidationError as error:
        raise UserError(f"{source}:{explain(error, schema)}") from None
    check_recipe(recipe)
    return recipe


@overload
def load_recipe(path: str | Path, overrides: Sequence[str] = (), kind: Literal["train"] = "train") -> Recipe: ...
@overload
def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, kind: Literal["sft"]) -> SftRecipe: ...
@overload
def load_recipe(path: str | Path, overrides: Sequence[str] = (), kind: Kind = "train") -> AnyRecipe: ...
def load_recipe(path: str | Path, overrides: Sequence[str] = (), kind: Kind = "train") -> AnyRecipe:
    """Read a YAML recipe, put the overrides in and check it. Paths in it are relative to the current directory.

    Raises UserError for what `read_yaml` and `make_recipe` refuse.
    """
    values = read_yaml(Path(path), "recipe")
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"recipe {path}: expected sections such as `model:`, found {type(values).__name__}")
    return make_recipe({str(name): section for name, section in values.items()}, overrides, kind, f"recipe {path}")


def dump_recipe(recipe: AnyRecipe) -> str:
    """The recipe as YAML with every key; reading it back gives an equal recipe."""
    return to_yaml(recipe.model_dump(mode="json"))


def recipe_hash(recipe: AnyRecipe) -> str:
    """SHA-256 (64 hex digits) over every key and value: equal recipes have equal hashes, however they were written."""
    canonical = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
