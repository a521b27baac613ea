"""Section `model`: which model is trained and how its layers are built."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from asd_megatron.config.base import Section, Text


class ModelSection(Section):
    """The model to start from."""

    path: Text = Field(description="Folder of the Hugging Face model to start from: config, safetensors, tokenizer.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Number format of weights and activations; `auto`: bfloat16 on CUDA, float32 on CPU."
    )
    layers: Literal["auto", "te", "local"] = Field(
        "auto",
        description=(
            "Layer implementation: `te` Transformer Engine (CUDA, bfloat16), `local` Megatron-Core's own with PyTorch "
            "attention; `auto`: `te` on CUDA in bfloat16 where it can be imported, else `local`."
        ),
    )
    attention_backend: Literal["auto", "flash", "fused"] = Field(
        "auto",
        description=(
            "Which attention Transformer Engine may choose: FlashAttention (`flash`), cuDNN's (`fused`) or either "
            "(`auto`). Its unfused attention is never chosen. Only `auto` where FlexAttention is used in its place "
            "(`batching.share_prefixes`)."
        ),
    )
    recompute: Literal["none", "mlp", "full"] = Field(
        "none",
        description=(
            "Activations computed again in the backward pass to save memory: `mlp` those of each layer's MLP (of "
            "experts, which need `model.layers` te, their activation function), `full` complete layers."
        ),
    )
    recompute_layers: int | None = Field(
        None,
        ge=1,
        description="With `recompute` full: how many layers of each pipeline stage, from its first on; null: all.",
    )
    auxiliary_loss: float | None = Field(
        None,
        ge=0,
        description=(
            "Coefficient of the load-balancing loss of a mixture of experts; null: the model's own "
            "(`router_aux_loss_coef`), 0: none."
        ),
    )
