"""Continual training (`checkpoint.continual_from`, section 4.4 of the paper): a new run whose weights and optimizer
moments are those of another run's checkpoint.

Everything else begins: step 1, the learning-rate schedule with its warm-up, the data order, the gate and its
calibration (lambda 0 meanwhile), the counts of the guard and of the spike rule, the moving average of the weights,
which starts at the loaded ones. The initial weights of a teacher or of a KL penalty are those of `model.path`, as in
every run. Adam's step count is kept: it corrects the bias of moments that started at 0, and these did not start now.

Only a run of the same stage can be continued: the moments of cross-entropy gradients are of another scale than those of
policy gradients. Precisions of the moments may differ, they are stored in float32; those of the weights may not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from asd_megatron.checkpoint import lineage, training
from asd_megatron.checkpoint.distcp import DistributedCheckpoint
from asd_megatron.checkpoint.huggingface import read_config
from asd_megatron.checkpoint.locate import find_checkpoint
from asd_megatron.checkpoint.manifest import DamagedCheckpoint
from asd_megatron.checkpoint.run_state import RunStateFile
from asd_megatron.config import AnyRecipe, values_hash
from asd_megatron.config.yaml_text import read_yaml
from asd_megatron.errors import UserError
from asd_megatron.models.port import ModelPort
from asd_megatron.models.routing import LoadBalance
from asd_megatron.models.weight_copies import WeightCopies
from asd_megatron.run.sources import model_folder
from asd_megatron.trainer.optimizer import Optimizer

KEY = "checkpoint.continual_from"
# Of config.json: what says nothing about the function that the weights compute.
IGNORED = {
    *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),  # often corrected in a downloaded folder
}


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run has begun from: its folder, step and run, and the hash of that run's recipe (None: not
    known)."""

    checkpoint: str
    step: int
    run: str | None = None
    recipe_hash: str | None = None

    def __str__(self) -> str:
        run = "" if self.run is None else f" of the run {self.run}"
        recipe = "" if self.recipe_hash is None else f", recipe {self.recipe_hash[:12]}"
        return f"weights and moments of {self.checkpoint} (step {self.step}{run}{recipe})"

    def record(self) -> dict[str, Any]:
        """For the run's history."""
        return asdict(self)


def find_origin(recipe: AnyRecipe, stage: str) -> Origin | None:
    """The checkpoint that a new run of the recipe begins from; None without `checkpoint.continual_from`. Raises
    UserError for what is no checkpoint, and for one of another stage, model or kind of optimizer."""
    given = recipe.checkpoint.continual_from
    if given is None:
        return None
    if not Path(given).is_dir():
        form = "give a run folder (runs/NAME: its newest checkpoint) or RUN/checkpoints/step_NNNNNN"
        raise UserError(f"{KEY}: {given} is no folder (from {Path.cwd()}): {form}")
    try:
        checkpoint = Path(os.path.realpath(find_checkpoint(given)))
        stored = RunStateFile.read(checkpoint)
    except UserError as error:
        raise UserError(f"{KEY}: {error}") from None
    of = stored.run_state.get("stage")
    if of != stage:
        raise UserError(
            f"{KEY}: {checkpoint} was made by `asd-megatron {of}`, whose optimizer moments are those of another loss:"
            " give the Hugging Face folder that it exported (RUN/hf/step_NNNNNN) as model.path, and leave the key out"
        )
    if stored.distributed_optimizer != recipe.parallelism.distributed_optimizer:
        raise UserError(
            f"{KEY}: {checkpoint} was written with parallelism.distributed_optimizer"
            f" {str(stored.distributed_optimizer).lower()}: set it so here too"
        )
    source = _recipe(checkpoint)
    _check_model(recipe, checkpoint, source)
    return Origin(
        str(checkpoint), int(stored.run_state["step"]), _name(source), values_hash(source) if source else None
    )


def _recipe(checkpoint: Path) -> Mapping[str, Any]:
    """The recipe of the run RUN/checkpoints/step_NNNNNN; {} where there is none that can be read."""
    try:
        found = read_yaml(checkpoint.parents[1] / "recipe.yaml", "recorded recipe")
    except (UserError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def _name(recipe: Mapping[str, Any]) -> str | None:
    run = recipe.get("run")
    return str(run["name"]) if isinstance(run, dict) and "name" in run else None


def _check_model(recipe: AnyRecipe, checkpoint: Path, source: Mapping[str, Any]) -> None:
    """Raise UserError when the configs of both runs' models differ in a field that both have. Where the other's cannot
    be read any more, `training.load` compares names and shapes of all tensors alone."""
    section = source.get("model")
    path = section.get("path") if isinstance(section, dict) else None
    try:
        theirs = read_config(model_folder(str(path)))
    except (UserError, OSError):
        return
    ours = read_config(model_folder(recipe.model.path))
    differing = [key for key in sorted(ours.keys() & theirs.keys() - IGNORED) if ours[key] != theirs[key]]
    if differing:
        shown = "; ".join(f"{key} {theirs[key]!r:.60}, here {ours[key]!r:.60}" for key in differing[:4])
        raise UserError(
            f"{KEY}: {checkpoint} is of another model than model.path {recipe.model.path} ({shown}): give the"
            f" model.path of its run, {path}"
        )


def load_origin(
    origin: Origin, port: ModelPort, optimizer: Optimizer, copies: WeightCopies | None, balance: LoadBalance | None
) -> None:
    """Load weights and moments, from any layout, and put the schedule at its beginning. Collective. Raises UserError,
    on every rank, for a checkpoint of other tensors or another number format."""
    path = Path(origin.checkpoint)
    _check_format(path, port.dtype)
    try:
        state = training.load(path, port, optimizer.megatron, optimizer.scheduler)
    except DamagedCheckpoint as damage:
        older = ", ".join(map(str, lineage.before(path)[:1])) or "one of another run"
        raise UserError(f"{KEY}: {damage}: copy it again if you have it elsewhere, or give {older}") from None
    optimizer.seek(0)
    if balance is not None:  # of these weights: the auxiliary loss of the first update takes it
        balance.fractions.copy_(torch.tensor(state["expert_load"]))
    if copies is not None:
        copies.begin_average()


def _check_format(checkpoint: Path, dtype: torch.dtype) -> None:
    stored = {
        tensor.dtype
        for key, tensor in DistributedCheckpoint(checkpoint).tensors.items()
        if not key.startswith("optimizer.") and tensor.dtype.is_floating_point
    }
    if stored and dtype not in stored:
        was = ", ".join(sorted(str(one).removeprefix("torch.") for one in stored))
        raise UserError(
            f"{KEY}: the weights of {checkpoint} are {was}, and {str(dtype).removeprefix('torch.')} in this run, where"
            f" master weights and moments would not fit: set model.dtype {was}"
        )


def recorded_origin(events: list[dict[str, Any]]) -> Origin | None:
    """The origin in a run's history; None for a run that began otherwise."""
    found = [event["continual_from"] for event in events if isinstance(event.get("continual_from"), dict)]
    try:
        return Origin(**found[-1]) if found else None
    except TypeError:
        return None
