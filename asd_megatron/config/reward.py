"""Section `reward`: how a response is scored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from asd_megatron.config.base import Section


class RewardSection(Section):
    """The verifier that scores responses."""

    name: Annotated[
        str,
        StringConstraints(
            pattern=r"^(math|exact|puzzle|reasoning_gym|([A-Za-z_]\w*(\.[A-Za-z_]\w*)*|[^:\n]+\.py):[A-Za-z_]\w*)$"
        ),
    ] = Field(
        "math",
        description=(
            "`math`: math-verify on the final answer; `exact`: equal text; `puzzle`: the search puzzle;"
            " `reasoning_gym`: the reasoning_gym task's own verifier; or your own function as"
            " `package.module:function` or `path/to/file.py:function`."
        ),
    )
    timeout_seconds: float = Field(
        5.0,
        gt=0,
        description=(
            "`math` and `reasoning_gym`: longest processor time (seconds) for one answer; then it scores 0 and counts"
            " in `reward/timeouts`."
        ),
    )
    wall_timeout_seconds: float | None = Field(
        None,
        gt=0,
        description=(
            "Longest wall time (seconds) for one answer, or for one call of your own function; null: 10 times"
            " `timeout_seconds`. At least `timeout_seconds`."
        ),
    )
    workers: int = Field(2, ge=1, description="Processes in which `math` and `reasoning_gym` judge in parallel.")
    truncated: Literal["zero", "judge"] = Field(
        "zero",
        description=(
            "A response that the token budget cut off: `zero`, it scores 0 without being judged and counts in"
            " `reward/truncated`; `judge`, it is scored like any other."
        ),
    )
    on_error: Literal["stop", "zero"] = Field(
        "stop",
        description=(
            "When your own function raises, exits, exceeds its time or returns no number: stop the run, or score 0,"
            " count and log it."
        ),
    )
