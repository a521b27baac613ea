"""What fields of a `config.json` mean to families that do not read them: nothing, or another model."""

from __future__ import annotations

import re

from asd_megatron.models.hf_config import Fields, warn_once

OFF: tuple[object, ...] = (False, [], {})  # and 0, which equals False
ONE: tuple[object, ...] = (1, False)
ONLY_NULL: tuple[object, ...] = ()

OTHER_PARTS = "such parts beside the decoder's attention and MLP are not supported"

# Fields that change what some model of transformers (or an engine) computes, each with the values, beside null, with
# which it does not. A family that reads one of them decides for itself.
CHANGES: tuple[tuple[str, dict[str, tuple[object, ...]]], ...] = (
    (
        "quantized weights cannot be trained; use a model without",
        dict.fromkeys(("quantization_config", "quantization", "compression_config"), ONLY_NULL),
    ),
    (
        "only silu (SwiGLU) is supported",
        dict.fromkeys(("hidden_act", "hidden_activation", "mlp_hidden_act"), ("silu",)),
    ),
    (
        "projections and norms with a bias, other than the family's own, are not supported",
        dict.fromkeys(
            (
                "add_bias_linear",
                "attention_bias",
                "attention_out_bias",
                "bias",
                "lm_head_bias",
                "mlp_bias",
                "norm_bias",
                "o_proj_bias",
                "projectors_bias",
                "qkv_bias",
                "use_bias",
                "use_qkv_bias",
            ),
            OFF,
        ),
    ),
    (
        "scaled embeddings, residuals, attention or logits are not supported",
        {
            **dict.fromkeys(
                (
                    "attention_in_multiplier",
                    "attention_out_multiplier",
                    "embedding_multiplier",
                    "embedding_scale",
                    "key_multiplier",
                    "lm_head_multiplier",
                    "logit_scale",
                    "logits_scaling",
                    "residual_multiplier",
                    "scale_emb",
                ),
                ONE,
            ),
            **dict.fromkeys(
                ("mup_enabled", "scale_attn_by_inverse_layer_idx", "scale_embedding", "use_mup", "rescale_every"), OFF
            ),
            **dict.fromkeys(
                (
                    "attention_multiplier",
                    "attention_value_scale",
                    "attn_scale",
                    "dim_model_base",
                    "logits_mup_width_multiplier",
                    "mlp_multipliers",
                    "query_pre_attn_scalar",
                    "scale_depth",
                ),
                ONLY_NULL,
            ),
            "scale_attn_weights": (True,),
        },
    ),
    (
        "capped or clipped numbers are not supported",
        dict.fromkeys(
            (
                "attn_logit_softcapping",
                "clip_qkv",
                "final_logit_softcapping",
                "gate_soft_cap",
                "logits_soft_cap",
                "mlp_gate_softcap",
                "mlp_up_softcap",
                "moe_router_logit_softcapping",
                "output_logit_soft_cap",
                "qk_l2_clip_threshold",
                "rel_l2_clip_threshold",
                "swiglu_alpha",
                "swiglu_limit",
            ),
            OFF,
        ),
    ),
    (
        "norms in other places than the family's own are not supported",
        dict.fromkeys(
            (
                "_remove_final_layer_norm",
                "apply_residual_connection_post_layernorm",
                "qk_layernorm",
                "use_post_norm",
                "use_qk_norm",
                "use_sandwich_norm",
            ),
            OFF,
        ),
    ),
    (
        "other position embeddings than RoPE on complete heads, in every layer, are not supported",
        {
            **dict.fromkeys(
                (
                    "alibi",
                    "attn_temperature_tuning",
                    "floor_scale",
                    "layer_rope_theta",
                    "log_scaling_alpha",
                    "no_rope_layer_interval",
                    "no_rope_layers",
                    "nope_layer_interval",
                    "rope_interleave",
                    "rope_interleaved",
                    "rope_local_base_freq",
                    "rope_traditional",
                    "rotary_dim",
                    "use_learned_position_embeddings",
                    "use_mem_rope",
                    "use_mrope",
                ),
                OFF,
            ),
            "rotary_pct": (1,),
            "position_embedding_type": ("rope",),
        },
    ),
    (
        "sliding-window, chunked, sparse, linear, latent, gated or bidirectional attention is not supported in this"
        " family",
        {
            **dict.fromkeys(
                (
                    "add_cross_attention",
                    "attention_chunk_size",
                    "attention_k_eq_v",
                    "attention_sink",
                    "attention_window_size",
                    "attn_output_gate",
                    "cross_attention_hidden_size",
                    "full_attn_idxs",
                    "full_attn_alpha_factor",
                    "full_attn_beta_factor",
                    "gating",
                    "global_attn_every_n_layers",
                    "is_encoder_decoder",
                    "keep_window_size",
                    "kv_lora_rank",
                    "layer_group_size",
                    "layer_types",
                    "layers_block_type",
                    "lambda_std_dev",
                    "learnable_sink_init",
                    "local_attention",
                    "num_attention_heads_per_layer",
                    "num_kv_shared_layers",
                    "output_gate_type",
                    "parallel_attn",
                    "q_lora_rank",
                    "qk_nope_head_dim",
                    "qk_rope_head_dim",
                    "qk_head_dim",
                    "sliding_window",
                    "sliding_window_pattern",
                    "sliding_window_size",
                    "use_attention_gate",
                    "use_bidirectional_attention",
                    "use_parallel_residual",
                    "use_sliding_window",
                    "v_head_dim",
                ),
                OFF,
            ),
            "is_causal": (True,),
        },
    ),
    (
        "dropout is not supported: set it to 0",
        dict.fromkeys(
            (
                "activation_dropout",
                "attention_dropout",
                "attention_probs_dropout_prob",
                "attn_pdrop",
                "dropout",
                "embd_pdrop",
                "embedding_dropout",
                "hidden_dropout",
                "hidden_dropout_prob",
                "input_jitter_noise",
                "layerdrop",
                "mlp_dropout",
                "resid_pdrop",
                "residual_dropout",
                "router_jitter_noise",
            ),
            OFF,
        ),
    ),
    (
        "such experts are not supported in this family",
        {
            **dict.fromkeys(
                (
                    "enable_moe_block",
                    "expert_ffn_hidden_size",
                    "dense_intermediate_size",
                    "intermediate_size_mlp",
                    "first_k_dense_replace",
                    "is_moe",
                    "mlp_layer_types",
                    "mlp_only_layers",
                    "moe_k",
                    "moe_topk",
                    "moe_layers",
                    "moe_apply_router_weight_on_input",
                    "moe_intermediate_size",
                    "moe_latent_size",
                    "moe_layer_start_index",
                    "moe_num_experts",
                    "moe_num_shared_experts",
                    "moe_router_enable_expert_bias",
                    "moe_shared_expert_intermediate_size",
                    "n_routed_experts",
                    "n_shared_experts",
                    "num_dense_layers",
                    "num_experts",
                    "num_experts_per_tok",
                    "num_experts_per_token",
                    "router_hidden_size",
                    "num_local_experts",
                    "num_shared_experts",
                    "shared_expert_intermediate_size",
                    "shared_expert_sink",
                    "shared_experts_intermediate_size",
                    "shared_intermediate_size",
                    "use_expert_bias",
                    "use_routing_bias",
                    "zero_expert_num",
                ),
                OFF,
            ),
            **dict.fromkeys(
                (
                    "decoder_sparse_step",
                    "interleave_moe_layer_step",
                    "moe_layer_freq",
                    "moe_layer_interval",
                    "moe_routed_scaling_factor",
                    "n_group",
                    "route_scale",
                    "routed_scaling_factor",
                    "router_scaling_factor",
                    "topk_group",
                ),
                ONE,
            ),
            "expert_selection_fn": ("softmax",),
            "scoring_func": ("softmax",),
            "topk_method": ("greedy",),
        },
    ),
    (
        OTHER_PARTS,
        dict.fromkeys(
            (
                "activation_sparsity_pattern",
                "adapter_rank",
                "audio_config",
                "block_configs",
                "conv_L_cache",
                "embedding_size",
                "hidden_size_per_layer_input",
                "hybrid_layer_ids",
                "num_mem_blocks",
                "num_codebooks",
                "short_conv_kernel_size",
                "gated_norm_rank",
                "laurel_rank",
                "num_mtp_layers",
                "num_nextn_predict_layers",
                "per_layer_config",
                "text_config",
                "type_vocab_size",
                "use_double_wide_mlp",
                "vision_config",
                "word_embed_proj_dim",
            ),
            OFF,
        ),
    ),
)

