"""Refusals about what the per-token term is made of: its composition with A_seq, the source of lambda, outliers."""

from __future__ import annotations

from collections.abc import Iterator

from asd_megatron.config.recipe import Recipe
from asd_megatron.config.refusals import changed, unread

WITHOUT_PERPLEXITY = {
    "no_teacher": "it has no teacher",
    "student_entropy_gate": "its gate on the student's entropy is what the condition is about",
}
"""Conditions that cannot take lambda from the teacher's perplexity."""


def term_findings(recipe: Recipe) -> Iterator[str]:
    """What the recipe asks of the per-token term that cannot be had or would not be read."""
    yield from _composition(recipe)
    yield from _outliers(recipe)
    if recipe.algorithm.lambda_source == "teacher_perplexity":
        yield from _perplexity(recipe)
        return
    yield from unread("perplexity", recipe.perplexity, needs="algorithm.lambda_source teacher_perplexity")


def _composition(recipe: Recipe) -> Iterator[str]:
    a = recipe.algorithm
    if a.name == "grpo":  # like the other options of the term: a baseline is one line away from any recipe
        return
    if a.name == "multiplicative" and a.composition not in (None, "multiplicative"):
        yield (
            f"algorithm.composition {a.composition} contradicts algorithm.name multiplicative: set algorithm.name"
            " antisd, which has the same term and gate"
        )
    if a.composition == "rlsd" and a.name not in ("sd", "reverse_kl_ascent"):
        yield (
            f"algorithm.composition rlsd takes u itself, and the term of algorithm.name {a.name} is another function:"
            " set algorithm.name sd (towards the teacher, the released code's) or reverse_kl_ascent (away from it)"
        )
    if a.composition == "rlsd" and a.lambda_max > 1:
        yield (
            f"algorithm.lambda_max {a.lambda_max} with algorithm.composition rlsd: lambda interpolates between A_seq"
            " and the weighted A_seq: set it to 1 or less"
        )
    if a.composition == "rlsd" and a.lambda_source == "teacher_perplexity" and recipe.perplexity.lambda_min < -1:
        yield (
            f"perplexity.lambda_min {recipe.perplexity.lambda_min} with algorithm.composition rlsd: a lambda far below"
            " 0 turns the sign of A_seq; set it to -1 or more"
        )
    if a.advantage_weight == 0 and a.lambda_max == 0:
        yield (
            "algorithm.advantage_weight 0 with algorithm.lambda_max 0 leaves nothing to train on: raise one of them, or"
            " set algorithm.name grpo"
        )
    if a.advantage_weight != 1 and a.term_composition != "additive":
        yield (
            f"algorithm.advantage_weight {a.advantage_weight} weighs the group advantage against an added term, and"
            f" algorithm.composition {a.term_composition} adds none: leave algorithm.advantage_weight out, or set"
            " algorithm.composition additive"
        )


def _outliers(recipe: Recipe) -> Iterator[str]:
    a = recipe.algorithm
    if a.outlier_deviations is None or a.name == "grpo" or recipe.lambda_warmup_steps > 0:
        return
    section = "perplexity" if a.lambda_source == "teacher_perplexity" else "gate"
    yield (
        f"algorithm.outlier_deviations {a.outlier_deviations} measures u's deviation in the warm-up steps and there are"
        f" none: set {section}.warmup_steps to 1 or more, or leave algorithm.outlier_deviations out"
    )


def _perplexity(recipe: Recipe) -> Iterator[str]:
    a, p = recipe.algorithm, recipe.perplexity
    if a.name in WITHOUT_PERPLEXITY:
        yield (
            f"algorithm.lambda_source teacher_perplexity: algorithm.name {a.name} cannot use it"
            f" ({WITHOUT_PERPLEXITY[a.name]}); set algorithm.lambda_source gate, or algorithm.name antisd"
        )
    for key, value in changed(recipe.gate).items():
        yield (
            f"gate.{key} {value} is of the entropy gate, and algorithm.lambda_source teacher_perplexity replaces it:"
            f" leave gate.{key} out"
            + (" (perplexity.warmup_steps is the key here)" if key == "warmup_steps" else "")
            + ", or set algorithm.lambda_source gate"
        )
    if p.target is not None and p.target >= p.cutoff:
        yield (
            f"perplexity.target {p.target} is not below perplexity.cutoff {p.cutoff}: every response above the target"
            " would have lambda 0; lower the first or raise the second"
        )
    if p.warmup_steps == 0 and p.target is None:
        yield (
            "perplexity.warmup_steps 0 leaves no step to measure the target perplexity in: set it to 1 or more, or give"
            " perplexity.target"
        )
    ways = changed(p, "target", "target_ratio", "target_offset")
    if len(ways) > 1:
        yield f"{' and '.join(f'perplexity.{key}' for key in ways)} contradict each other: give one of them"
    if p.lambda_min > a.lambda_max:
        yield (
            f"perplexity.lambda_min {p.lambda_min} is above algorithm.lambda_max {a.lambda_max}: lower the first or"
            " raise the second"
        )
    if p.scope == "batch" and p.shift == "always":
        yield (
            "perplexity.shift always with perplexity.scope batch makes every lambda 0: set perplexity.shift negative or"
            " none, or perplexity.scope response"
        )
