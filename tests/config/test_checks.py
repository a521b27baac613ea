"""Impossible combinations: each is refused, says what to change, and the change is accepted."""

from __future__ import annotations

from typing import Any

import pytest

from asd_megatron.antisd.advantage import GroupAdvantage
from asd_megatron.antisd.divergence import CONDITIONS
from asd_megatron.antisd.importance import Level
from asd_megatron.antisd.policy_loss import PolicyLoss
from asd_megatron.config import check_devices, check_model, check_world, make_recipe
from asd_megatron.config.algorithm import GATED, AlgorithmSection, ConditionName
from asd_megatron.errors import UserError
from asd_megatron.ops.divergence_tile import KINDS

MINIMAL: dict[str, Any] = {"model": {"path": "model"}, "data": {"train": "problems.jsonl"}}
QWEN3_8B = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "max_position_embeddings": 40960,
}
QWEN3_30B = QWEN3_8B | {"num_experts": 128, "moe_intermediate_size": 768, "num_key_value_heads": 4}
SMOLLM2 = {
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "max_position_embeddings": 8192,
}
BFLOAT16_MOMENTS = "optimizer.moments=bfloat16 optimizer.beta2=0.95 parallelism.distributed_optimizer=true"
FP8_PARAMETERS = (
    "precision.fp8=current precision.fp8_parameters=true parallelism.distributed_optimizer=true rollout.engine=replay"
    " rollout.replay_folder=x"
)


def overrides(text: str) -> list[str]:
    return [f"--{pair}" for pair in text.split()]


def make(text: str = "", kind: Any = "train") -> Any:
    return make_recipe(MINIMAL, overrides(text), kind)


def refusal(text: str, kind: Any = "train") -> str:
    with pytest.raises(UserError) as caught:
        make(text, kind)
    return str(caught.value)


