"""Section `evaluation`: measuring on held-out problems."""

from __future__ import annotations

from typing import Annotated

import annotated_types as at
from pydantic import Field, StringConstraints

from asd_megatron.config.base import Section, Text

SET_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$"
SetName = Annotated[str, StringConstraints(pattern=SET_NAME)]


class EvaluationSetSection(Section):
    """One set of `evaluation.sets`. A key that is null has the value of the section `evaluation`, of `reward`, or of
    `sampling.max_response_tokens`. `schema`, `fields`: how the file is read, as `data.test_schema`,
    `data.test_fields`."""

    data: Text
    schema: Text | None = None  # type: ignore[assignment]
    fields: dict[str, str] = {}
    samples: Annotated[int, at.Ge(1)] | None = None
    temperature: Annotated[float, at.Ge(0)] | None = None
    top_p: Annotated[float, at.Gt(0), at.Le(1)] | None = None
    top_k: Annotated[int, at.Ge(0)] | None = None
    max_new_tokens: Annotated[int, at.Ge(1)] | None = None
    reward: Text | None = None
    problems: Annotated[int, at.Ge(1)] | None = None


class EvaluationSection(Section):
    """When and how held-out problems, those of `data.test` and of `sets`, are answered (docs/evaluation.md)."""

    every: int = Field(0, ge=0, description="Evaluate after every so many steps; 0: not in between.")
    at_start: bool = Field(True, description="Evaluate before the first step.")
    at_end: bool = Field(True, description="Evaluate after the last step.")
    problems: int | None = Field(
        None, ge=1, description="How many problems of `data.test` and of each set, from its start; null: all."
    )
    samples: int = Field(1, ge=1, description="Responses for each problem; accuracy is the mean over them.")
    temperature: float = Field(0.7, ge=0, description="Sampling temperature; 0 is greedy.")
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus filter; 1 is off.")
    top_k: int = Field(0, ge=0, description="Keep the k likeliest tokens; 0 is off.")
    sets: dict[SetName, EvaluationSetSection] = Field(
        {},
        description=(
            "Further sets by name, such as `{gsm8k: {data: gsm8k_test.jsonl, samples: 8, max_new_tokens: 512, reward:"
            " math}}`: `data` as `data.test`, with `schema` and `fields`; `samples`, `temperature`, `top_p`, `top_k`,"
            " `max_new_tokens`, `reward` (a `reward.name`), `problems` where they differ. Metrics"
            " `evaluation/<set>/...`."
        ),
    )

    @property
    def is_ever_due(self) -> bool:
        """Whether a run evaluates at any step."""
        return bool(self.every or self.at_start or self.at_end)
