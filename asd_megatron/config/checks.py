"""Combinations that cannot work, each refused with what to change.

`check_recipe` looks at the recipe alone and runs whenever one is read; `check_world`, `check_devices` and `check_model`
compare it with the number of ranks, the machine and the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from asd_megatron.config.algorithm import AlgorithmSection
from asd_megatron.config.checkpoint import ALL
from asd_megatron.config.data import texts_for_booleans
from asd_megatron.config.data_checks import data_findings
from asd_megatron.config.determinism_checks import cpu_server_finding, determinism_findings
from asd_megatron.config.estimator_checks import estimator_findings
from asd_megatron.config.evaluation_checks import PUZZLES, evaluation_findings
from asd_megatron.config.gym_checks import gym_findings
from asd_megatron.config.model_checks import model_findings
from asd_megatron.config.option_checks import option_findings
from asd_megatron.config.parallelism import ParallelismSection
from asd_megatron.config.precision_checks import precision_findings
from asd_megatron.config.recipe import AnyRecipe, Recipe, SftRecipe
from asd_megatron.config.refusals import dotted_keys, nearest_key
from asd_megatron.config.reward_checks import reward_findings
from asd_megatron.config.rollout_checks import device_findings, rollout_findings
from asd_megatron.config.teacher_checks import teacher_findings
from asd_megatron.config.term_checks import term_findings
from asd_megatron.data.templates import PAPER_WORDING, teacher_template_fault
from asd_megatron.errors import UserError, plural

CORPUS = "puzzle:corpus"


def check_recipe(recipe: AnyRecipe) -> None:
    """Refuse what cannot work on any machine. Raises UserError with every finding, one a line."""
    findings = list(_layout(recipe)) + list(_common(recipe))
    findings += list(_train(recipe)) if isinstance(recipe, Recipe) else list(_sft(recipe))
    _refuse(findings)


def _refuse(findings: list[str]) -> None:
    if findings:
        raise UserError(
            findings[0] if len(findings) == 1 else "the recipe cannot work:" + "".join(f"\n  {f}" for f in findings)
        )


def _layout(recipe: AnyRecipe) -> Iterator[str]:
    p = recipe.parallelism
    if p.sequence_parallel and p.tensor == 1:
        yield (
            "parallelism.sequence_parallel divides activations over tensor-parallel ranks and there is one: set "
            "parallelism.tensor above 1, or parallelism.sequence_parallel false"
        )
    if p.virtual_pipeline is not None and p.pipeline == 1:
        yield (
            f"parallelism.virtual_pipeline {p.virtual_pipeline} interleaves the chunks of pipeline stages and there is"
            " one stage: set parallelism.pipeline above 1, or parallelism.virtual_pipeline null"
        )
    elif p.virtual_pipeline == 1:
        yield "parallelism.virtual_pipeline 1 interleaves nothing: set it to null, or to 2 or more"
    if p.overlap_grad_reduce and p.data == 1 and p.context == 1:
        yield (
            "parallelism.overlap_grad_reduce overlaps a reduction over data-parallel ranks and parallelism.data is 1:"
            " set parallelism.data above 1 (or null), or parallelism.overlap_grad_reduce false"
        )
    if recipe.batching.share_prefixes and p.context > 1:
        yield (
            f"batching.share_prefixes true: a shared prefix cannot be cut over the {p.context} context-parallel ranks;"
            " set parallelism.context 1, or leave batching.share_prefixes out"
        )
    if recipe.model.recompute_layers is not None and recipe.model.recompute != "full":
        yield (
            f"model.recompute_layers {recipe.model.recompute_layers} counts completely recomputed layers: set"
            " model.recompute full, or leave model.recompute_layers out"
        )
    yield from precision_findings(recipe)
    if recipe.samples_embedded:
        what, instead = "embedded rollouts sample", "rollout.engine sglang"
        if isinstance(recipe, SftRecipe) or recipe.rollout.engine != "embedded":
            what, instead = "the evaluation samples", "no data.test"
        if p.virtual_pipeline is not None and p.pipeline > 1:
            yield (
                f"parallelism.virtual_pipeline {p.virtual_pipeline}: {what} on the training model stage by stage, and a"
                " stage's chunks are not in the order of its layers then; set parallelism.virtual_pipeline null, or"
                f" use {instead}"
            )
        if p.context > 1:
            yield (
                f"parallelism.context {p.context}: {what} on the training model one token at a time, and one token"
                f" cannot be divided over context-parallel ranks; set parallelism.context 1, or use {instead}"
            )


def _common(recipe: AnyRecipe) -> Iterator[str]:
    o, data = recipe.optimizer, recipe.data
    beyond = [step for step in recipe.run.profile_steps or () if step > recipe.run.steps]
    if beyond:
        yield (
            f"run.profile_steps {beyond}: the run ends after run.steps {recipe.run.steps}; give steps from 1 to that"
        )
    if o.min_learning_rate > o.learning_rate:
        yield (
            f"optimizer.min_learning_rate {o.min_learning_rate} is above optimizer.learning_rate {o.learning_rate}: "
            "a schedule falls; lower it"
        )
    yield from evaluation_findings(recipe)
    yield from data_findings(recipe)
    yield from texts_for_booleans(data.chat_template_kwargs, "data.chat_template_kwargs")
    if data.format == "raw":
        if data.raw_prompt.count("{prompt}") != 1:
            yield f"data.raw_prompt {data.raw_prompt!r} must hold the problem's place once: put {{prompt}} into it"
        for key, given in (("system", data.system), ("chat_template_kwargs", data.chat_template_kwargs)):
            if given:
                yield f"data.{key} belongs to chat prompts: put it into data.raw_prompt, or set data.format chat"
    elif data.raw_prompt != type(data).model_fields["raw_prompt"].default:
        yield "data.raw_prompt is read only with data.format raw: set data.format raw, or leave data.raw_prompt out"
    if data.test is not None and data.test.startswith("puzzle:") and data.test not in PUZZLES:
        yield f"data.test {data.test!r} is not a puzzle set: use puzzle:test"
    yield from reward_findings(recipe)
    if recipe.checkpoint.continual_from is not None and recipe.checkpoint.resume not in ("auto", "never"):
        yield (
            "checkpoint.continual_from and the checkpoint of checkpoint.resume would both be loaded: leave out"
            " checkpoint.resume to start a new run at step 1, or checkpoint.continual_from to go on after the step of"
            " the checkpoint"
        )
    saved = recipe.checkpoint
    if saved.keep_every and (not saved.every or saved.keep_every % saved.every):
        yield (
            f"checkpoint.keep_every {saved.keep_every} is no multiple of checkpoint.every {saved.every}, so most of"
            " what it names is not saved: give a multiple, or 0"
        )
    for key in recipe.checkpoint.accept_changes:
        if key != ALL and key not in dotted_keys(type(recipe)):
            nearest = nearest_key(type(recipe), key)
            yield f"checkpoint.accept_changes: {key} is no recipe key; the nearest one is {nearest} (or give {ALL})"
    yield from gym_findings(recipe)


def _teacher_wording(recipe: Recipe) -> Iterator[str]:
    wording = recipe.privileged.chat_template
    fault = teacher_template_fault(wording, paragraphs=True)
    if fault is not None:
        yield f"privileged.chat_template {fault}"
    raw = recipe.privileged.raw_template
    fault = None if raw is None else teacher_template_fault(raw, paragraphs=False)
    if fault is not None:
        yield f"privileged.raw_template {fault}"
    if recipe.data.format == "raw" and wording != PAPER_WORDING:
        yield (
            "privileged.chat_template is read only with data.format chat: write the teacher's prompt as"
            " privileged.raw_template, or leave privileged.chat_template out"
        )


def _train(recipe: Recipe) -> Iterator[str]:
    yield from _algorithm(recipe)
    s, privileged, rollout, data = recipe.sampling, recipe.privileged, recipe.rollout, recipe.data
    if s.top_p < 1 or s.top_k > 0:
        yield (
            f"sampling.top_p {s.top_p} and sampling.top_k {s.top_k}: training rollouts must be drawn from the"
            " distribution that is scored; set sampling.top_p 1.0 and sampling.top_k 0 (evaluation.top_p and"
            " evaluation.top_k are free)"
        )
    if privileged.min_solution_tokens > privileged.max_solution_tokens:
        yield (
            f"privileged.min_solution_tokens {privileged.min_solution_tokens} is above privileged.max_solution_tokens "
            f"{privileged.max_solution_tokens}: lower the first or raise the second"
        )
    if privileged.max_teacher_tokens is not None and privileged.max_teacher_tokens <= s.max_response_tokens:
        yield (
            f"privileged.max_teacher_tokens {privileged.max_teacher_tokens} leaves no room for a prompt beside a"
            f" response of sampling.max_response_tokens {s.max_response_tokens}: raise the first or lower the second"
        )
    if not (privileged.use_group or privileged.use_reference) and privileged.when_no_solution == "mask":
        yield (
            "privileged.use_group false with privileged.use_reference false leaves no solution to show: set one of them"
            " true, or privileged.when_no_solution reference_answer or feedback_only"
        )
    yield from _teacher_wording(recipe)
    if privileged.raw_template is not None and data.format != "raw":
        yield (
            "privileged.raw_template is read only with data.format raw: set data.format raw, or leave"
            " privileged.raw_template out"
        )
    if rollout.engine == "replay" and rollout.replay_folder is None:
        yield ("rollout.engine replay needs rollout.replay_folder: the folder of a run with run.dump_rollouts true")
    if rollout.engine != "replay" and rollout.replay_folder is not None:
        yield (
            "rollout.replay_folder is read only with rollout.engine replay: set rollout.engine replay, or leave the"
            " folder out"
        )
    yield from rollout_findings(recipe)
    yield from determinism_findings(recipe)
    if isinstance(data.train, str) and data.train.startswith("puzzle:") and data.train not in PUZZLES:
        yield (
            f"data.train {data.train!r} is not a puzzle set: use puzzle:train (puzzle:corpus is for `asd-megatron sft`)"
        )


def _algorithm(recipe: Recipe) -> Iterator[str]:
    a, gate, s = recipe.algorithm, recipe.gate, recipe.sampling
    if s.rollouts_per_problem == 1 and a.weighs_group_advantage:
        yield (
            "sampling.rollouts_per_problem 1: a group of one has no group-relative advantage; set it to 2 or more (the"
            " paper uses 8), or train on the per-token term alone with algorithm.advantage_weight 0"
        )
    rollouts = s.problems_per_step * s.rollouts_per_problem
    if rollouts % a.updates_per_batch:
        yield (
            f"algorithm.updates_per_batch {a.updates_per_batch} does not divide the {rollouts} rollouts of a batch "
            "(sampling.problems_per_step x sampling.rollouts_per_problem) into equal mini-batches: choose a divisor"
        )
    if a.aggregation == "constant_length" and a.constant_length is None:
        yield (
            "algorithm.aggregation constant_length needs algorithm.constant_length (tokens), for instance "
            f"sampling.max_response_tokens, {s.max_response_tokens}"
        )
    if a.aggregation != "constant_length" and a.constant_length is not None:
        yield (
            f"algorithm.constant_length {a.constant_length} is read only with algorithm.aggregation constant_length:"
            " set that, or leave algorithm.constant_length out"
        )
    yield from _importance(a)
    yield from estimator_findings(a)
    yield from term_findings(recipe)
    yield from option_findings(recipe)
    yield from teacher_findings(recipe)
    if a.gated and recipe.gate_warmup_steps == 0 and gate.h_warm is None:
        yield (
            f"gate.warmup_steps 0 leaves the gate of algorithm.name {a.name} without a calibrated entropy: set"
            " gate.warmup_steps to 1 or more, give gate.h_warm (nats), or use algorithm.name no_gate"
        )
    if gate.tau_down > gate.tau_up:
        yield (
            f"gate.tau_down {gate.tau_down} is above gate.tau_up {gate.tau_up}: the gate would close and open at once;"
            " lower it"
        )


def _importance(a: AlgorithmSection) -> Iterator[str]:
    if a.importance_level != "token" and a.importance_correction == "none":
        yield (
            f"algorithm.importance_level {a.importance_level} is read only with a correction: set"
            " algorithm.importance_correction truncated or masked, or leave algorithm.importance_level out"
        )
    if a.importance_floor is not None and a.importance_correction != "masked":
        yield (
            f"algorithm.importance_floor {a.importance_floor} is read only with algorithm.importance_correction masked:"
            " set that, or leave algorithm.importance_floor out"
        )
    if a.mask_below is not None and a.mask_below >= a.importance_cap:
        default = " (its default)" if a.importance_floor is None else ""
        yield (
            f"algorithm.importance_floor {a.mask_below}{default} is not below algorithm.importance_cap"
            f" {a.importance_cap}: no weight would be left; lower the first or raise the second"
        )


def _sft(recipe: SftRecipe) -> Iterator[str]:
    train = recipe.data.train_name
    if train.startswith("puzzle:") and not train.startswith(CORPUS):
        yield f"data.train {train!r} holds problems without responses: the supervised stage takes {CORPUS}"
    if recipe.data.test is not None and recipe.reward is None:
        yield "data.test needs a reward to score the answers: add `reward: {name: ...}`, or leave data.test out"
    if recipe.reward is not None and recipe.data.test is None and not recipe.evaluation.sets:
        yield "reward scores answers to data.test, which is not set: set data.test, or leave reward out"


def check_world(recipe: AnyRecipe, world_size: int) -> int:
    """The data-parallel size that `world_size` ranks leave. Raises UserError when they do not fit the layout."""
    p: ParallelismSection = recipe.parallelism
    product = f"tensor {p.tensor} x pipeline {p.pipeline} x context {p.context}"
    if world_size % p.model_parallel:
        raise UserError(
            f"{plural(world_size, 'rank')} {'does' if world_size == 1 else 'do'} not divide into model copies of"
            f" {p.model_parallel} ({product}): start a multiple of {p.model_parallel} ranks, or change the parallelism"
            " section"
        )
    data = world_size // p.model_parallel
    stage = p.tensor * p.context * data
    if stage % p.expert:
        raise UserError(
            f"parallelism.expert {p.expert} does not divide the {plural(stage, 'rank')} of a pipeline stage (tensor"
            f" {p.tensor} x context {p.context} x data {data}): lower it, or start more ranks (parallelism.data)"
        )
    if p.data is not None and p.data != data:
        raise UserError(
            f"{product} x data {p.data} needs {plural(p.ranks, 'rank')} and there {'is' if world_size == 1 else 'are'}"
            f" {world_size}: start {p.ranks}, or set parallelism.data {data} (or null)"
        )
    return data


def check_devices(recipe: AnyRecipe, *, cuda: bool | None = None, transformer_engine: bool | None = None) -> None:
    """Refuse layers, number formats and an environment that cannot work on this machine. Raises UserError.

    A rank leaves `cuda` and `transformer_engine` out: it looks at its device and imports Transformer Engine. The
    launcher, which must not create a CUDA context, says what it knows.
    """
    from asd_megatron.distributed import machine  # imports torch, which a recipe alone does not need

    looks = cuda is None
    cuda = machine.has_cuda() if cuda is None else cuda
    findings = [machine.attention_switch_problem()]
    if cuda:
        findings.append(machine.torch_problem())
        if looks and recipe.model.dtype != "float32":
            findings.append(machine.bfloat16_problem())
        if isinstance(recipe, Recipe):
            findings += device_findings(recipe.rollout)
    elif isinstance(recipe, Recipe):
        findings.append(cpu_server_finding(recipe))
    absent = _transformer_engine_absent(cuda, transformer_engine)  # why
    if recipe.model.layers == "te" and not machine.transformer_engine_is_stand_in():
        why, remedy = absent, "set model.layers auto or local"
        if cuda and recipe.model.dtype == "float32":
            why, remedy = "its attention has no float32", f"set model.dtype bfloat16, or {remedy}"
        findings.append(why and f"model.layers te: Transformer Engine cannot be used: {why}; {remedy}")
    if recipe.optimizer.moments == "bfloat16":
        findings.append(
            absent
            and "optimizer.moments bfloat16: only Transformer Engine's Adam has such moments, and it cannot be used:"
            f" {absent}; set optimizer.moments float32"
        )
    if recipe.optimizer.offload == "host":
        why = absent if cuda else "there is no GPU, so that the optimizer's state is in host memory anyway"
        findings.append(
            why
            and "optimizer.offload host: Megatron-Core offloads a GPU's optimizer, with Transformer Engine installed:"
            f" {why}; set optimizer.offload none"
        )
    _refuse([finding for finding in findings if finding is not None])


def _transformer_engine_absent(cuda: bool, installed: bool | None) -> str | None:
    """Why Transformer Engine cannot be used; None if it can. installed: what a launcher knows, None: import it."""
    from asd_megatron.distributed import machine

    if machine.transformer_engine_is_stand_in():
        return None
    if not cuda:
        return "it needs a CUDA device and there is none"
    if installed is None:
        return machine.transformer_engine_problem()
    return None if installed else machine.NOT_INSTALLED


def check_model(recipe: AnyRecipe, hf_config: Mapping[str, Any]) -> None:
    """Refuse what does not fit the model. Raises UserError. `hf_config`: as for `model_findings`."""
    _refuse(list(model_findings(recipe, hf_config)))
