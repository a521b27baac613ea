"""Section `precision`: the number format of linear layers, and how their gradients are accumulated."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from asd_megatron.config.base import Section
from asd_megatron.models.precision import Precision


class PrecisionSection(Section):
    """FP8 with Transformer Engine; everything else computes in `model.dtype`."""

    fp8: Literal["none", "current", "blockwise", "mxfp8"] = Field(
        "none",
        description=(
            "FP8 products in linear layers: `current` one scale a tensor, `blockwise` one for 1 x 128 activations and "
            "128 x 128 weights (CUDA 12.9), `mxfp8` one for 1 x 32 (Blackwell). Needs `model.layers` te. See "
            "docs/fp8.md before turning it on: it adds noise to u."
        ),
    )
    fp8_format: Literal["auto", "hybrid", "e4m3"] = Field(
        "auto",
        description="Format of gradients: `hybrid` e5m2, `e4m3`; `auto`: hybrid with `current` scaling, else e4m3.",
    )
    bf16_first_layers: int = Field(1, ge=0, description="Layers at the beginning that stay in bfloat16 under `fp8`.")
    bf16_last_layers: int = Field(1, ge=0, description="Layers at the end that stay in bfloat16 under `fp8`.")
    fp8_scores: bool = Field(
        False,
        description=(
            "Scoring passes in FP8 too. false: log-probs, u and entropies are bfloat16's, and where a per-token term, "
            "importance weights or a KL penalty read the student's, it is scored before the update (one forward pass "
            "more, with several mini-batches two). See docs/fp8.md."
        ),
    )
    fp8_parameters: bool = Field(
        False,
        description=(
            "Keep and gather the weights themselves in FP8; needs `parallelism.distributed_optimizer`. Exports and "
            "checkpoints stay bfloat16."
        ),
    )
    fp8_probe_every: int = Field(
        0, ge=0, description="Every so many steps, score up to 4,096 response tokens in both formats; 0: never."
    )
    fuse_weight_gradient: bool = Field(
        True,
        description=(
            "Linear layers add their weight gradients to the float32 buffers themselves, where Transformer Engine or "
            "Apex can."
        ),
    )

    @property
    def fp8_passes(self) -> Literal["none", "update", "all"]:
        """Which passes of a training step compute in FP8."""
        if self.fp8 == "none":
            return "none"
        return "all" if self.fp8_scores else "update"

    @property
    def recipe(self) -> Precision:
        return Precision(
            fp8=self.fp8,
            format=self.fp8_format,
            first_layers=self.bf16_first_layers,
            last_layers=self.bf16_last_layers,
            scores=self.fp8_scores,
            parameters=self.fp8_parameters,
        )
