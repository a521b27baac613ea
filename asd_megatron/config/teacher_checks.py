"""Refusals about the teacher's weights and the KL penalty."""

from __future__ import annotations

from collections.abc import Iterator

from asd_megatron.config.recipe import Recipe
from asd_megatron.config.refusals import unread

WITHOUT_TEACHER = ("grpo", "no_teacher")


def teacher_findings(recipe: Recipe) -> Iterator[str]:
    """Keys of `teacher`, and of `algorithm`'s KL penalty, that nothing would read."""
    a, teacher = recipe.algorithm, recipe.teacher
    if teacher.weights != "ema":
        yield from unread("teacher", teacher, "ema_rate", needs="teacher.weights ema")
    scored = a.name not in WITHOUT_TEACHER or a.log_pmi
    if teacher.weights != "live" and not scored:
        yield (
            f"teacher.weights {teacher.weights}: algorithm.name {a.name} scores no teacher; leave teacher.weights out,"
            " or set algorithm.log_pmi true to log u"
        )
    if a.kl_coefficient == 0:
        yield from unread("algorithm", a, "kl_estimator", needs="algorithm.kl_coefficient above 0")
