"""Section `checkpoint`: what is saved, and how a run resumes."""

from __future__ import annotations

from pydantic import Field

from asd_megatron.config.base import Section, Text


class Checkpoint(Section):
    """Training checkpoints and Hugging Face exports."""

    every: int = Field(
        20,
        ge=0,
        description=(
            "Save a training checkpoint after every so many steps and after the last one. It takes 14 bytes a parameter"
            " in bfloat16 and 12 to 16 in float32, and `keep` + 1 are on the disk while one is written. 0: none, not"
            " even at the end; a run that stops then starts anew."
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
    resume: Text = Field(
        "auto",
        description=(
            "`auto`: resume from the run folder's newest checkpoint, if any; `never`: start afresh; or the folder of a"
            " checkpoint, this run's or another's."
        ),
    )
    export_every: int = Field(
        0, ge=0, description="Write a Hugging Face folder after every so many steps; 0: none in between."
    )
    export_at_end: bool = Field(True, description="Write a Hugging Face folder after the last step.")
