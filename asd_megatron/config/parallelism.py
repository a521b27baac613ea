"""Section `parallelism`: how many ranks, and what each holds."""

from __future__ import annotations

import math

from pydantic import Field

from asd_megatron.config.base import Section


class ParallelismSection(Section):
    """The layout. Ranks needed: tensor x pipeline x context x data."""

    tensor: int = Field(1, ge=1, description="Tensor-parallel size: ranks that each layer is divided over.")
    pipeline: int = Field(1, ge=1, description="Pipeline-parallel size: stages that the layers are divided into.")
    virtual_pipeline: int | None = Field(
        None,
        ge=1,
        description="Chunks of layers a pipeline stage holds (interleaved schedule); null: one, not interleaved.",
    )
    context: int = Field(1, ge=1, description="Context-parallel size: ranks that each sequence is divided over.")
    data: int | None = Field(
        None,
        ge=1,
        description=(
            "Data-parallel size; null: ranks divided by the other sizes. `asd-megatron train` then uses all GPUs that "
            "no SGLang server has, or as few ranks as the other sizes allow on a machine without GPUs."
        ),
    )
    expert: int = Field(
        1,
        ge=1,
        description=(
            "Expert-parallel size of a mixture of experts: ranks that each layer's experts are divided over, out of a "
            "pipeline stage's tensor x context x data ranks."
        ),
    )
    sequence_parallel: bool = Field(
        False, description="Divide activations between the layers over the tensor-parallel ranks as well."
    )
    distributed_optimizer: bool = Field(False, description="Divide the optimizer's state over the data-parallel ranks.")
    overlap_grad_reduce: bool = Field(
        False, description="Reduce gradients over data-parallel ranks during the backward pass."
    )

    @property
    def model_parallel(self) -> int:
        """Ranks that hold one copy of the model and one part of the batch: tensor x pipeline x context."""
        return self.tensor * self.pipeline * self.context

    @property
    def ranks(self) -> int:
        """Ranks that the layout needs: the model-parallel size times `data`, or without it the fewest data-parallel
        ranks with which `expert` divides the ranks of a stage: tensor 2 and expert 8 need data 4."""
        stage = self.tensor * self.context
        return self.model_parallel * (self.data or self.expert // math.gcd(self.expert, stage))
