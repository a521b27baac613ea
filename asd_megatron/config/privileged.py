"""Section `privileged`: what the teacher is shown."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from asd_megatron.config.base import Section, Text
from asd_megatron.data.templates import PAPER_WORDING


class PrivilegedSection(Section):
    """The privileged context: a verified solution and the feedback on the student's own response."""

    max_solution_tokens: int = Field(
        8192,
        ge=1,
        description="A longer demonstration (tokens) keeps its head (a quarter) and tail around an ellipsis.",
    )
    min_solution_tokens: int = Field(
        128,
        ge=0,
        description=(
            "The demonstration shrinks to fit `max_teacher_tokens`, but not below this (tokens): then the rollout has"
            " no context and is counted."
        ),
    )
    max_teacher_tokens: int | None = Field(
        None,
        ge=1,
        description="Limit (tokens) of the teacher's prompt and response together; null: the model's positions.",
    )
    when_no_solution: Literal["mask", "reference_answer", "feedback_only"] = Field(
        "mask",
        description=(
            "For a rollout without a verified solution: no context (u is 0), the final answer alone, or the feedback"
            " alone."
        ),
    )
    use_group: bool = Field(
        True,
        description="Show verified solutions of the rollout's group; false: the data's alone (`use_reference`).",
    )
    use_reference: bool = Field(
        True,
        description="Where the group has no verified solution, show the data's; false: solutions of the group alone.",
    )
    exclude_self: bool = Field(
        True, description="A rollout is never its own demonstration; false: its own success may be drawn too."
    )
    demonstrations_per_group: int | None = Field(
        None,
        ge=1,
        description=(
            "Verified solutions of a group that its rollouts draw from (plus one, for a rollout whose own is the only "
            "one). With few of them teacher prompts are equal, and `batching.share_prefixes` computes each once: 1"
            " saves much of the teacher's scoring pass when solutions are long. null: all, each rollout draws its own."
        ),
    )
    strip_thinking: bool = Field(False, description="Cut `<think>` blocks from demonstrations.")
    success_threshold: float = Field(1.0, description="A rollout with at least this reward is a verified solution.")
    chat_template: Text = Field(
        PAPER_WORDING,
        description=(
            "With `data.format: chat`, the teacher's last user turn: `{prompt}` stands for the student's, `{solution}`"
            " for the demonstration, `{feedback}` for the assessment. A paragraph whose value is missing is left out;"
            " with neither value the turn is the student's. The default is the paper's wording."
        ),
    )
    raw_template: Text | None = Field(
        None,
        description=(
            "With `data.format: raw`, the teacher's complete prompt, with `{prompt}`, `{solution}` and `{feedback}`; a"
            " line whose value is missing is left out. null: `data.raw_prompt` with the paper's wording in place of"
            " `{prompt}`."
        ),
    )
