"""Section `data`: problems (or given responses) and how they become prompts."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from asd_megatron.config.base import Section, Text
from asd_megatron.gym.tasks import MOST_TEST_PROBLEMS


class Data(Section):
    """Problem sets and prompts."""

    train: Text = Field(
        description=(
            "JSONL file of problems, `puzzle:train`, or `reasoning_gym:TASK` (docs/reasoning_gym.md); for the"
            " supervised stage a JSONL file of given responses, or `puzzle:corpus`."
        )
    )
    test: Text | None = Field(
        None,
        description=(
            "JSONL file of held-out problems, `puzzle:test`, or `reasoning_gym:TASK` (the name that `data.train` has,"
            " never its problems); null: no evaluation."
        ),
    )
    reasoning_gym: dict[str, Any] = Field(
        {}, description="Parameters of the reasoning_gym task, such as `{min_terms: 2, max_terms: 4}`."
    )
    test_problems: int = Field(
        500,
        ge=1,
        le=MOST_TEST_PROBLEMS,
        description="How many problems of a reasoning_gym task are held out, whatever `data.test` is.",
    )
    format: Literal["chat", "raw"] = Field(
        "chat", description="`chat`: prompts go through the tokenizer's chat template; `raw`: through `raw_prompt`."
    )
    raw_prompt: Text = Field(
        "{prompt}", description="With `format: raw`, the prompt's text; `{prompt}` stands for the problem."
    )
    system: str | None = Field(None, description="System turn put before chat prompts; null: none.")
    shuffle: bool = Field(True, description="Shuffle the training problems anew each epoch; false: the file's order.")
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="Arguments handed to the chat template, such as `{enable_thinking: false}`."
    )