@pytest.mark.parametrize(
    ("bad", "message", "good"),
    [
        (f"{BFLOAT16_MOMENTS} parallelism.distributed_optimizer=false", "set parallelism.distributed_optimizer true",
         BFLOAT16_MOMENTS),
        (f"{BFLOAT16_MOMENTS} optimizer.beta2=0.999", "bfloat16 rounds a moment that decays by less than 0.4%",
         f"{BFLOAT16_MOMENTS} optimizer.beta2=0.99"),
        (f"{BFLOAT16_MOMENTS} optimizer.beta1=0.995", "set optimizer.beta1 to 0.99", BFLOAT16_MOMENTS),
        (f"{BFLOAT16_MOMENTS} optimizer.offload=host", "the host's Adam has float32 moments", BFLOAT16_MOMENTS),
        ("optimizer.offload=host parallelism.distributed_optimizer=true model.dtype=float32",
         "set model.dtype bfloat16", "optimizer.offload=host parallelism.distributed_optimizer=true"),
        (f"{FP8_PARAMETERS} optimizer.offload=host", "complete master weights", FP8_PARAMETERS),
        ("precision.fp8=blockwise algorithm.estimator=full_vocabulary", "set precision.fp8_scores true",
         "precision.fp8=blockwise algorithm.estimator=full_vocabulary precision.fp8_scores=true"),
        ("parallelism.sequence_parallel=true", "set parallelism.tensor above 1",
         "parallelism.sequence_parallel=true parallelism.tensor=2"),
        ("parallelism.virtual_pipeline=2", "set parallelism.pipeline above 1", "parallelism.pipeline=2"),
        ("parallelism.virtual_pipeline=2 parallelism.pipeline=2", "embedded rollouts sample on the training model",
         "parallelism.virtual_pipeline=2 parallelism.pipeline=2 rollout.engine=replay rollout.replay_folder=x"),
        ("parallelism.virtual_pipeline=1 parallelism.pipeline=2", "interleaves nothing", "parallelism.pipeline=2"),
        ("model.recompute_layers=2", "set model.recompute full", "model.recompute_layers=2 model.recompute=full"),
        ("logging.telemetry_seconds=1e10", "logging.telemetry_seconds", "logging.telemetry_seconds=3600"),
        ("precision.fp8_scores=true", "set precision.fp8", "precision.fp8_scores=true precision.fp8=current"),
        ("precision.fp8_probe_every=5", "set precision.fp8", "precision.fp8_probe_every=5 precision.fp8=current"),
        ("precision.fp8=current model.layers=local", "set model.layers auto or te", "precision.fp8=current"),
        ("precision.fp8=current model.dtype=float32", "set model.dtype bfloat16",
         "precision.fp8=current model.dtype=bfloat16"),
        (f"{FP8_PARAMETERS} parallelism.distributed_optimizer=false", "set parallelism.distributed_optimizer true",
         FP8_PARAMETERS),
        (f"{FP8_PARAMETERS} rollout.engine=embedded", "use rollout.engine sglang", FP8_PARAMETERS),
        (f"{FP8_PARAMETERS} precision.fp8=mxfp8", "gradient buffers that hold gathered weights", FP8_PARAMETERS),
        (f"{FP8_PARAMETERS} algorithm.kl_coefficient=0.1", "copies of the weights", FP8_PARAMETERS),
        (f"{FP8_PARAMETERS} teacher.weights=ema", "copies of the weights", FP8_PARAMETERS),
        ("parallelism.context=2", "one token cannot be divided over context-parallel ranks",
         "parallelism.context=2 rollout.engine=replay rollout.replay_folder=x"),
        ("parallelism.context=2 rollout.engine=replay rollout.replay_folder=x data.test=t", "the evaluation samples",
         "parallelism.context=2 rollout.engine=replay rollout.replay_folder=x data.test=t evaluation.at_start=false "
         "evaluation.at_end=false"),
        ("parallelism.overlap_grad_reduce=true parallelism.data=1", "parallelism.data above 1",
         "parallelism.overlap_grad_reduce=true parallelism.data=2"),
        ("rollout.engine=replay", "needs rollout.replay_folder", "rollout.engine=replay rollout.replay_folder=x"),
        ("rollout.replay_folder=x", "read only with rollout.engine replay", ""),
        ("sampling.top_p=0.95", "set sampling.top_p 1.0", "evaluation.top_p=0.95"),
        ("sampling.top_k=20", "sampling.top_k 0", "evaluation.top_k=20"),
        ("sampling.rollouts_per_problem=1", "no group-relative advantage", "sampling.rollouts_per_problem=2"),
        ("sampling.rollouts_per_problem=1 algorithm.name=grpo algorithm.advantage_weight=0",
         "with algorithm.advantage_weight 0", "sampling.rollouts_per_problem=1 algorithm.name=sd "
         "algorithm.advantage_weight=0"),
        ("algorithm.advantage_weight=0 algorithm.lambda_max=0", "nothing to train on",
         "algorithm.advantage_weight=0 algorithm.lambda_max=0 algorithm.name=grpo"),
        ("gate.warmup_steps=0", "use algorithm.name no_gate", "gate.warmup_steps=0 gate.h_warm=0.71"),
        ("gate.warmup_steps=0 algorithm.name=no_teacher", "give gate.h_warm",
         "gate.warmup_steps=0 algorithm.name=no_gate"),
        ("gate.tau_down=1.1", "gate.tau_down 1.1 is above gate.tau_up 1.0", "gate.tau_down=0.9"),
        ("algorithm.aggregation=constant_length", "needs algorithm.constant_length",
         "algorithm.aggregation=constant_length algorithm.constant_length=1024"),
        ("algorithm.constant_length=9", "read only with algorithm.aggregation constant_length", ""),
        ("algorithm.updates_per_batch=3", "does not divide the 256 rollouts", "algorithm.updates_per_batch=4"),
        ("algorithm.divergence=forward_kl", "read only with algorithm.estimator full_vocabulary",
         "algorithm.divergence=forward_kl algorithm.estimator=full_vocabulary"),
        ("algorithm.estimator=full_vocabulary algorithm.name=multiplicative", "set algorithm.estimator sampled",
         "algorithm.estimator=full_vocabulary algorithm.name=sd"),
        ("algorithm.estimator=full_vocabulary algorithm.pmi_clip=5", "leave algorithm.pmi_clip out",
         "algorithm.estimator=full_vocabulary algorithm.term_max_position=9000"),
        ("algorithm.estimator=full_vocabulary algorithm.name=sd algorithm.mixture=0.9", "with algorithm.divergence",
         "algorithm.estimator=full_vocabulary algorithm.name=sd algorithm.mixture=0.9"
         " algorithm.divergence=jensen_shannon"),
        ("algorithm.importance_level=sequence", "set algorithm.importance_correction truncated or masked",
         "algorithm.importance_level=sequence algorithm.importance_correction=truncated"),
        ("algorithm.importance_floor=0.2 algorithm.importance_correction=truncated",
         "read only with algorithm.importance_correction masked",
         "algorithm.importance_floor=0.2 algorithm.importance_correction=masked"),
        ("algorithm.importance_floor=2 algorithm.importance_correction=masked",
         "importance_floor 2.0 is not below algorithm.importance_cap 2.0",
         "algorithm.importance_floor=2 algorithm.importance_cap=2.1 algorithm.importance_correction=masked"),
        ("algorithm.importance_cap=0.4 algorithm.importance_correction=masked",
         "importance_floor 0.5 (its default) is not below",
         "algorithm.importance_cap=0.4 algorithm.importance_correction=truncated"),
        ("perplexity.alpha=3", "set that, or leave perplexity.alpha out",
         "perplexity.alpha=3 algorithm.lambda_source=teacher_perplexity"),
        ("algorithm.lambda_source=teacher_perplexity gate.tau_down=0.9", "replaces it: leave gate.tau_down out",
         "algorithm.lambda_source=teacher_perplexity"),
        ("algorithm.lambda_source=teacher_perplexity gate.h_warm=0.7", "set algorithm.lambda_source gate",
         "gate.h_warm=0.7"),
        ("algorithm.lambda_source=teacher_perplexity gate.warmup_steps=3", "(perplexity.warmup_steps is the key here)",
         "algorithm.lambda_source=teacher_perplexity perplexity.warmup_steps=3"),
        ("algorithm.lambda_source=teacher_perplexity algorithm.name=student_entropy_gate", "or algorithm.name antisd",
         "algorithm.lambda_source=teacher_perplexity algorithm.name=multiplicative"),
        ("algorithm.lambda_source=teacher_perplexity algorithm.name=no_teacher", "it has no teacher",
         "algorithm.lambda_source=teacher_perplexity algorithm.name=grpo"),
        ("algorithm.lambda_source=teacher_perplexity perplexity.target=3", "is not below perplexity.cutoff",
         "algorithm.lambda_source=teacher_perplexity perplexity.target=2.9"),
        ("algorithm.lambda_source=teacher_perplexity perplexity.warmup_steps=0", "or give perplexity.target",
         "algorithm.lambda_source=teacher_perplexity perplexity.warmup_steps=0 perplexity.target=1.2"),
        ("algorithm.lambda_source=teacher_perplexity perplexity.target=1.2 perplexity.target_ratio=0.9",
         "perplexity.target and perplexity.target_ratio contradict each other",
         "algorithm.lambda_source=teacher_perplexity perplexity.target_ratio=0.9"),
        ("algorithm.lambda_source=teacher_perplexity perplexity.lambda_min=0.6", "above algorithm.lambda_max 0.5",
         "algorithm.lambda_source=teacher_perplexity perplexity.lambda_min=0.6 algorithm.lambda_max=0.7"),
        ("algorithm.lambda_source=teacher_perplexity perplexity.scope=batch perplexity.shift=always",
         "makes every lambda 0", "algorithm.lambda_source=teacher_perplexity perplexity.scope=batch "
         "perplexity.shift=negative"),
        ("algorithm.outlier_deviations=2 gate.h_warm=0.7", "set gate.warmup_steps to 1 or more",
         "algorithm.outlier_deviations=2 gate.h_warm=0.7 gate.warmup_steps=2"),
        ("algorithm.outlier_deviations=2 algorithm.name=sd", "set gate.warmup_steps to 1 or more",
         "algorithm.outlier_deviations=2 algorithm.name=grpo"),
        ("algorithm.outlier_deviations=2 algorithm.lambda_source=teacher_perplexity perplexity.target=2",
         "set perplexity.warmup_steps to 1 or more",
         "algorithm.outlier_deviations=2 algorithm.lambda_source=teacher_perplexity"),
        ("algorithm.composition=rlsd", "set algorithm.name sd", "algorithm.composition=rlsd algorithm.name=sd"),
        ("algorithm.composition=rlsd algorithm.name=sd algorithm.lambda_max=1.5", "set it to 1 or less",
         "algorithm.composition=rlsd algorithm.name=sd algorithm.lambda_max=1"),
        ("algorithm.composition=rlsd algorithm.name=sd algorithm.lambda_source=teacher_perplexity"
         " perplexity.lambda_min=-6", "set it to -1 or more", "algorithm.composition=rlsd algorithm.name=sd"
         " algorithm.lambda_source=teacher_perplexity perplexity.lambda_min=-1"),
        ("algorithm.composition=additive algorithm.name=multiplicative", "set algorithm.name antisd",
         "algorithm.composition=multiplicative algorithm.name=antisd"),
        ("algorithm.advantage_weight=0.5 algorithm.name=multiplicative", "composition multiplicative adds none",
         "algorithm.advantage_weight=0.5"),
        ("algorithm.advantage_weight=0.5 algorithm.composition=multiplicative_plain", "algorithm.composition additive",
         "algorithm.advantage_weight=0.5 algorithm.composition=additive"),
        ("algorithm.estimator=full_vocabulary algorithm.composition=multiplicative_plain",
         "leave algorithm.composition out", "algorithm.estimator=full_vocabulary algorithm.composition=additive "
         "algorithm.lambda_source=teacher_perplexity algorithm.advantage_weight=0.5 algorithm.term_max_length=12000"),
        ("algorithm.estimator=full_vocabulary algorithm.outlier_deviations=2", "leave algorithm.outlier_deviations out",
         "algorithm.outlier_deviations=2"),
        ("algorithm.estimator=full_vocabulary algorithm.term_normalization=demean",
         "leave algorithm.term_normalization out", "algorithm.term_normalization=demean"),
        ("teacher.weights=ema algorithm.name=grpo", "algorithm.name grpo scores no teacher",
         "teacher.weights=ema algorithm.name=grpo algorithm.log_pmi=true"),
        ("teacher.weights=initial algorithm.name=no_teacher", "leave teacher.weights out",
         "teacher.weights=initial algorithm.name=no_teacher algorithm.log_pmi=true"),
        ("teacher.weights=initial algorithm.name=grpo algorithm.kl_coefficient=0.1", "scores no teacher",
         "teacher.weights=ema algorithm.kl_coefficient=0.1"),
        ("teacher.ema_rate=0.1", "set that, or leave teacher.ema_rate out", "teacher.ema_rate=0.1 teacher.weights=ema"),
        ("algorithm.kl_estimator=k1", "algorithm.kl_coefficient above 0",
         "algorithm.kl_estimator=k1 algorithm.kl_coefficient=0.001"),
        ("algorithm.overlong_penalty=2", "read only with algorithm.overlong_buffer above 0",
         "algorithm.overlong_penalty=2 algorithm.overlong_buffer=100"),
        ("algorithm.overlong_buffer=1025", "lower the first", "algorithm.overlong_buffer=1024"),
        ("algorithm.whiten_advantages=true algorithm.name=sd algorithm.advantage_weight=0",
         "the loss has no group advantage", "algorithm.whiten_advantages=true algorithm.name=grpo"),
        ("algorithm.policy_loss=gspo algorithm.estimator=full_vocabulary algorithm.epochs=2",
         "set algorithm.updates_per_batch 1 and algorithm.epochs 1",
         "algorithm.policy_loss=gspo algorithm.estimator=full_vocabulary"),
        ("sampling.redraw_limit=5", "read only with sampling.redraw no_signal or equal_rewards",
         "sampling.redraw_limit=5 sampling.redraw=equal_rewards"),
        ("sampling.redraw=equal_rewards rollout.engine=replay rollout.replay_folder=x", "set sampling.redraw never",
         "sampling.redraw=equal_rewards"),
        ("sampling.redraw=equal_rewards sampling.rollouts_per_problem=1 algorithm.advantage_weight=0",
         "discards every group", "sampling.redraw=no_signal sampling.rollouts_per_problem=1"
         " algorithm.advantage_weight=0"),
        ("sampling.redraw=no_signal algorithm.name=no_teacher", "acts on every response",
         "sampling.redraw=no_signal algorithm.name=no_teacher algorithm.lambda_max=0"),
        ("privileged.use_group=false privileged.use_reference=false", "leaves no solution to show",
         "privileged.use_group=false privileged.use_reference=false privileged.when_no_solution=feedback_only"),
        ("privileged.min_solution_tokens=9000", "privileged.max_solution_tokens", "privileged.min_solution_tokens=64"),
        ("privileged.max_teacher_tokens=1024", "leaves no room for a prompt", "privileged.max_teacher_tokens=4096"),
        ("privileged.raw_template={prompt}{solution}", "set data.format raw",
         "privileged.raw_template={prompt}{solution} data.format=raw"),
        ("privileged.raw_template={problem}{solution} data.format=raw", "write {prompt}",
         "privileged.raw_template={prompt}{solution} data.format=raw"),
        ("privileged.chat_template={prompt}", "privileged.chat_template must hold", "data.format=chat"),
        ("privileged.chat_template={prompt}{solution}", "put an empty line between", "data.format=chat"),
        ("data.raw_prompt=Q:{prompt}", "set data.format raw", "data.raw_prompt=Q:{prompt} data.format=raw"),
        ("data.format=raw data.raw_prompt=Q:", "must hold the problem's place once", "data.format=raw"),
        ("data.format=raw data.system=hello", "data.system belongs to chat prompts", "data.system=hello"),
        ("evaluation.every=10", "set data.test", "evaluation.every=10 data.test=t"),
        ("optimizer.min_learning_rate=1e-3", "is above optimizer.learning_rate", "optimizer.min_learning_rate=1e-7"),
        ("data.train=puzzle:corpus", "use puzzle:train", "data.train=puzzle:train data.test=puzzle:test"),
        ("data.test=puzzle:tset", "use puzzle:test", "data.test=puzzle:test"),
        ("reward.wall_timeout_seconds=2", "below reward.timeout_seconds 5", "reward.wall_timeout_seconds=5"),
    ],
)  # fmt: skip
def test_a_combination_is_refused_with_what_to_change(bad: str, message: str, good: str) -> None:
    assert message in refusal(bad)
    make(good)


