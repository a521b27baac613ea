"""What a model's sizes rule out: layouts that do not divide it, lengths beyond its positions, keys for experts that it
does not have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from asd_megatron.config.parallelism import ParallelismSection
from asd_megatron.config.recipe import AnyRecipe, Recipe
from asd_megatron.config.rollout_checks import quantized_model_findings
from asd_megatron.errors import plural


def model_findings(recipe: AnyRecipe, hf_config: Mapping[str, Any]) -> Iterator[str]:
    """One message for each combination that cannot work.

    `hf_config` is the Hugging Face `config.json` of the model; what it does not say is not checked here.
    """
    yield from _divides(recipe.parallelism, hf_config)
    yield from _experts(recipe, hf_config)
    yield from _recompute(recipe, hf_config)
    yield from _lengths(recipe, hf_config)
    if isinstance(recipe, Recipe):
        yield from quantized_model_findings(recipe.rollout, hf_config)


def _experts(recipe: AnyRecipe, hf_config: Mapping[str, Any]) -> Iterator[str]:
    p = recipe.parallelism
    experts = hf_config.get("num_experts", hf_config.get("num_local_experts"))
    if not isinstance(experts, int):
        if p.expert > 1:
            yield f"parallelism.expert {p.expert}: the model has no experts; set parallelism.expert 1"
        if recipe.model.auxiliary_loss is not None:
            yield (
                f"model.auxiliary_loss {recipe.model.auxiliary_loss:g} balances the load of experts, and the model has"
                " none: leave model.auxiliary_loss out"
            )
        if isinstance(recipe, Recipe) and recipe.rollout.routing_replay != "none":
            yield (
                f"rollout.routing_replay {recipe.rollout.routing_replay} replays the routing of experts, and the model"
                " has none: leave rollout.routing_replay out"
            )
        return
    if experts % p.expert:
        usable = [n for n in range(1, experts + 1) if experts % n == 0]
        yield (
            f"parallelism.expert {p.expert} does not divide the model's {experts} experts: set it to one of "
            f"{', '.join(map(str, usable))}"
        )
    if p.tensor > 1 and not p.sequence_parallel:
        yield (
            f"parallelism.tensor {p.tensor}: a model with experts needs sequence parallelism beside tensor parallelism,"
            " so that no two ranks route the same token; set parallelism.sequence_parallel true"
        )


def _recompute(recipe: AnyRecipe, hf_config: Mapping[str, Any]) -> Iterator[str]:
    p, layers, count = recipe.parallelism, hf_config.get("num_hidden_layers"), recipe.model.recompute_layers
    if not isinstance(layers, int) or count is None:
        return
    of_stage = max(layers // (p.pipeline * (p.virtual_pipeline or 1)), 1)
    if count > of_stage:
        yield (
            f"model.recompute_layers {count}: a pipeline stage has {plural(of_stage, 'layer')}; lower it, or leave it"
            " out to recompute all"
        )


def _divides(p: ParallelismSection, hf_config: Mapping[str, Any]) -> Iterator[str]:
    heads = hf_config.get("num_attention_heads")
    shared = {
        "attention heads": heads,
        "key-value heads": hf_config.get("num_key_value_heads") or heads,
        "hidden units": hf_config.get("hidden_size"),
        "feed-forward units": None if "moe_intermediate_size" in hf_config else hf_config.get("intermediate_size"),
    }
    sizes = {name: size for name, size in shared.items() if isinstance(size, int)}
    bad = [f"{size} {name}" for name, size in sizes.items() if size % p.tensor]
    if bad:
        usable = [t for t in range(1, max(sizes.values()) + 1) if all(size % t == 0 for size in sizes.values())]
        yield (
            f"parallelism.tensor {p.tensor} does not divide the model's {', '.join(bad)}: set parallelism.tensor to one"
            f" of {', '.join(map(str, usable))}"
        )
    layers = hf_config.get("num_hidden_layers")
    if not isinstance(layers, int):
        return
    if p.pipeline > layers:
        yield (
            f"parallelism.pipeline {p.pipeline}: the model has {layers} layers, fewer than stages; set it to a divisor"
            f" of {layers}"
        )
    elif layers % p.pipeline:
        usable = [n for n in range(1, layers + 1) if layers % n == 0]
        yield (
            f"parallelism.pipeline {p.pipeline} does not divide the model's {layers} layers: set it to one of "
            f"{', '.join(map(str, usable))}"
        )
    elif p.virtual_pipeline is not None and (layers // p.pipeline) % p.virtual_pipeline:
        yield (
            f"parallelism.virtual_pipeline {p.virtual_pipeline} does not divide the {layers // p.pipeline} layers of a"
            " pipeline stage: set it to a divisor of them, or to null"
        )


def _lengths(recipe: AnyRecipe, hf_config: Mapping[str, Any]) -> Iterator[str]:
    positions = hf_config.get("max_position_embeddings")
    if not isinstance(positions, int):
        return
    s = recipe.sampling
    longest = s.max_prompt_tokens + s.max_response_tokens
    if (isinstance(recipe, Recipe) or recipe.evaluates) and longest > positions:
        yield (
            f"sampling.max_prompt_tokens {s.max_prompt_tokens} + sampling.max_response_tokens {s.max_response_tokens} ="
            f" {longest} tokens, and the model has {positions} positions: lower one of them by {longest - positions}"
        )
    for name, given in recipe.evaluation.sets.items() if recipe.evaluates else ():
        longest = s.max_prompt_tokens + (given.max_new_tokens or 0)
        if longest > positions:
            yield (
                f"evaluation.sets.{name}.max_new_tokens {given.max_new_tokens} + sampling.max_prompt_tokens"
                f" {s.max_prompt_tokens} = {longest} tokens, and the model has {positions} positions: lower one of them"
                f" by {longest - positions}"
            )
    if isinstance(recipe, Recipe):
        limit = recipe.privileged.max_teacher_tokens
        if limit is not None and limit > positions:
            yield (
                f"privileged.max_teacher_tokens {limit} is beyond the model's {positions} positions: lower it, or set"
                " it to null"
            )
