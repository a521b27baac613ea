"""Building this rank's Megatron-Core model chunks from a translated Hugging Face config."""

from __future__ import annotations

import math
from typing import Any

import torch

from asd_megatron.distributed.layout import Layout
from asd_megatron.models.attention import SDPACoreAttention
from asd_megatron.models.compat import hidden_state_model
from asd_megatron.models.family import Family, ModelShape
from asd_megatron.models.norm import RMSNorm


def transformer_config(
    family: Family, shape: ModelShape, layout: Layout, *, dtype: torch.dtype, layers: str, recompute: str
) -> Any:
    """Megatron's TransformerConfig. Dropout is off; fusions that need CUDA are on with Transformer Engine only."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    fused = layers == "te"
    virtual = layout.virtual_pipeline
    wanted: dict[str, Any] = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.kv_heads,
        "kv_channels": shape.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_epsilon,
        "qk_layernorm": shape.qk_norm == "head",
        "gated_linear_unit": True,
        "activation_func": family.activation,
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
        "gradient_accumulation_fusion": False,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": virtual,
        "context_parallel_size": layout.context,
        "sequence_parallel": layout.sequence_parallel,
        "variable_seq_lengths": layout.pipeline > 1,  # packs differ in length
        "moe_token_dispatcher_type": "alltoall",  # the only one that Megatron allows with it, experts or not
        # Freed outputs are still being sent under interleaving (use after free in 0.16 and 0.17).
        "deallocate_pipeline_outputs": False,
        "overlap_p2p_comm": virtual is not None,
        "batch_p2p_comm": virtual is None,
        "calculate_per_token_loss": True,  # gradients are summed, never averaged: denominators are in the loss
        **_recompute(recompute),
    }
    return TransformerConfig(**wanted)  # both tested releases know every key


def _recompute(kind: str) -> dict[str, Any]:
    if kind == "none":
        return {}
    if kind == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}


def build_chunks(config: Any, shape: ModelShape, layout: Layout, *, layers: str, padded_vocab: int) -> list[Any]:
    """This rank's chunks: one, or as many as the layout has virtual stages."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    model_class = hidden_state_model(GPTModel)
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
        chunk = model_class(
            config=config,
            transformer_layer_spec=_block_spec(config, layers, vp_stage),
            vocab_size=padded_vocab,
            max_sequence_length=shape.max_positions,
            pre_process=first,
            post_process=last,
            parallel_output=True,
            share_embeddings_and_output_weights=shape.tied,
            position_embedding_type="rope",
            rotary_base=int(shape.rotaries[0].theta),
            vp_stage=vp_stage,
        )
        inverse = shape.rotaries[0].inverse_frequencies()
        rotary = chunk.rotary_pos_emb.inv_freq
        chunk.rotary_pos_emb.inv_freq = inverse.to(rotary.device, rotary.dtype)
        if torch.cuda.is_available():
            chunk.cuda(torch.cuda.current_device())
        chunks.append(chunk)
    return chunks


def _block_spec(config: Any, layers: str, vp_stage: int | None) -> Any:
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    count = get_num_layers_to_build(config, vp_stage)
    if layers == "te":
        from megatron.core.extensions.transformer_engine import TENorm

        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        return TransformerBlockSubmodules(layer_specs=[spec] * count, layer_norm=TENorm)
    spec = gpt_layer_specs.get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[spec] * count, layer_norm=RMSNorm)


def softmax_scale(config: Any) -> float:
    """The factor of the attention scores: the config's, or 1 / sqrt(head_dim)."""
    return config.softmax_scale or 1.0 / math.sqrt(config.kv_channels)
