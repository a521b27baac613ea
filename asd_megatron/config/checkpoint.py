"""Section `checkpoint`: what is saved, and how a run resumes."""

from __future__ import annotations

from pydantic import Field

from asd_megatron.config.base import Section, Text


class Checkpoint(Section):
    """Training checkpoints and Hugging Face exports."""

    every: int = Field(
        0, ge=0, description="Save a training checkpoint after every so many steps and after the last one; 0: none."
    )
    keep: int = Field(2, ge=1, description="Newest training checkpoints kept.")
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
