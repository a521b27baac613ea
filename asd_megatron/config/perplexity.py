"""Section `perplexity`: lambda from the teacher's perplexity."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from asd_megatron.config.base import Section


class PerplexitySection(Section):
    """With `algorithm.lambda_source: teacher_perplexity`, lambda of a response whose teacher perplexity is P:
    clip(`lambda_0` x `alpha` x log(clip(P / target, 0.5, 3)), `lambda_min`, `algorithm.lambda_max`). The defaults are
    the released code's."""

    warmup_steps: int | None = Field(
        None,
        ge=0,
        description=(
            "First steps with lambda 0, in which the target is measured; null: 5, or 0 with `perplexity.target`."
        ),
    )
    target: float | None = Field(
        None,
        gt=1,
        description="The target perplexity, given instead of measured; null: measured in the warm-up.",
    )
    target_offset: float = Field(
        0.1,
        ge=0,
        description="The target is the warm-up's median perplexity minus this, at least 1.01.",
    )
    target_ratio: float | None = Field(
        None,
        gt=0,
        description="The target is this times the warm-up's median, at least 1.01; null: by `target_offset`.",
    )
    lambda_0: float = Field(0.1, gt=0, description="Scale of lambda.")
    alpha: float = Field(2.0, gt=0, description="Slope of lambda in the logarithm of the perplexity.")
    lambda_min: float = Field(-0.02, description="Smallest lambda; the largest is `algorithm.lambda_max`.")
    cutoff: float = Field(3.0, gt=1, description="A response with a larger perplexity has lambda 0.")
    scope: Literal["response", "batch"] = Field(
        "response",
        description="A lambda for each response, or one for the batch from the mean of its responses' logarithms.",
    )
    shift: Literal["none", "negative", "always"] = Field(
        "none",
        description=(
            "Subtract the mean lambda of the responses within `cutoff`: never, where it is negative, or always."
        ),
    )