# The same, for parts that bring many fields.
PARTS = re.compile(
    r"(altup|cca|compress|hc|index|indexer|kda|linear|mamba|mtp|ngram|ple|ssm|time_step)_\w+"
    r"|\w+_lora_rank|\w*(attention|attn|ffn|encoder|decoder)_config"
)

# Fields without an effect on the model's logits: bookkeeping, generation, and slices of one product (pretraining_tp).
HARMLESS = frozenset(
    (
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "chunk_size_feed_forward",
        "do_sample",
        "dtype",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_llama_config",
        "label2id",
        "max_length",
        "max_window_layers",
        "model_type",
        "name_or_path",
        "norm_topk_prob",
        "num_labels",
        "num_logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pretraining_tp",
        "problem_type",
        "repetition_penalty",
        "return_dict",
        "router_aux_loss_coef",
        "task_specific_params",
        "temperature",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    )
)
TOKEN_ID = re.compile(r".*_token_ids?")


def refuse_changes(fields: Fields) -> tuple[str, ...]:
    """Refuse the fields that nothing has read and that change the mathematics; returns those not known here."""
    unread = set(fields.unread()) - HARMLESS
    for why, values in CHANGES:
        for key in sorted(unread & values.keys()):
            if fields.get(key) not in values[key]:
                fields.unsupported(key, why)
        unread -= values.keys()
    for key in sorted(filter(PARTS.fullmatch, unread)):
        if fields.get(key) not in OFF:
            fields.unsupported(key, OTHER_PARTS)
        unread.remove(key)
    return tuple(sorted(key for key in unread if not TOKEN_ID.fullmatch(key)))


def warn_of_unknown(names: tuple[str, ...]) -> None:
    """Log, once, the fields that nothing here knows."""
    if names:
        warn_once(
            f"config.json: fields that are not known here and have no effect: {', '.join(names)}; if one of them "
            "changes what the model computes, the model is not supported"
        )