@pytest.mark.parametrize(
    ("bad", "message", "good"),
    [
        ("data.train=puzzle:train", "the supervised stage takes puzzle:corpus", "data.train=puzzle:corpus"),
        ("data.test=t", "data.test needs a reward", "data.test=t reward.name=exact"),
        ("reward.name=exact", "set data.test", ""),
        ("parallelism.context=2 data.test=t reward.name=exact", "use no data.test", "parallelism.context=2"),
        ("parallelism.pipeline=2 parallelism.virtual_pipeline=2 data.test=t reward.name=exact",
         "the evaluation samples", "parallelism.pipeline=2 parallelism.virtual_pipeline=2"),
        ("run.dump_rollouts=true", "run.dump_rollouts: unknown key", ""),
        ("precision.fp8=current precision.fp8_probe_every=3", "precision.fp8_probe_every 3", "precision.fp8=current"),
        ("precision.fp8=current precision.fp8_scores=true", "precision.fp8_scores true", "precision.fp8=current"),
    ],
)  # fmt: skip
def test_supervised_combinations(bad: str, message: str, good: str) -> None:
    assert message in refusal(bad, "sft")
    make(good, "sft")


@pytest.mark.parametrize("text", ["no", "No", "off", '"no"', '"false"', "n"])
def test_a_text_for_a_boolean_of_the_chat_template_is_refused(text: str) -> None:
    for given in (f"{{enable_thinking: {text}}}", f"{{tools: {{enable_thinking: {text}}}}}"):
        with pytest.raises(UserError, match=r"data\.chat_template_kwargs.* write enable_thinking: false"):
            make_recipe(MINIMAL, ["--data.chat_template_kwargs", given])
    given = "{enable_thinking: false, language: norwegian, budget: 5}"
    assert make_recipe(MINIMAL, ["--data.chat_template_kwargs", given]).data.chat_template_kwargs["budget"] == 5


