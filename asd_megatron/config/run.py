"""Section `run`: a run's name, length, seed and folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import annotated_types as at
from pydantic import BeforeValidator, Field, StringConstraints

from asd_megatron.config.base import Section, Text, to_tuple

Seconds = Annotated[float, at.Ge(1)]


class TimeoutSection(Section):
    """Seconds without progress in each phase of a run; null: no bound."""

    start: Seconds | None = 3600.0
    rollout: Seconds | None = 3600.0
    scoring: Seconds | None = 1800.0
    update: Seconds | None = 1800.0
    checkpoint: Seconds | None = 3600.0
    evaluation: Seconds | None = 3600.0


StepList = Annotated[tuple[Annotated[int, at.Ge(1)], ...], BeforeValidator(to_tuple)]


class RunSection(Section):
    """The run's name, length, seed and folder, in both stages."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.=+-]*$")] = Field(
        "run", description="The run's name; letters, digits and `_ . = + -`."
    )
    folder: Text = Field("runs/{name}", description="The run folder; `{name}` stands for `run.name`.")
    seed: int = Field(
        1234,
        ge=0,
        lt=2**64,
        description="Seed of the sampling noise, the data order and the choice of demonstrations; below 2^64.",
    )
    steps: int = Field(200, ge=1, description="Training steps: batches sampled (or read) and learned from.")
    overwrite: bool = Field(
        False,
        description=(
            "Replace what a run folder holds. An unfinished run with a checkpoint is resumed instead, unless"
            " `checkpoint.resume` is `never`; a run of which `checkpoint.resume` names a checkpoint is not replaced"
            " either. Without it, a folder that holds anything but this run is refused."
        ),
    )

    time_limit: Annotated[float, at.Gt(0)] | Literal["slurm"] | None = Field(
        None,
        description=(
            "Hours after which the run has saved its state and ended; it stops after the last step that leaves time for"
            " a further one as long as the longest so far, for its checkpoint, and two minutes more. `slurm`: the end"
            " of the Slurm job (SLURM_JOB_END_TIME; no limit without it). null: none."
        ),
    )
    lost_rank_timeout: float = Field(
        300.0,
        ge=5,
        description=(
            "Several ranks: seconds without a sign of life of one of them, whose process hangs or whose node or network"
            " is lost, after which the run ends with an error that names it."
        ),
    )
    deterministic: bool = Field(
        False,
        description=(
            "The same bits again from the same recipe, machine and layout: deterministic kernels and collectives in the"
            " trainer, deterministic inference in SGLang servers; slower on GPUs. On a CPU in float32 the embedded"
            " engine's log-probs also equal the trainer's bit for bit. See docs/reliability.md."
        ),
    )
    timeout: TimeoutSection = Field(
        TimeoutSection(),
        description=(
            "By phase, seconds without progress after which the run hangs: it ends with an error that names the rank,"
            " its phase and last operation, and every rank's Python stacks are in `logs/rank_N.log`. Progress is a"
            " micro-batch, a token of a batch, a meeting of the ranks, a tensor read or written; while SGLang servers"
            " start or generate, `rollout` has the bounds. null: none. Keys that are left out keep their defaults."
        ),
    )
    replica_check_every: int = Field(
        10,
        ge=0,
        description=(
            "Several ranks: compare their copies of weights and optimizer state, which must be equal bit for bit,"
            " before the update of every so many steps, and before every checkpoint and export; a difference ends the"
            " run with an error that names tensor and rank (docs/reliability.md). 0: never."
        ),
    )
    stop_when_dead: bool = Field(
        True,
        description=(
            "End the run with an error when its model cannot learn any more: the gradient is 0 in 3 steps in a row, in"
            " which the entropy is the same to the last digits or the advantages are not 0. false: a warning only."
        ),
    )
    profile_steps: StepList | None = Field(
        None,
        description=(
            "Steps of which global rank 0 writes a trace of PyTorch's profiler to `profile/step_NNNNNN_rank_0.json.gz`,"
            " and on CUDA a history of its memory; null: none."
        ),
    )

    @property
    def path(self) -> Path:
        """The run folder with the name filled in, relative to the current directory unless absolute."""
        return Path(self.folder.replace("{name}", self.name))


class TrainRunSection(RunSection):
    """The run of a `train` recipe."""

    dump_rollouts: bool = Field(
        False,
        description="Write every step's rollouts, with their per-token numbers, to `rollouts/step_NNNNNN.parquet`.",
    )
