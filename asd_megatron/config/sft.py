"""Section `sft`: the supervised stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from asd_megatron.config.base import Section


class SftSection(Section):
    """Cross-entropy on given responses."""

    sequences_per_step: int = Field(128, ge=1, description="Sequences a step, over all data-parallel ranks.")
    loss_on: Literal["all", "last"] = Field(
        "all",
        description=(
            "Which turns of the assistant are learned in a conversation of several: `all`, or the `last`, for chat"
            " templates that write earlier turns in another way (without their thinking)."
        ),
    )
