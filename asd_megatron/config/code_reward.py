"""The mapping `reward.code`: the sandbox of programs, and how their tests make a reward."""

from __future__ import annotations

from pydantic import Field

from asd_megatron.config.base import Section, Text


class CodeSection(Section):
    """How programs are run and rewarded; what each key means is said at `RewardSection.code`."""

    python: Text | None = None
    memory_mb: int = Field(1024, ge=64)
    processes: int = Field(16, ge=1)
    file_mb: int = Field(64, ge=1)
    output_kb: int = Field(4096, ge=1)
    max_tests: int | None = Field(None, ge=1)
    max_exhausted: int | None = Field(3, ge=1)
    all_or_nothing: bool = False
