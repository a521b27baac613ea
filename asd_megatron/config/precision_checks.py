"""Cross-checks of number formats, in sections `precision` and `optimizer`; machines and models' shapes are checked when
the model is built."""

from __future__ import annotations

from collections.abc import Iterator

from asd_megatron.config.recipe import AnyRecipe, Recipe, SftRecipe

LARGEST_DECAY = 0.99  # of a moment in bfloat16, whose rounding a slower one would never pass


def precision_findings(recipe: AnyRecipe) -> Iterator[str]:
    yield from _optimizer(recipe)
    p = recipe.precision
    if p.fp8 == "none":
        for key in ("fp8_scores", "fp8_parameters", "fp8_probe_every"):
            if getattr(p, key):
                yield f"precision.{key} {_text(getattr(p, key))} belongs to FP8: set precision.fp8, or leave it out"
        return
    if recipe.model.layers == "local":
        yield (
            f"precision.fp8 {p.fp8}: FP8 products are Transformer Engine's and model.layers is local; set model.layers"
            " auto or te, or precision.fp8 none"
        )
    if recipe.model.dtype == "float32":
        yield (
            f"precision.fp8 {p.fp8}: layers beside FP8 products compute in bfloat16 and model.dtype is float32; set"
            " model.dtype bfloat16, or precision.fp8 none"
        )
    if isinstance(recipe, SftRecipe):
        for key in ("fp8_scores", "fp8_probe_every"):
            if getattr(p, key):
                yield f"precision.{key} {_text(getattr(p, key))}: the supervised stage scores nothing; leave it out"
    elif recipe.algorithm.estimator == "full_vocabulary" and not p.fp8_scores:
        yield (
            f"precision.fp8 {p.fp8} with algorithm.estimator full_vocabulary: the divergence compares the update's"
            " logits, which are FP8's, with the teacher's, and would train on the rounding between two number formats;"
            " set precision.fp8_scores true, algorithm.estimator sampled, or precision.fp8 none"
        )
    if p.fp8_parameters and not recipe.parallelism.distributed_optimizer:
        yield (
            "precision.fp8_parameters true: only the distributed optimizer casts its master weights to FP8; set"
            " parallelism.distributed_optimizer true, or precision.fp8_parameters false"
        )
    if p.fp8_parameters and recipe.samples_embedded:
        yield (
            "precision.fp8_parameters true: the embedded engine samples in bfloat16, of weights that are FP8 then; use"
            " rollout.engine sglang without data.test, or set precision.fp8_parameters false"
        )
    if p.fp8_parameters and isinstance(recipe, Recipe) and _has_copies(recipe):
        yield (
            "precision.fp8_parameters true: copies of the weights (teacher.weights, algorithm.kl_coefficient) are"
            " exchanged in bfloat16; set precision.fp8_parameters false"
        )
    if p.fp8 == "mxfp8" and p.fp8_parameters:
        yield (
            "precision.fp8_parameters true with precision.fp8 mxfp8 needs gradient buffers that hold gathered weights,"
            " which is not supported; set precision.fp8_parameters false"
        )


def _has_copies(recipe: Recipe) -> bool:
    return recipe.teacher.weights != "live" or recipe.algorithm.kl_coefficient > 0


def _text(value: bool | int) -> str:
    """As a recipe has it."""
    return str(value).lower()


def _optimizer(recipe: AnyRecipe) -> Iterator[str]:
    o = recipe.optimizer
    chosen = [("moments", "bfloat16", "float32")] if o.moments == "bfloat16" else []
    chosen += [("offload", "host", "none")] if o.offload == "host" else []
    if len(chosen) == 2:
        yield (
            "optimizer.moments bfloat16 with optimizer.offload host: the host's Adam has float32 moments; set"
            " optimizer.moments float32, or optimizer.offload none"
        )
    for key, value, without in chosen:
        if not recipe.parallelism.distributed_optimizer:
            yield (
                f"optimizer.{key} {value} is Megatron's distributed optimizer's; set parallelism.distributed_optimizer"
                f" true, or optimizer.{key} {without}"
            )
        if recipe.model.dtype == "float32":
            yield (
                f"optimizer.{key} {value} is for a model in bfloat16, and model.dtype is float32; set model.dtype"
                f" bfloat16, or optimizer.{key} {without}"
            )
        if recipe.precision.fp8_parameters:
            yield (
                f"optimizer.{key} {value} with precision.fp8_parameters true: Megatron keeps complete master weights"
                f" beside weights in FP8; set precision.fp8_parameters false, or optimizer.{key} {without}"
            )
    for name in ("beta1", "beta2") if o.moments == "bfloat16" else ():
        decay = getattr(o, name)
        if decay > LARGEST_DECAY:
            yield (
                f"optimizer.{name} {decay} with optimizer.moments bfloat16: bfloat16 rounds a moment that decays by"
                f" less than 0.4% a step back to what it was, so that it never decays; set optimizer.{name} to"
                f" {LARGEST_DECAY} or less (0.95 is usual), or optimizer.moments float32"
            )
