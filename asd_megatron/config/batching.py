"""Section `batching`: how sequences become micro-batches."""

from __future__ import annotations

from pydantic import Field

from asd_megatron.config.base import Section


class BatchingSection(Section):
    """Packing."""

    tokens_per_microbatch: int = Field(
        16384,
        ge=1,
        description="Tokens of packed sequences a micro-batch; a single longer sequence gets a micro-batch of its own.",
    )
    share_prefixes: bool | None = Field(
        None,
        description=(
            "A prefix that several sequences of a micro-batch share (a group's prompt, worked examples, a "
            "demonstration) is computed once for all of them; the results are the same. null: wherever it can be, with "
            "`parallelism.context` 1. On a GPU in bfloat16 FlexAttention then attends, also in place of Transformer "
            "Engine's attention; false keeps that."
        ),
    )
