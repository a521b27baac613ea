"""Refusals about the teacher's weights and the KL penalty."""

from __future__ import annotations

from collections.abc import Iterator

from asd_megatron.config.algorithm import AlgorithmSection
from asd_megatron.config.recipe import Recipe
from asd_megatron.config.teacher import TeacherSection

WITHOUT_TEACHER = ("grpo", "no_teacher")


def teacher_findings(recipe: Recipe) -> Iterator[str]:
    """Keys of `teacher`, and of `algorithm`'s KL penalty, that nothing would read."""
    a, teacher = recipe.algorithm, recipe.teacher
    if teacher.ema_rate != TeacherSection.model_fields["ema_rate"].default and teacher.weights != "ema":
        yield (
            f"teacher.ema_rate {teacher.ema_rate} is read only with teacher.weights ema: set that, or leave"
            " teacher.ema_rate out"
        )
    scored = a.name not in WITHOUT_TEACHER or a.log_pmi
    if teacher.weights != "live" and not scored:
        yield (
            f"teacher.weights {teacher.weights}: algorithm.name {a.name} scores no teacher; leave teacher.weights out,"
            " or set algorithm.log_pmi true to log u"
        )
    if a.kl_estimator != AlgorithmSection.model_fields["kl_estimator"].default and a.kl_coefficient == 0:
        yield (
            f"algorithm.kl_estimator {a.kl_estimator} is read only with algorithm.kl_coefficient above 0: set that, or"
            " leave algorithm.kl_estimator out"
        )
