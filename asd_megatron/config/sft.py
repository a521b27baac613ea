"""Section `sft`: the supervised stage."""

from __future__ import annotations

from pydantic import Field

from asd_megatron.config.base import Section


class SftSection(Section):
    """Cross-entropy on given responses."""

    sequences_per_step: int = Field(128, ge=1, description="Sequences a step, over all data-parallel ranks.")
