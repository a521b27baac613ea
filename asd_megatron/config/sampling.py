"""Section `sampling`: how responses are drawn."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from asd_megatron.config.base import Section, TextList, TokenIdList


class GenerationSection(Section):
    """The limits of a response."""

    max_prompt_tokens: int = Field(2048, ge=1, description="Longest prompt (tokens); a longer one is refused.")
    max_response_tokens: int = Field(1024, ge=1, description="Longest response (tokens); it is cut off there.")
    stop: TextList = Field((), description="Strings that end a response.")
    stop_token_ids: TokenIdList | None = Field(
        None,
        description=(
            "Token ids that end a response; null: the end tokens of the tokenizer, generation_config.json and"
            " config.json."
        ),
    )


class SamplingSection(GenerationSection):
    """How training rollouts are sampled."""

    problems_per_step: int = Field(32, ge=1, description="Problems a step.")
    rollouts_per_problem: int = Field(8, ge=1, description="Responses sampled for each problem: the group.")
    temperature: float = Field(
        1.0, gt=0, description="Sampling temperature; log-probs and entropies are taken at it too."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus filter; training needs 1 (off).")
    top_k: int = Field(0, ge=0, description="Keep the k likeliest tokens; training needs 0 (off).")
    redraw: Literal["never", "no_signal", "equal_rewards"] = Field(
        "never",
        description=(
            "Which groups are discarded, and others drawn of the next problems in their place (dynamic sampling,"
            " docs/options.md). `never`: none (the paper's); `no_signal`: those that teach nothing, with equal rewards"
            " and without a per-token term; `equal_rewards`: all whose rewards are equal (DAPO), although the per-token"
            " term would act on them."
        ),
    )
    redraw_limit: int | None = Field(
        None,
        ge=1,
        description=(
            "Groups drawn in place of others in a step, at most; the step then trains on those it has. null: 9 x"
            " `problems_per_step`."
        ),
    )
