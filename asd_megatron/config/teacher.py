"""Section `teacher`: the weights that the privileged sequences are scored with."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from asd_megatron.config.base import Section


class TeacherSection(Section):
    """The weights of the teacher (docs/teachers.md). What it is shown is the section `privileged`."""

    weights: Literal["live", "initial", "ema"] = Field(
        "live",
        description=(
            "`live`: the trained weights themselves (the paper's); `initial`: the weights of `model.path`,"
            " throughout the run; `ema`: an exponential moving average of the trained weights, moved after every"
            " applied update. The last two keep a copy in host memory."
        ),
    )
    ema_rate: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="With `ema`: the weight of the trained weights in each step of the average (1 minus the decay).",
    )