def test_several_findings_are_one_refusal() -> None:
    message = refusal("sampling.top_p=0.9 gate.warmup_steps=0")
    assert message.startswith("the recipe cannot work:\n  ")
    assert "sampling.top_p" in message and "gate.warmup_steps" in message


@pytest.mark.parametrize("name", CONDITIONS)
def test_every_condition_is_one_line(name: str) -> None:
    recipe = make(f"algorithm.name={name}")
    assert recipe.algorithm.gated == CONDITIONS[name].gated
    assert recipe.gate_warmup_steps == (5 if CONDITIONS[name].gated else 0)
    assert make(f"algorithm.name={name} gate.h_warm=0.7").gate_warmup_steps == 0
    assert make(f"algorithm.name={name} gate.warmup_steps=3").gate_warmup_steps == 3


def test_what_sets_lambda_has_its_own_warm_up() -> None:
    by_perplexity = "algorithm.lambda_source=teacher_perplexity"
    assert make().lambda_warmup_steps == make(by_perplexity).lambda_warmup_steps == 5
    assert make("algorithm.name=sd").lambda_warmup_steps == 0
    assert make(f"{by_perplexity} perplexity.target=1.3").lambda_warmup_steps == 0
    assert make(f"{by_perplexity} perplexity.warmup_steps=2").lambda_warmup_steps == 2
    assert not make(by_perplexity).algorithm.gated


