"""Section `batching`: how sequences become micro-batches."""

from __future__ import annotations

from pydantic import Field

from asd_megatron.config.base import Section


class Batching(Section):
    """Packing."""

    tokens_per_microbatch: int = Field(
        16384,
        ge=1,
        description="Tokens of packed sequences a micro-batch; a single longer sequence gets a micro-batch of its own.",
    )
