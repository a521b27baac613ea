"""Section `data`: problems (or given responses) and how they become prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from asd_megatron.config.base import Section, Text
from asd_megatron.gym.tasks import MOST_TEST_PROBLEMS


class DataSection(Section):
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
        "{prompt}",
        description=(
            "With `format: raw`, the prompt's text; `{prompt}` stands for the problem. The tokenizer's begin token is"
            " put before it unless it is there, its end token never after it."
        ),
    )
    system: str | None = Field(None, description="System turn put before chat prompts; null: none.")
    shuffle: bool = Field(
        True, description="Visit the training problems in a new order each epoch; false: the file's order."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {},
        description=(
            "Variables of the chat template, such as `{enable_thinking: false}`; `yes`, `no`, `on` and `off` are"
            " refused: write true or false."
        ),
    )


_BOOLEANS = {"yes": "true", "y": "true", "on": "true", "no": "false", "n": "false", "off": "false"}


def texts_for_booleans(values: Mapping[str, Any], key: str) -> Iterator[str]:
    """What is wrong with values such as `no`, which is text in YAML 1.2 and so true in a template; `key` names them."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from texts_for_booleans(value, f"{key}.{name}")
        elif isinstance(value, str):
            meant = _BOOLEANS.get(value.lower(), value.lower())
            if meant in ("true", "false"):
                yield f"{key}: {name} is the text {value!r}, which a template takes for true: write {name}: {meant}"