def test_only_masked_importance_has_a_floor() -> None:
    masked = "algorithm.importance_correction=masked"
    assert make(masked).algorithm.mask_below == 0.5
    assert make(f"{masked} algorithm.importance_floor=0").algorithm.mask_below == 0.0
    assert make("algorithm.importance_correction=truncated").algorithm.mask_below is None
    assert make().algorithm.mask_below is None


def test_the_levels_of_importance_are_those_of_the_method() -> None:
    assert AlgorithmSection.model_fields["importance_level"].annotation == Level


def test_the_options_are_those_of_the_method() -> None:
    fields = AlgorithmSection.model_fields
    assert fields["policy_loss"].annotation == PolicyLoss
    assert fields["group_advantage"].annotation == GroupAdvantage


def test_where_a_term_acts_without_a_group_advantage() -> None:
    acts = {name: AlgorithmSection(name=name).adds_term for name in CONDITIONS}  # type: ignore[arg-type]
    assert {name for name, added in acts.items() if not added} == {"grpo", "multiplicative"}
    assert not make("algorithm.lambda_max=0").algorithm.adds_term
    assert not make("algorithm.name=sd algorithm.composition=rlsd").algorithm.adds_term


def test_the_divergences_are_those_of_the_head() -> None:
    annotation = str(AlgorithmSection.model_fields["divergence"].annotation)
    assert all(repr(kind) in annotation for kind in KINDS) and annotation.count("'") == 2 * len(KINDS)


