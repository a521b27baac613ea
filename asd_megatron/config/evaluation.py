"""Section `evaluation`: measuring on held-out problems."""

from __future__ import annotations

from pydantic import Field

from asd_megatron.config.base import Section


class EvaluationSection(Section):
    """When and how the held-out problems of `data.test` are answered."""

    every: int = Field(0, ge=0, description="Evaluate after every so many steps; 0: not in between.")
    at_start: bool = Field(True, description="Evaluate before the first step.")
    at_end: bool = Field(True, description="Evaluate after the last step.")
    problems: int | None = Field(None, ge=1, description="How many problems of `data.test`, from its start; null: all.")
    samples: int = Field(1, ge=1, description="Responses for each problem; accuracy is the mean over them.")
    temperature: float = Field(0.7, ge=0, description="Sampling temperature; 0 is greedy.")
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus filter; 1 is off.")
    top_k: int = Field(0, ge=0, description="Keep the k likeliest tokens; 0 is off.")
