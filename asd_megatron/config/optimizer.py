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
    moments: Literal["float32", "bfloat16"] = Field(
        "float32",
        description=(
            "Number format of Adam's two moments. `bfloat16` (Transformer Engine's Adam, distributed optimizer, model"
            " in bfloat16, decays up to 0.99) also keeps of the master weights only what the model's weights lack: 6 in"
            " place of 12 bytes a parameter (docs/scaling.md)."
        ),
    )
    offload: Literal["none", "host"] = Field(
        "none",
        description=(
            "`host`: moments and master weights are in host memory, where the update is computed (distributed"
            " optimizer, model in bfloat16)."
        ),
    )
    grad_spike: Literal["none", "clip", "skip"] = Field(
        "none",
        description=(
            "What becomes of an update whose gradient norm is a spike: above `grad_spike_factor` times the 90% quantile"
            " of the last 100 updates' norms above 0, from 20 on (docs/reliability.md). `clip`: its gradient is scaled"
            " to that limit; `skip`: it is not applied, and counts as one of the skipped updates of which the fourth in"
            " a row ends the run."
        ),
    )
    grad_spike_factor: float = Field(
        3.0, ge=1, description="The limit of a spike as a multiple of the 90% quantile of the last gradient norms."
    )