@pytest.mark.parametrize("name", CONDITIONS)
def test_the_divergence_is_the_one_that_the_sampled_term_estimates(name: str) -> None:
    expected = "jensen_shannon" if CONDITIONS[name].shape == "phi" else "reverse_kl"
    assert AlgorithmSection(name=name).divergence_kind == expected  # type: ignore[arg-type]


def test_the_conditions_are_those_of_the_method() -> None:
    assert ConditionName.__args__ == tuple(CONDITIONS)  # type: ignore[attr-defined]
    assert set(GATED) == {name for name, condition in CONDITIONS.items() if condition.gated}


def test_the_world_leaves_a_data_parallel_size() -> None:
    recipe = make("parallelism.tensor=2 parallelism.pipeline=2")
    assert recipe.parallelism.ranks == 4
    assert check_world(recipe, 4) == 1
    assert check_world(recipe, 12) == 3
    with pytest.raises(UserError, match=r"6 ranks do not divide into model copies of 4 \(tensor 2 x pipeline 2"):
        check_world(recipe, 6)
    experts = make("parallelism.tensor=2 parallelism.expert=4")
    assert check_world(experts, 8) == 4
    with pytest.raises(UserError, match=r"expert 4 does not divide the 2 ranks of a pipeline stage"):
        check_world(experts, 2)
    fixed = make("parallelism.tensor=2 parallelism.data=2")
    assert check_world(fixed, 4) == 2
    with pytest.raises(UserError, match=r"needs 4 ranks and there are 8: start 4, or set parallelism.data 4"):
        check_world(fixed, 8)


