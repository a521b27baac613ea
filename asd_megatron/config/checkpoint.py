"""Section `checkpoint`: what is saved, and how a run resumes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from asd_megatron.config.base import Section, Text, to_tuple

ALL = "all"


def _to_keys(value: Any) -> Any:
    """One key needs no list around it."""
    return (value,) if isinstance(value, str) else to_tuple(value)


KeyList = Annotated[tuple[Text, ...], BeforeValidator(_to_keys)]


class CheckpointSection(Section):
    """Training checkpoints and Hugging Face exports."""

    every: int = Field(
        20,
        ge=0,
        description=(
            "Save a training checkpoint after every so many steps and after the last one. It takes 14 bytes a parameter"
            " in bfloat16 and 12 to 16 in float32, and `keep` + 1 are on the disk while one is written. 0: none, not"
            " even at the end; a run that stops then starts from step 1."
        ),
    )
    keep: int = Field(
        2,
        ge=1,
        description=(
            "Newest training checkpoints kept. After resuming from an older one, the first save also removes those of"
            " the steps after it, which belong to the branch that was left."
        ),
    )
    async_save: bool = Field(
        False,
        description=(
            "Write training checkpoints while training goes on: each rank copies its part to host memory (pinned on"
            " GPUs) and a thread writes it; `latest` names the checkpoint once every rank's part is written. One is in"
            " flight at a time, and the end of the run waits for it. Takes host memory for a rank's part, until the run"
            " ends; where a rank lacks it, the checkpoint is written while training waits, with a warning."
        ),
    )
    resume: Text = Field(
        "auto",
        description=(
            "`auto`: resume from the run folder's newest checkpoint, if any; `never`: start from step 1; or the folder"
            " of a checkpoint. One of this run: return to it, once; the same command started again continues from the"
            " newest checkpoint, even when the named one was removed since. To return a second time, name another"
            " checkpoint of the run, or start from this one under another `run.name`. One of another run: a new run"
            " folder starts from it, and resumes from its own newest checkpoint when the same command is started again."
        ),
    )
    continual_from: Text | None = Field(
        None,
        description=(
            "Start a new run from another run's checkpoint (RUN, its newest; or RUN/checkpoints/step_NNNNNN), such as"
            " AntiSD from one of GRPO: weights and optimizer moments are kept; steps, learning-rate schedule, data"
            " order and the gate's calibration begin anew (docs/reliability.md). Any layout; the same model and stage."
            " Once this run has a checkpoint of its own, it resumes from that. null: from `model.path`."
        ),
    )
    accept_changes: KeyList = Field(
        (),
        description=(
            "Recipe keys that may differ from those of the run that is resumed in its folder, or `all`. Keys that"
            " decide what is trained (condition, gate, privileged prompts, model, data, reward, seed, sampling,"
            " batch sizes) are refused otherwise. `history.jsonl` records every change."
        ),
    )
    export_every: int = Field(
        0, ge=0, description="Write a Hugging Face folder after every so many steps; 0: none in between."
    )
    export_at_end: bool = Field(True, description="Write a Hugging Face folder after the last step.")
    shard_bytes: int = Field(
        4 << 30,
        ge=1 << 20,
        description=(
            "Bytes of weights in one safetensors file of an exported model, at least 1 MiB; a model that needs several"
            " gets an index. A larger tensor has a file of its own. Global rank 0 holds one file's tensors in host"
            " memory while it exports."
        ),
    )
