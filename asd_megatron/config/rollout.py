"""Section `rollout`: where rollouts come from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from asd_megatron.config.base import Section, Text


class Rollout(Section):
    """The rollout engine."""

    engine: Literal["embedded", "replay"] = Field(
        "embedded",
        description="`embedded`: sample on the training model itself; `replay`: read the dumps of an earlier run.",
    )
    replay_folder: Text | None = Field(None, description="The folder of dumps that `replay` reads: a run's `rollouts`.")
    max_batch_size: int = Field(256, ge=1, description="Responses that a model-parallel group samples at once.")
