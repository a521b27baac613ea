"""Keys of other frameworks with their counterparts here, for the messages of unknown keys.

A key is looked up by its last part, in lower case with underscores: `actor_rollout_ref.actor.optim.lr`,
`--optimizer.lr` and `--lr` are all `lr`.
"""

from __future__ import annotations

COUNTERPARTS: dict[str, tuple[str, ...]] = {
    # model, tokenizer, folders
    "model_name_or_path": ("model.path",),
    "model_name": ("model.path",),
    "pretrain": ("model.path",),
    "hf_checkpoint": ("model.path",),
    "bf16": ("model.dtype",),
    "fp16": ("model.dtype",),
    "torch_dtype": ("model.dtype",),
    "precision": ("model.dtype",),
    "gradient_checkpointing": ("model.recompute",),
    "enable_gradient_checkpointing": ("model.recompute",),
    "recompute_granularity": ("model.recompute",),
    "transformer_impl": ("model.layers",),
    "fp8_recipe": ("precision.fp8",),
    "output_dir": ("run.folder",),
    "default_local_dir": ("run.folder",),
    "experiment_name": ("run.name",),
    "run_name": ("run.name",),
    "project_name": ("run.name",),
    # layout
    "tensor_parallel": ("parallelism.tensor",),
    "tensor_parallel_size": ("parallelism.tensor", "rollout.server_tensor_parallel"),
    "tensor_model_parallel_size": ("parallelism.tensor", "rollout.server_tensor_parallel"),
    "tp": ("parallelism.tensor",),
    "tp_size": ("parallelism.tensor", "rollout.server_tensor_parallel"),
    "pipeline_parallel": ("parallelism.pipeline",),
    "pipeline_parallel_size": ("parallelism.pipeline",),
    "pipeline_model_parallel_size": ("parallelism.pipeline",),
    "pp": ("parallelism.pipeline",),
    "virtual_pipeline_model_parallel_size": ("parallelism.virtual_pipeline",),
    "context_parallel": ("parallelism.context",),
    "context_parallel_size": ("parallelism.context",),
    "ulysses_sequence_parallel_size": ("parallelism.context",),
    "cp": ("parallelism.context",),
    "dp": ("parallelism.data",),
    "data_parallel_size": ("parallelism.data",),
    "use_distributed_optimizer": ("parallelism.distributed_optimizer",),
    # batches and steps
    "max_steps": ("run.steps",),
    "total_training_steps": ("run.steps",),
    "num_rollout": ("run.steps",),
    "train_batch_size": ("sampling.problems_per_step",),
    "rollout_batch_size": ("sampling.problems_per_step",),
    "num_prompts_per_step": ("sampling.problems_per_step",),
    "num_generations": ("sampling.rollouts_per_problem",),
    "num_generations_per_prompt": ("sampling.rollouts_per_problem",),
    "n_samples_per_prompt": ("sampling.rollouts_per_problem",),
    "group_size": ("sampling.rollouts_per_problem",),
    "n": ("sampling.rollouts_per_problem",),
    "max_prompt_length": ("sampling.max_prompt_tokens",),
    "rollout_max_prompt_len": ("sampling.max_prompt_tokens",),
    "max_response_length": ("sampling.max_response_tokens",),
    "max_completion_length": ("sampling.max_response_tokens",),
    "rollout_max_response_len": ("sampling.max_response_tokens",),
    "max_new_tokens": ("sampling.max_response_tokens",),
    "max_length": ("sampling.max_response_tokens",),
    "max_tokens": ("sampling.max_response_tokens",),
    "rollout_temperature": ("sampling.temperature",),
    "ppo_max_token_len_per_gpu": ("batching.tokens_per_microbatch",),
    "max_tokens_per_gpu": ("batching.tokens_per_microbatch",),
    "micro_batch_size": ("batching.tokens_per_microbatch",),
    "ppo_micro_batch_size_per_gpu": ("batching.tokens_per_microbatch",),
    "per_device_train_batch_size": ("batching.tokens_per_microbatch",),
    "gradient_accumulation_steps": ("batching.tokens_per_microbatch",),
    "ppo_mini_batch_size": ("algorithm.updates_per_batch",),
    "global_batch_size": ("algorithm.updates_per_batch",),
    "ppo_epochs": ("algorithm.epochs",),
    "num_iterations": ("algorithm.epochs",),
    # method
    "adv_estimator": ("algorithm.name",),
    "advantage_estimator": ("algorithm.name",),
    "loss_type": ("algorithm.name", "algorithm.aggregation"),
    "loss_agg_mode": ("algorithm.aggregation",),
    "lambda": ("algorithm.lambda_max",),
    "lam": ("algorithm.lambda_max",),
    "clip_ratio": ("algorithm.clip_low", "algorithm.clip_high"),
    "eps_clip": ("algorithm.clip_low", "algorithm.clip_high"),
    "epsilon_low": ("algorithm.clip_low",),
    "clip_ratio_low": ("algorithm.clip_low",),
    "epsilon_high": ("algorithm.clip_high",),
    "eps_clip_high": ("algorithm.clip_high",),
    "clip_ratio_high": ("algorithm.clip_high",),
    "tis_imp_ratio_cap": ("algorithm.importance_cap",),
    "use_tis": ("algorithm.importance_correction",),
    "kl_coef": ("algorithm.kl_coefficient",),
    "kl_loss_coef": ("algorithm.kl_coefficient",),
    "init_kl_coef": ("algorithm.kl_coefficient",),
    "beta": ("algorithm.kl_coefficient",),
    "use_kl_loss": ("algorithm.kl_coefficient", "algorithm.kl_estimator"),
    "use_kl_in_reward": ("algorithm.kl_coefficient", "algorithm.kl_estimator"),
    "kl_penalty": ("algorithm.kl_estimator",),
    "kl_loss_type": ("algorithm.kl_estimator",),
    "teacher_model_kind": ("teacher.weights",),
    "teacher_regularization": ("teacher.weights",),
    "fixed_teacher": ("teacher.weights",),
    "use_ema_teacher": ("teacher.weights",),
    "teacher_update_rate": ("teacher.ema_rate",),
    "ema_alpha": ("teacher.ema_rate",),
    "teacher_weights": ("teacher.weights",),
    "update_rate": ("teacher.ema_rate",),
    "ema_update_rate": ("teacher.ema_rate",),
    "full_logit_distillation": ("algorithm.estimator",),
    "full_vocab": ("algorithm.estimator",),
    "jsd_alpha": ("algorithm.mixture",),
    "jsd_beta": ("algorithm.mixture",),
    "mask_truncated_completions": ("algorithm.mask_truncated",),
    # options (docs/options.md)
    "norm_adv_by_std_in_grpo": ("algorithm.group_advantage",),
    "scale_rewards": ("algorithm.group_advantage", "algorithm.whiten_advantages"),
    "use_leave_one_out_baseline": ("algorithm.group_advantage",),
    "whiten_advantages": ("algorithm.whiten_advantages",),
    "normalize_advantages": ("algorithm.whiten_advantages",),
    "loss_mode": ("algorithm.policy_loss",),
    "importance_sampling_level": ("algorithm.policy_loss", "algorithm.importance_level"),
    "sequence_level_importance_ratios": ("algorithm.policy_loss", "algorithm.importance_level"),
    "entropy_coeff": ("algorithm.entropy_coefficient",),
    "entropy_coef": ("algorithm.entropy_coefficient",),
    "overlong_buffer": ("algorithm.overlong_buffer", "algorithm.overlong_penalty"),
    "penalty_factor": ("algorithm.overlong_penalty",),
    "soft_cache_length": ("algorithm.overlong_buffer",),
    "filter_groups": ("sampling.redraw",),
    "dynamic_sampling_filter_path": ("sampling.redraw",),
    "use_dynamic_sampling": ("sampling.redraw",),
    "dynamic_sample": ("sampling.redraw",),
    "max_num_gen_batches": ("sampling.redraw_limit",),
    "dynamic_sampling_max_gen_batches": ("sampling.redraw_limit",),
    "max_resample_times": ("sampling.redraw_limit",),
    # the released AntiSD code and its re-implementations (docs/released_form.md)
    "ca_mode": ("algorithm.composition",),
    "ca_lambda": ("perplexity.lambda_0", "algorithm.lambda_max"),
    "ca_lambda_mode": ("algorithm.lambda_source",),
    "ca_lambda_tppl_scope": ("perplexity.scope",),
    "ca_lambda_min": ("perplexity.lambda_min",),
    "ca_lambda_max": ("algorithm.lambda_max",),
    "ca_lambda_perp_target": ("perplexity.target",),
    "ca_lambda_perp_target_ratio": ("perplexity.target_ratio",),
    "ca_lambda_perp_delta": ("perplexity.target_offset",),
    "ca_lambda_perp_alpha": ("perplexity.alpha",),
    "ca_lambda_perp_mask": ("perplexity.cutoff",),
    "ca_lambda_warmup_steps": ("perplexity.warmup_steps", "gate.warmup_steps"),
    "ca_lambda_mean_shift": ("perplexity.shift",),
    "ca_lambda_mean_shift_always": ("perplexity.shift",),
    "orm_weight": ("algorithm.advantage_weight",),
    "prm_u_clip_mode": ("algorithm.outlier_deviations",),
    "prm_u_clip_k_sigma": ("algorithm.outlier_deviations",),
    "prm_forward_log_clip": ("algorithm.pmi_clip",),
    "prm_normalize_mode": ("algorithm.term_normalization",),
    "prm_clip": ("algorithm.term_clip",),
    "prm_length_mask_threshold": ("algorithm.term_max_length",),
    "prm_max_position": ("algorithm.term_max_position",),
    "solution_source": ("privileged.use_reference", "privileged.use_group"),
    # optimizer
    "lr": ("optimizer.learning_rate",),
    "min_lr": ("optimizer.min_learning_rate",),
    "lr_decay_style": ("optimizer.schedule",),
    "lr_scheduler_type": ("optimizer.schedule",),
    "lr_scheduler": ("optimizer.schedule",),
    "lr_warmup": ("optimizer.warmup_steps",),
    "lr_warmup_steps": ("optimizer.warmup_steps",),
    "lr_warmup_iters": ("optimizer.warmup_steps",),
    "warmup_ratio": ("optimizer.warmup_steps",),
    "wd": ("optimizer.weight_decay",),
    "adam_beta1": ("optimizer.beta1",),
    "adam_beta2": ("optimizer.beta2",),
    "betas": ("optimizer.beta1", "optimizer.beta2"),
    "adam_epsilon": ("optimizer.epsilon",),
    "adam_eps": ("optimizer.epsilon",),
    "max_grad_norm": ("optimizer.clip_grad",),
    "grad_clip": ("optimizer.clip_grad",),
    "gradient_clipping": ("optimizer.clip_grad",),
    # data and rewards
    "train_files": ("data.train",),
    "train_file": ("data.train",),
    "prompt_data": ("data.train",),
    "dataset": ("data.train",),
    "dataset_name": ("data.train",),
    "val_files": ("data.test",),
    "eval_prompt_data": ("data.test",),
    "eval_dataset": ("data.test",),
    "system_prompt": ("data.system",),
    "enable_thinking": ("data.chat_template_kwargs",),
    "reward_fn": ("reward.name",),
    "reward_funcs": ("reward.name",),
    "reward_function": ("reward.name",),
    "rm_type": ("reward.name",),
    "custom_rm_path": ("reward.name",),
    "custom_reward_function": ("reward.name",),
    # checkpoints, evaluation, logging
    "save_freq": ("checkpoint.every",),
    "save_interval": ("checkpoint.every",),
    "save_steps": ("checkpoint.every",),
    "save_total_limit": ("checkpoint.keep",),
    "resume_from_checkpoint": ("checkpoint.resume",),
    "resume_mode": ("checkpoint.resume",),
    "test_freq": ("evaluation.every",),
    "eval_steps": ("evaluation.every",),
    "eval_interval": ("evaluation.every",),
    "val_before_train": ("evaluation.at_start",),
    "rollout_data_dir": ("run.dump_rollouts",),
    "log_level": ("logging.level",),
    # rollouts
    "gpu_memory_utilization": ("rollout.server_args",),
    "mem_fraction_static": ("rollout.server_args",),
    "sglang_mem_fraction_static": ("rollout.server_args",),
    "rollout_num_gpus": ("rollout.server_devices",),
    "rollout_num_gpus_per_engine": ("rollout.server_tensor_parallel",),
    "colocate": ("rollout.placement",),
    "over_sampling_batch_size": ("rollout.oversampling",),
    "partial_rollout": ("rollout.partial_rollouts",),
    "logger": ("logging.tensorboard",),
    # sections
    "trainer": ("run", "checkpoint", "evaluation"),
    "training": ("run",),
    "actor_rollout_ref": ("model", "optimizer", "rollout", "sampling"),
    "actor": ("model", "optimizer"),
    "policy": ("model", "parallelism", "optimizer"),
    "grpo": ("algorithm", "sampling"),
    "generation": ("sampling", "rollout"),
    "cluster": ("parallelism",),
    "optim": ("optimizer",),
    "env": ("reward",),
}
"""Another framework's key or section -> the ones here that do its work, the likeliest first."""