def test_layers_that_the_machine_lacks() -> None:
    recipe = make("model.layers=te")
    with pytest.raises(UserError, match="needs a CUDA device"):
        check_devices(recipe, cuda=False, transformer_engine=True)
    with pytest.raises(UserError, match=r"install the extra `asd_megatron\[gpu\]`"):
        check_devices(recipe, cuda=True, transformer_engine=False)
    check_devices(recipe, cuda=True, transformer_engine=True)
    check_devices(make(), cuda=False)
    check_devices(make("model.dtype=bfloat16"))
    for optimizer, message in (
        (BFLOAT16_MOMENTS, "only Transformer Engine's Adam has such moments"),
        ("optimizer.offload=host parallelism.distributed_optimizer=true", "set optimizer.offload none"),
    ):
        for cuda, installed in ((False, True), (True, False)):
            with pytest.raises(UserError, match=message):
                check_devices(make(optimizer), cuda=cuda, transformer_engine=installed)
        check_devices(make(optimizer), cuda=True, transformer_engine=True)


@pytest.mark.parametrize(
    ("config", "bad", "message", "good"),
    [
        (SMOLLM2, "parallelism.tensor=2", "does not divide the model's 9 attention heads, 3 key-value heads: "
         "set parallelism.tensor to one of 1, 3", "parallelism.tensor=3"),
        (SMOLLM2, "parallelism.pipeline=4", "30 layers: set it to one of 1, 2, 3, 5, 6", "parallelism.pipeline=5"),
        (SMOLLM2, "parallelism.pipeline=31", "fewer than stages", "parallelism.pipeline=30"),
        (QWEN3_8B, "parallelism.tensor=16", "8 key-value heads", "parallelism.tensor=8"),
        (QWEN3_8B,
         "model.recompute=full parallelism.pipeline=4 model.recompute_layers=10", "a pipeline stage has 9 layers",
         "model.recompute=full parallelism.pipeline=4 model.recompute_layers=9"),
        (QWEN3_8B,
         "parallelism.pipeline=2 parallelism.virtual_pipeline=4 rollout.engine=replay rollout.replay_folder=x",
         "does not divide the 18 layers of a pipeline stage",
         "parallelism.pipeline=2 parallelism.virtual_pipeline=3 rollout.engine=replay rollout.replay_folder=x"),
        (SMOLLM2, "sampling.max_response_tokens=8192", "the model has 8192 positions: lower one of them by 2048",
         "sampling.max_response_tokens=6144"),
        (SMOLLM2, 'evaluation.sets={"a":{"data":"x","max_new_tokens":8192}}', "evaluation.sets.a.max_new_tokens 8192",
         'evaluation.sets={"a":{"data":"x","max_new_tokens":6144}}'),
        (QWEN3_30B, "parallelism.expert=3", "128 experts: set it to one of 1, 2, 4", "parallelism.expert=8"),
        (QWEN3_30B, "parallelism.tensor=2", "set parallelism.sequence_parallel true",
         "parallelism.tensor=2 parallelism.sequence_parallel=true"),
        (QWEN3_8B, "parallelism.expert=2", "no experts", "parallelism.expert=1"),
        (QWEN3_8B, "model.auxiliary_loss=0.01", "leave model.auxiliary_loss out", ""),
        (QWEN3_8B, "rollout.routing_replay=scoring", "leave rollout.routing_replay out", ""),
        (SMOLLM2, "privileged.max_teacher_tokens=8193", "beyond the model's 8192 positions",
         "privileged.max_teacher_tokens=8192"),
    ],
)  # fmt: skip
def test_a_layout_or_length_that_the_model_does_not_take(
    config: dict[str, Any], bad: str, message: str, good: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_model(make(bad), config)
    assert message in str(caught.value)
    check_model(make(good), config)


def test_a_supervised_recipe_without_evaluation_has_no_sampling_limits() -> None:
    check_model(make("", "sft"), SMOLLM2 | {"max_position_embeddings": 128})
    check_model(make(), {})
