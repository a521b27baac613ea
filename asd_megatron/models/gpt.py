"""Building this rank's Megatron-Core model chunks from a translated Hugging Face config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from asd_megatron.distributed.layout import Layout
from asd_megatron.errors import UserError
from asd_megatron.models import activation, te
from asd_megatron.models.compat import building_head_norms, hidden_state_model
from asd_megatron.models.family import Family, ModelShape
from asd_megatron.models.layers import CoreAttention, layer_specs, norm_class
from asd_megatron.models.precision import BFLOAT16, Precision


@dataclass(frozen=True)
class Recompute:
    """Which activations are computed again in the backward pass: none, those of each layer's MLP (`mlp`; of experts
    their activation function), or complete layers (`full`; `layers`: the first so many of each pipeline stage, None:
    all)."""

    kind: Literal["none", "mlp", "full"] = "none"
    layers: int | None = None


NO_RECOMPUTE = Recompute()


@dataclass(frozen=True)
class Implementation:
    """How a model's layers are computed.

    Attributes:
        layers: `te` or `local`.
        attention: `flex`, which takes packs with shared prefixes whatever the layers, or `own`, that of `layers`.
        attention_backend: which of Transformer Engine's attentions may be chosen.
        precision: the FP8 recipe.
        fuse_weight_gradient: whether weight gradients are added to the float32 buffers by the layers themselves, where
            Transformer Engine or Apex can.
    """

    layers: Literal["te", "local"] = "local"
    attention: CoreAttention = "own"
    attention_backend: Literal["auto", "flash", "fused"] = "auto"
    recompute: Recompute = NO_RECOMPUTE
    precision: Precision = BFLOAT16
    fuse_weight_gradient: bool = True


def transformer_config(
    family: Family, shape: ModelShape, layout: Layout, *, dtype: torch.dtype, how: Implementation
) -> Any:
    """Megatron's TransformerConfig. Dropout is off; fusions that need CUDA are on with Transformer Engine only."""
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import TransformerConfig

    fused = how.layers == "te"
    virtual = layout.virtual_pipeline
    exact = torch.are_deterministic_algorithms_enabled()
    wanted: dict[str, Any] = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.kv_heads,
        "kv_channels": shape.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_epsilon,
        "qk_layernorm": shape.qk_norm == "head",  # their gradients are summed over tensor-parallel ranks
        "add_qkv_bias": shape.qkv_bias,
        "gated_linear_unit": True,
        "activation_func": activation.deterministic(family.activation) if exact else family.activation,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "init_method_std": shape.initializer_range,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "perform_initialization": False,  # every weight comes from a checkpoint, and the strict gate checks it
        "attention_softmax_in_fp32": True,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": fused,
        "bias_activation_fusion": fused,
        "apply_rope_fusion": fused,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": how.fuse_weight_gradient and te.apex_fuses_weight_gradients(),
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": virtual,
        "context_parallel_size": layout.context,
        "sequence_parallel": layout.sequence_parallel,
        "variable_seq_lengths": layout.pipeline > 1,  # packs differ in length: `trainer.transfers`
        "moe_token_dispatcher_type": "alltoall",  # the only one that Megatron allows with it, experts or not
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": 1,
        # Freed outputs are still being sent under interleaving (use after free in 0.16 and 0.17).
        "deallocate_pipeline_outputs": False,
        "overlap_p2p_comm": virtual is not None,
        "batch_p2p_comm": virtual is None,
        # A wait for the device after every transfer, against a fault of batch_isend_irecv that PyTorch 1.13 repaired.
        "batch_p2p_sync": False,
        "calculate_per_token_loss": True,  # gradients are summed, never averaged: denominators are in the loss
        "deterministic_mode": exact,
        "attention_backend": AttnBackend[how.attention_backend],
        **how.precision.model_keys(),
        **_recompute(how.recompute, shape),
        **_experts(shape, fused),
        **(_windows(shape) if fused and how.attention == "own" else {}),  # our attention has its own in the spec
    }
    return TransformerConfig(**wanted)  # both tested releases know every key


def _experts(shape: ModelShape, fused: bool) -> dict[str, Any]:
    experts = shape.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn,
        "moe_router_topk": experts.per_token,
        # The softmax of the chosen logits alone is that of all logits, divided by the sum over the chosen ones.
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",  # the auxiliary loss is `models.routing`'s
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": fused,
        "moe_permute_fusion": fused,
    }


def _windows(shape: ModelShape) -> dict[str, Any]:
    """Megatron knows one window, and which layers have it (1) or attend to everything (0)."""
    windows = [kind.window for kind in shape.attention]
    sizes = {w for w in windows if w is not None}
    if not sizes:
        return {}
    if len(sizes) > 1:
        raise UserError("layers with different sliding windows need model.layers local: Megatron-Core knows one window")
    return {"window_size": (sizes.pop() - 1, 0), "window_attn_skip_freq": [int(w is not None) for w in windows]}


def _recompute(recompute: Recompute, shape: ModelShape) -> dict[str, Any]:
    if recompute.kind == "none":
        return {}
    if recompute.kind == "mlp":
        module = "mlp" if shape.experts is None else "moe_act"
        return {"recompute_granularity": "selective", "recompute_modules": [module]}
    method, count = ("uniform", 1) if recompute.layers is None else ("block", recompute.layers)
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": count}


def build_chunks(
    config: Any, shape: ModelShape, layout: Layout, *, how: Implementation, padded_vocab: int
) -> list[Any]:
    """This rank's chunks: one, or as many as the layout has virtual stages."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    model_class = hidden_state_model(GPTModel)
    specs = layer_specs(shape, how.layers, layout.tensor, how.attention)
    stages = layout.virtual_pipeline or 1
    chunks = []
    for stage in range(stages):
        vp_stage = None
        first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        if layout.virtual_pipeline:
            vp_stage = stage
            parallel_state.set_virtual_pipeline_model_parallel_rank(stage)
            first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
            last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
        with building_head_norms(config, shape.qk_norm != "none"):
            chunk = model_class(
                config=config,
                transformer_layer_spec=_block_spec(config, specs, how.layers, vp_stage),
                vocab_size=padded_vocab,
                max_sequence_length=shape.max_positions,
                pre_process=first,
                post_process=last,
                parallel_output=True,
                share_embeddings_and_output_weights=shape.tied,
                position_embedding_type="none",  # every micro-batch brings its rotation angles (`ModelPort.forward`)
                vp_stage=vp_stage,
            )
        if torch.cuda.is_available():
            chunk.cuda(torch.cuda.current_device())
        chunks.append(chunk)
    return chunks


def _block_spec(config: Any, specs: list[Any], layers: str, vp_stage: int | None) -> Any:
    """The spec of one chunk: its layers out of those of the complete model."""
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    first = get_transformer_layer_offset(config, vp_stage)
    mine = specs[first : first + get_num_layers_to_build(config, vp_stage)]
    return TransformerBlockSubmodules(layer_specs=mine, layer_norm=norm_class(layers))