_GPUS = (
    "the number of processes comes from `torchrun --nproc-per-node`, or from parallelism.data and the GPUs there are"
)
_REFERENCE = "not supported: the reference of algorithm.kl_coefficient is always the model of model.path"
_KL_CONTROL = "not supported: algorithm.kl_coefficient is constant"
_LORA = "not supported: all weights are trained"
_TRACKER = "not supported: metrics go to metrics.jsonl and TensorBoard (logging.tensorboard)"
_CRITIC = "not supported: advantages are group-relative, there is no critic"
_REWARD_MODEL = "not supported: rewards come from verifiers (reward.name), your own function among them"
_TOP_K = "not supported: algorithm.estimator full_vocabulary is exact, over all tokens of the vocabulary"
_TEACHER = "not supported: the teacher is the model under training; teacher.weights says with which weights"
_EPOCHS = "a run is counted in steps: run.steps; problems repeat in a new order when all were used"
_VLLM = "not supported: rollouts come from SGLang servers (rollout.engine sglang) or from the embedded engine"
_FSDP = "not supported: Megatron-Core shards models (the parallelism section)"

WITHOUT: dict[str, str] = {
    "n_gpus_per_node": _GPUS,
    "num_gpus_per_node": _GPUS,
    "gpus_per_node": _GPUS,
    "actor_num_gpus_per_node": _GPUS,
    "nnodes": _GPUS,
    "num_nodes": _GPUS,
    "world_size": _GPUS,
    **dict.fromkeys(
        (
            "ref_load",
            "ref_model",
            "ref_model_path",
        ),
        _REFERENCE,
    ),
    **dict.fromkeys(("kl_ctrl", "target_kl", "kl_target"), _KL_CONTROL),
    **dict.fromkeys(
        ("lora", "lora_rank", "lora_r", "lora_alpha", "use_peft", "peft", "peft_config", "target_modules"), _LORA
    ),
    **dict.fromkeys(
        ("wandb", "use_wandb", "wandb_project", "report_to", "swanlab", "mlflow", "use_swanlab", "trackio"), _TRACKER
    ),
    **dict.fromkeys(("critic", "critic_lr", "value_clip", "vf_coef", "gae_lambda", "cliprange_value"), _CRITIC),
    **dict.fromkeys(("reward_model", "reward_model_path", "reward_pretrain", "rm_path"), _REWARD_MODEL),
    **dict.fromkeys(("total_epochs", "num_train_epochs", "num_epoch", "num_episodes"), _EPOCHS),
    **dict.fromkeys(("vllm", "use_vllm", "vllm_mode", "vllm_tensor_parallel_size"), _VLLM),
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "zero_stage", "param_offload", "fsdp_size"), _FSDP),
    **dict.fromkeys(("distillation_topk", "topk_distillation", "top_k_distillation"), _TOP_K),
    **dict.fromkeys(("teacher_model", "teacher_model_path", "teacher_path"), _TEACHER),
    "trust_remote_code": "not supported: no code from a model folder is run",
    "push_to_hub": "not supported: the run leaves a Hugging Face folder in RUN/hf, upload it yourself",
    "ema_decay": "here it is teacher.ema_rate, 1 minus the decay",
    "load_in_4bit": _LORA,
    "load_in_8bit": _LORA,
    "apply_chat_template": "prompts go through the tokenizer's chat template unless data.format is raw",
}
"""Another framework's key -> why there is none here, and what to do instead."""


def last_part(dotted: str) -> str:
    """The last part of a dotted key in lower case, with underscores."""
    return dotted.rpartition(".")[2].lower().replace("-", "_")


def counterparts(dotted: str, valid: set[str]) -> list[str]:
    """The members of `valid` that do the work of another framework's key or section; [] for a name no framework has."""
    return [key for key in COUNTERPARTS.get(last_part(dotted), ()) if key in valid]


def reason_without(dotted: str) -> str | None:
    """Why there is no such key here, for a name of another framework that has no counterpart."""
    return WITHOUT.get(last_part(dotted)) or WITHOUT.get(last_part(dotted.partition(".")[0]))
