"""Section `optimizer`: AdamW and the learning-rate schedule."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from asd_megatron.config.base import Section


class OptimizerSection(Section):
    """AdamW, gradient clipping and schedule; one schedule step an optimizer step."""

    learning_rate: float = Field(1e-6, gt=0, description="The learning rate after its warm-up.")
    min_learning_rate: float = Field(0.0, ge=0, description="Where the `linear` and `cosine` schedules end.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Learning-rate schedule after the warm-up."
    )
    warmup_steps: int = Field(
        0, ge=0, description="Optimizer steps over which the learning rate rises linearly from 0."
    )
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay; norms and biases have none.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the gradient's running mean.")
    beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the squared gradient's running mean.")
    epsilon: float = Field(1e-8, gt=0, description="Added to the root in AdamW's denominator.")
    clip_grad: float = Field(1.0, ge=0, description="Largest global L2 norm of the gradient; 0: not clipped.")
